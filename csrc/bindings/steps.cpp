#include "steps.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "execute.h"
#include "parse.h"

namespace fusionsum {
namespace {

constexpr const char* kSteps[] = {"log_sum_exp", "pair_sums", "softmax_gamma", "sigmoid", "leave_out", "top_k", "rank"};

// The fields of a chunk by their names, as Python gives them; each array is a tensor of the products' device.
class Fields {
 public:
  Fields(const py::kwargs& given, const Home& home) : given_(given), home_(home) {}

  void read(const char* name, int64_t& to) {
    if (const py::handle object = field(name)) to = object.cast<int64_t>();
  }
  void read(const char* name, bool& to) {
    if (const py::handle object = field(name)) to = object.cast<bool>();
  }
  // A number, or a tensor with one.
  void read_scalar(const char* name, double& value, const double*& at) {
    const py::handle object = field(name);
    if (!object) return;
    if (PyFloat_Check(object.ptr())) {
      value = PyFloat_AS_DOUBLE(object.ptr());
    } else {
      at = static_cast<const double*>(data_of(name, object, DType::f64, 1));
    }
  }
  // Contiguous arrays of so many entries.
  const int64_t* integers(const char* name, int64_t count) {
    const py::handle object = field(name);
    return object ? static_cast<const int64_t*>(data_of(name, object, kIntegers, count)) : nullptr;
  }
  const double* doubles(const char* name, int64_t count) {
    return static_cast<const double*>(floats(name, DType::f64, count));
  }
  void* floats(const char* name, DType dtype, int64_t count) {
    const py::handle object = field(name);
    return object ? data_of(name, object, dtype, count) : nullptr;
  }
  bool strided(const char* name, int ndim, Array& to) {
    const py::handle object = field(name);
    if (!object) return false;
    if (!fusionsum::read(object, home_.framework, to) || !(to.device == home_.device) || to.ndim != ndim) wrong(name);
    return true;
  }
  int64_t entries(const char* name) {
    const py::handle object = field(name);
    return object ? object.attr("numel")().cast<int64_t>() : 0;
  }
  [[noreturn]] static void wrong(const char* name) { throw py::type_error(std::string("step: ") + name); }

 private:
  static constexpr DType kIntegers = static_cast<DType>(0xff);

  py::handle field(const char* name) const {
    if (!given_.contains(name)) return {};
    const py::handle object = given_[name];
    return object.is_none() ? py::handle() : object;
  }
  void* data_of(const char* name, py::handle object, DType dtype, int64_t count) const {
    Array a;
    if (!fusionsum::read(object, home_.framework, a) || !(a.device == home_.device) || a.boolean) wrong(name);
    if (a.integer != (dtype == kIntegers) || (!a.integer && a.dtype != dtype)) wrong(name);
    int64_t size = 1;
    for (int d = a.ndim - 1; d >= 0; --d) {
      if (a.shape[d] != 1 && a.stride[d] != size) wrong(name);
      size *= a.shape[d];
    }
    if (size != count) wrong(name);
    return a.data;
  }

  const py::kwargs& given_;
  const Home& home_;
};

void step(const std::string& name, py::handle products, const py::kwargs& given) {
  Chunk c{};
  Home home;
  Array a;
  if (!find_home(products, Py_True, home) || home.framework != Framework::torch || !read_floats(products, home, a) ||
      a.ndim != 2 || (a.dtype != DType::f32 && a.dtype != DType::f64) || (a.shape[1] > 1 && a.stride[1] != 1))
    Fields::wrong("products");
  const auto* const found = std::find(std::begin(kSteps), std::end(kSteps), name);
  if (found == std::end(kSteps)) Fields::wrong("name");
  c.step = static_cast<Step>(found - std::begin(kSteps));
  c.dtype = c.gamma_dtype = a.dtype;
  c.products = a.data;
  c.rows = a.shape[0];
  c.cols = a.shape[1];
  c.stride = a.stride[0];
  if (reinterpret_cast<uintptr_t>(a.data) % 16 || (c.rows > 1 && c.stride * item_size(a.dtype) % 16))
    Fields::wrong("products");

  Fields f(given, home);
  f.read("all_rows", c.all_rows);
  f.read("all_cols", c.all_cols);
  f.read("first_row", c.first_row);
  f.read("first_col", c.first_col);
  f.read("skip", c.skip);
  if (c.first_row < 0 || c.first_row + c.rows > c.all_rows || c.first_col < 0 || c.first_col + c.cols > c.all_cols)
    Fields::wrong("first_row, first_col");
  c.scale = 1;
  f.read_scalar("logit_scale", c.scale, c.scale_at);
  f.read_scalar("logit_bias", c.bias, c.bias_at);
  if (f.strided("key_bias", 1, a)) {
    if (a.boolean || a.integer || a.shape[0] != c.all_cols) Fields::wrong("key_bias");
    c.key_bias = a.data;
    c.key_bias_dtype = a.dtype;
    c.key_bias_stride = a.stride[0];
  }
  c.query_labels = f.integers("query_labels", c.all_rows);
  c.key_labels = f.integers("key_labels", c.all_cols);
  c.query_ids = f.integers("query_ids", c.all_rows);
  c.key_ids = f.integers("key_ids", c.all_cols);
  if (!c.query_labels != !c.key_labels || !c.query_ids != !c.key_ids) Fields::wrong("labels, ids");
  if (f.strided("exclude", 2, a)) {
    if (!a.boolean || a.shape[0] != c.all_rows || a.shape[1] != c.all_cols) Fields::wrong("exclude");
    c.exclude = static_cast<const uint8_t*>(a.data);
    c.exclude_row = a.stride[0];
    c.exclude_col = a.stride[1];
  }

  const auto results = [&](const char* field, int64_t count) { return const_cast<double*>(f.doubles(field, count)); };
  const bool softmax = c.step == Step::softmax_gamma;
  const Values values = values_of(c.step);
  c.of_rows = results("of_rows", values.of_row * c.all_rows);
  c.of_cols = results("of_cols", values.of_col * c.all_cols);
  c.of_all = results("of_all", values.of_all);
  f.read("only_positives", c.only_positives);
  c.diagonal = results("diagonal", c.all_rows);

  f.read("any", c.any);
  c.row_coefs = f.doubles("row_coefs", (softmax ? kSoftmaxCoefs : 1) * c.all_rows);
  c.col_coefs = f.doubles("col_coefs", kSoftmaxCoefs * c.all_cols);
  if (f.strided("gamma", 2, a)) {
    const bool narrower = c.dtype == DType::f32 && a.dtype == DType::bf16;
    if (a.boolean || a.integer || (a.dtype != c.dtype && !narrower) || a.shape[0] != c.rows || a.shape[1] != c.cols ||
        (c.rows > 1 && a.stride[0] != c.stride) || (c.cols > 1 && a.stride[1] != 1) ||
        reinterpret_cast<uintptr_t>(a.data) % 16)
      Fields::wrong("gamma");
    c.gamma = a.data;
    c.gamma_dtype = a.dtype;
  }
  if ((softmax && !c.gamma) || ((softmax || c.gamma) && !c.row_coefs)) Fields::wrong("gamma, row_coefs");

  c.places_count = f.entries("places");
  c.places = f.integers("places", c.places_count);
  f.read("k", c.k);
  c.best = const_cast<int64_t*>(f.integers("best", c.all_rows * c.k * (c.dtype == DType::f64 ? 2 : 1)));
  c.values = f.floats("values", c.dtype, c.all_rows * c.k);
  c.indices = const_cast<int64_t*>(f.integers("indices", c.all_rows * c.k));
  if (c.step == Step::top_k && (!c.best || !c.values != !c.indices || c.k < 0 || c.k > kMostSelected))
    Fields::wrong("best, values, indices, k");
  c.targets = f.integers("targets", c.all_rows);
  c.target_scores = f.floats("target_scores", c.dtype, c.all_rows);
  if (c.step == Step::rank && (!c.targets || !c.target_scores || !c.of_rows)) Fields::wrong("targets, target_scores");
  if ((c.step == Step::log_sum_exp || c.step == Step::pair_sums || c.step == Step::sigmoid) && !c.of_rows)
    Fields::wrong("of_rows");
  execute(c, home.device);
}

}  // namespace

void define_steps(py::module_& m) { m.def("step", &step); }

}  // namespace fusionsum
