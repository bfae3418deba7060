// Scores and what is made of them: from Python's arguments to a Scores (../scores.h), which the CPU executes, and back.
//
// Floats and masks are arrays of the caller's framework; integers, statistics and coefficients are NumPy's.
#include "scores.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../cpu/dispatch.h"
#include "parse.h"

namespace fusionsum {
namespace {

// A call's arguments, read one after another.
class Call {
 public:
  Scores s{};
  Home home;

  explicit Call(const py::args& args) : args_(args) {}

  // The sides: queries, keys, activations, key_activations, present, key_present, absent, fusion_weights, key_bias.
  bool read_sides() {
    const py::handle queries = next(), keys = next(), activations = next(), key_activations = next(), present = next(),
                     key_present = next(), absent = next(), weights = next(), key_bias = next();
    if (!PyTuple_Check(queries.ptr()) || py::len(queries) < 1) return false;
    if (!find_home(item(queries, 0), args_[args_.size() - 1], home)) return false;
    if (!read_absent(absent, s.absent) || !read_side(queries, activations, present, s.queries) ||
        !read_side(keys, key_activations, key_present, s.keys))
      return false;
    Array a;
    if (!weights.is_none()) {
      if (!read_floats(weights, home, a) || a.ndim != 1 || a.shape[0] != s.terms) return false;
      Factor& f = s.queries.factor[s.queries.factors++];
      f = Factor{a.data, nullptr, a.dtype, Activation::none, 0, a.stride[0], 0};
      count(a);
    }
    promoted_ = votes_ & (votes_ - 1) ? (s.wide ? DType::f64 : DType::f32) : last_;
    if (!key_bias.is_none()) {
      if (!read_floats(key_bias, home, a) || a.ndim != 1 || a.shape[0] != s.keys.rows) return false;
      s.key_bias = Factor{a.data, nullptr, a.dtype, Activation::none, a.stride[0], 0, 0};
      s.wide = s.wide || a.dtype == DType::f64;
    }
    s.scale = 1;
    return home.device.type == dlpack::kCpu;
  }

  // logit_scale, logit_bias, query_labels, key_labels, query_ids, key_ids, exclude.
  bool read_pairs() {
    const py::handle scale = next(), bias = next();
    if (!PyFloat_Check(scale.ptr()) || !PyFloat_Check(bias.ptr())) return false;
    s.scale = PyFloat_AS_DOUBLE(scale.ptr());
    s.bias = PyFloat_AS_DOUBLE(bias.ptr());
    return read_vector(next(), s.queries.rows, s.query_labels) && read_vector(next(), s.keys.rows, s.key_labels) &&
           read_vector(next(), s.queries.rows, s.query_ids) && read_vector(next(), s.keys.rows, s.key_ids) &&
           !s.query_labels == !s.key_labels && !s.query_ids == !s.key_ids && read_exclude();
  }

  // exclude, excluded_offsets, excluded_ids.
  bool read_excluded() {
    if (!read_exclude()) return false;
    int64_t any = -1;
    if (!read_vector(next(), s.queries.rows + 1, s.excluded_from) || !read_vector(next(), any, s.excluded))
      return false;
    for (int64_t b = 0; s.excluded_from && b < s.queries.rows; ++b)
      if (s.excluded_from[b] < 0 || s.excluded_from[b] > s.excluded_from[b + 1]) return false;
    return !s.excluded_from || s.excluded_from[s.queries.rows] <= any;
  }

  // Whether each of `count` things is wanted.
  template <size_t N>
  bool read_needs(bool (&to)[N]) {
    const py::handle needs = next();
    if (!is_sequence_of(needs, N)) return false;
    for (size_t i = 0; i < N; ++i) to[i] = PyObject_IsTrue(item(needs, i).ptr()) == 1;
    return true;
  }

  bool read_flag(bool& to) {
    const py::handle flag = next();
    to = flag.ptr() == Py_True;
    return PyBool_Check(flag.ptr());
  }

  // A contiguous NumPy vector of `size` entries (any number, which is then set, where it is negative), or None.
  template <class T>
  bool read_vector(py::handle object, int64_t&& size, const T*& to) {
    return read_vector(object, size, to);
  }
  template <class T>
  bool read_vector(py::handle object, int64_t& size, const T*& to) {
    if (object.is_none()) return true;
    if (!py::isinstance<py::array_t<T, py::array::c_style>>(object)) return false;
    const auto array = py::reinterpret_borrow<py::array_t<T, py::array::c_style>>(object);
    if (size < 0) size = array.size();
    to = array.data();
    return array.size() == size;
  }

  bool read_matrix(py::handle object) {  // of scores
    Array a;
    if (!read_floats(object, home, a) || a.ndim != 2 || a.shape[0] != s.queries.rows || a.shape[1] != s.keys.rows)
      return false;
    set_matrix(a.data, a.dtype, a.stride[0], a.stride[1]);
    return true;
  }
  void set_matrix(void* data, DType dtype, int64_t row, int64_t col) {
    s.matrix = data;
    s.matrix_dtype = dtype;
    s.matrix_row = row;
    s.matrix_col = col;
  }

  py::handle next() { return at_ < args_.size() ? py::handle(args_[at_++]) : py::none(); }
  bool at_end() const { return at_ + 1 == args_.size(); }  // `trusted` is last

  DType promoted() const { return promoted_; }
  DType working() const { return s.wide ? DType::f64 : DType::f32; }

  py::object new_rows(int64_t rows, int64_t cols, DType dtype, void*& data) const {
    const int64_t shape[] = {rows, cols};
    return allocate(home.framework, home.device, dtype, 2, shape, &data);
  }
  // NumPy vectors in the scores' dtype.
  py::array new_vector(int64_t size) const {
    return py::array(py::dtype(working() == DType::f64 ? "float64" : "float32"), std::vector<py::ssize_t>{size});
  }
  bool read_copy(py::handle object, py::array& to) const {
    const py::array copy = py::array::ensure(object, py::array::c_style);
    if (!copy || copy.ndim() != 1 || copy.shape(0) != s.queries.rows) return false;
    to = new_vector(s.queries.rows);
    if (!copy.dtype().equal(to.dtype())) return false;
    std::memcpy(to.mutable_data(), copy.data(), static_cast<size_t>(copy.nbytes()));
    return true;
  }
  py::object new_gradient(bool wanted, int64_t rows, void*& data) const {
    if (!wanted) return py::none();
    const int64_t shape[] = {rows, s.terms};
    py::object array = new_rows(rows, s.terms, working(), data);
    clear(array, home.device, working(), 2, shape, data);
    return array;
  }

  void execute() const {
    Workspace workspace;
    bool done;
    {
      py::gil_scoped_release no_gil;
      done = fusionsum::execute(s, kernels_for(s, active_isa()), workspace, [] {
        py::gil_scoped_acquire gil;
        return PyErr_CheckSignals() != 0;
      });
    }
    if (!done) throw py::error_already_set();
  }

 private:
  void count(const Array& a) {
    votes_ |= 1u << static_cast<int>(a.dtype);
    last_ = a.dtype;
    s.wide = s.wide || a.dtype == DType::f64;
  }

  bool read_side(py::handle factors, py::handle activations, py::handle present, Side& to) {
    if (!PyTuple_Check(factors.ptr())) return false;
    const size_t size = py::len(factors);
    if (size < 1 || size > kMaxFactors || !is_sequence_of(activations, size) || !is_sequence_of(present, size))
      return false;
    for (size_t m = 0; m < size; ++m) {
      Array a, mask;
      if (!read_floats(item(factors, m), home, a) || a.ndim != 2) return false;
      if (m == 0) to.rows = a.shape[0];
      if (!has_terms_) s.terms = a.shape[1];
      has_terms_ = true;
      if (a.shape[0] != to.rows || a.shape[1] != s.terms) return false;
      Factor& f = to.factor[m];
      f = Factor{a.data, nullptr, a.dtype, Activation::none, a.stride[0], a.stride[1], 0};
      if (!read_activation(item(activations, m), f.activation)) return false;
      const py::handle given = item(present, m);
      if (!given.is_none()) {
        if (!read(given, home.framework, mask) || !mask.boolean || mask.ndim != 1 || mask.shape[0] != to.rows)
          return false;
        f.mask = static_cast<const uint8_t*>(mask.data);
        f.mask_row = mask.stride[0];
      }
      count(a);
    }
    to.factors = static_cast<int>(size);
    return true;
  }

  bool read_exclude() {
    const py::handle object = next();
    if (object.is_none()) return true;
    Array a;
    if (!read(object, home.framework, a) || !a.boolean || a.ndim != 2 || a.shape[0] != s.queries.rows ||
        a.shape[1] != s.keys.rows)
      return false;
    s.exclude = static_cast<const uint8_t*>(a.data);
    s.exclude_row = a.stride[0];
    s.exclude_col = a.stride[1];
    return true;
  }

  const py::args& args_;
  size_t at_ = 0;
  bool has_terms_ = false;
  uint32_t votes_ = 0;
  DType last_ = DType::f32, promoted_ = DType::f32;
};

py::array_t<double> doubles(std::initializer_list<py::ssize_t> shape) {
  return py::array_t<double>(std::vector<py::ssize_t>(shape));
}

// ---- store ----------------------------------------------------------------------------------------------------------

py::object score_matrix(const py::args& args) {
  Call call(args);
  if (!call.read_sides() || !call.read_pairs() || !call.at_end()) return declined();
  Scores& s = call.s;
  s.query_labels = s.key_labels = s.query_ids = s.key_ids = nullptr;
  s.exclude = nullptr;
  s.epilogue = Epilogue::store;
  void* data;
  py::object matrix = call.new_rows(s.queries.rows, s.keys.rows, call.promoted(), data);
  call.set_matrix(data, call.promoted(), s.keys.rows, 1);
  call.execute();
  return matrix;
}

py::object score_matrix_grad(const py::args& args) {
  Call call(args);
  const py::handle grad = call.next();
  bool needs[2];
  if (!call.read_sides() || !call.read_pairs() || !call.read_matrix(grad) || !call.read_needs(needs) || !call.at_end())
    return declined();
  Scores& s = call.s;
  s.query_labels = s.key_labels = s.query_ids = s.key_ids = nullptr;
  s.exclude = nullptr;
  s.epilogue = Epilogue::store;
  s.differentiates = true;
  py::object d_queries = call.new_gradient(needs[0], s.queries.rows, s.d_queries);
  py::object d_keys = call.new_gradient(needs[1], s.keys.rows, s.d_keys);
  call.execute();
  return py::make_tuple(d_queries, d_keys);
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// 5 x count: log-sum-exp; mean of the positives or their log-sum-exp; their number; sum and number of scores.
py::array_t<double> as_rows(const std::vector<Statistics>& stats, bool any) {
  const int64_t count = static_cast<int64_t>(stats.size());
  py::array_t<double> array = doubles({5, count});
  double* const to = array.mutable_data();
  for (int64_t i = 0; i < count; ++i) {
    const Statistics& of = stats[static_cast<size_t>(i)];
    const double positives = of.positive > 0 ? std::log(of.positive) + of.positive_reference : std::log(of.positive);
    to[i] = of.reference + std::log(of.sum);
    to[count + i] = any ? positives : of.positives > 0 ? of.positive / of.positives : 0;
    to[2 * count + i] = of.positives;
    to[3 * count + i] = of.total;
    to[4 * count + i] = of.valid;
  }
  return array;
}

py::object softmax_stats(const py::args& args) {
  Call call(args);
  Scores& s = call.s;
  if (!call.read_sides() || !call.read_pairs() || !call.read_flag(s.any) || !call.read_flag(s.symmetric) ||
      !call.read_flag(s.totals) || !call.at_end())
    return declined();
  s.epilogue = Epilogue::softmax;
  std::vector<Statistics> queries(static_cast<size_t>(s.queries.rows)),
      keys(static_cast<size_t>(s.symmetric ? s.keys.rows : 0));
  s.query_stats = queries.data();
  s.key_stats = s.symmetric ? keys.data() : nullptr;
  call.execute();
  return py::make_tuple(as_rows(queries, s.any), s.symmetric ? py::object(as_rows(keys, s.any)) : py::none());
}

py::object softmax_grad(const py::args& args) {
  Call call(args);
  Scores& s = call.s;
  bool needs[4];
  if (!call.read_sides() || !call.read_pairs() || !call.read_flag(s.any) ||
      !call.read_vector(call.next(), kSoftmaxCoefs * s.queries.rows, s.query_coefs) ||
      !call.read_vector(call.next(), kSoftmaxCoefs * s.keys.rows, s.key_coefs) || !call.read_needs(needs) ||
      !call.at_end() || !s.query_coefs)
    return declined();
  s.epilogue = Epilogue::softmax;
  s.differentiates = true;
  double d_scale = 0;
  py::object d_queries = call.new_gradient(needs[0] || needs[2], s.queries.rows, s.d_queries);
  py::object d_keys = call.new_gradient(needs[1], s.keys.rows, s.d_keys);
  py::object d_key_bias = py::none();
  if (needs[2]) s.d_scale = &d_scale;
  if (needs[3]) {
    py::array_t<double> sums = doubles({s.keys.rows});
    s.d_key_bias = sums.mutable_data();
    std::fill_n(s.d_key_bias, s.keys.rows, 0.0);
    d_key_bias = std::move(sums);
  }
  call.execute();
  return py::make_tuple(needs[0] ? d_queries : py::none(), d_keys, d_scale, d_key_bias);
}

// ---- sigmoid --------------------------------------------------------------------------------------------------------

py::array_t<double> new_losses(Scores& s) {
  py::array_t<double> losses = doubles({s.queries.rows});
  s.losses = losses.mutable_data();
  std::fill_n(s.losses, s.queries.rows, 0.0);
  return losses;
}

py::object sigmoid_stats(const py::args& args) {
  Call call(args);
  if (!call.read_sides() || !call.read_pairs() || !call.at_end()) return declined();
  call.s.epilogue = Epilogue::sigmoid;
  py::array_t<double> losses = new_losses(call.s);
  call.execute();
  return losses;
}

py::object sigmoid_grad(const py::args& args) {
  Call call(args);
  Scores& s = call.s;
  bool needs[4];
  if (!call.read_sides() || !call.read_pairs() ||
      !call.read_vector(call.next(), int64_t{s.queries.rows}, s.query_coefs) || !call.read_needs(needs) ||
      !call.at_end() || !s.query_coefs)
    return declined();
  s.epilogue = Epilogue::sigmoid;
  s.differentiates = true;
  double d_scale = 0, d_bias = 0;
  py::array_t<double> losses = new_losses(s);
  py::object d_queries = call.new_gradient(needs[0] || needs[2], s.queries.rows, s.d_queries);
  py::object d_keys = call.new_gradient(needs[1], s.keys.rows, s.d_keys);
  std::vector<double> sums(static_cast<size_t>(needs[3] ? s.keys.rows : 0));
  if (needs[2]) s.d_scale = &d_scale;
  if (needs[3]) s.d_key_bias = sums.data();
  call.execute();
  for (const double sum : sums) d_bias += sum;
  return py::make_tuple(losses, needs[0] ? d_queries : py::none(), d_keys, d_scale, d_bias);
}

// ---- search ---------------------------------------------------------------------------------------------------------

py::object top_k(const py::args& args) {
  Call call(args);
  Scores& s = call.s;
  if (!call.read_sides() || !call.read_excluded()) return declined();
  const py::handle k = call.next();
  if (!PyLong_Check(k.ptr()) || !call.at_end()) return declined();
  s.k = PyLong_AsLongLong(k.ptr());
  if (s.k < 0 || s.k > s.keys.rows) return declined();
  s.epilogue = Epilogue::top_k;
  py::object values = call.new_rows(s.queries.rows, s.k, call.working(), s.values);
  py::array_t<int64_t> indices(std::vector<py::ssize_t>{s.queries.rows, s.k});
  s.indices = indices.mutable_data();
  call.execute();
  return py::make_tuple(values, indices);
}

// A search and its targets, of which a negative one is no key here.
bool read_targets(Call& call) {
  Scores& s = call.s;
  s.epilogue = Epilogue::rank;
  if (!call.read_sides() || !call.read_excluded() ||
      !call.read_vector(call.next(), int64_t{s.queries.rows}, s.targets) || !s.targets)
    return false;
  for (int64_t b = 0; b < s.queries.rows; ++b)
    if (s.targets[b] >= s.keys.rows) return false;
  return true;
}

bool all_here(const Scores& s) {
  return std::all_of(s.targets, s.targets + s.queries.rows, [](int64_t target) { return target >= 0; });
}

py::object target_scores(const py::args& args) {
  Call call(args);
  Scores& s = call.s;
  if (!read_targets(call) || !call.at_end() || !all_here(s)) return declined();
  py::array found = call.new_vector(s.queries.rows);
  s.target_scores = found.mutable_data();
  call.execute();
  return found;
}

py::object ranks(const py::args& args) {
  Call call(args);
  Scores& s = call.s;
  if (!read_targets(call)) return declined();
  py::array scores;
  if (call.at_end()) {
    if (!all_here(s)) return declined();
  } else {  // the scores of the targets, too
    if (!call.read_copy(call.next(), scores) || !call.at_end()) return declined();
    s.target_scores = scores.mutable_data();
  }
  py::array_t<int64_t> greater(s.queries.rows), equal(s.queries.rows);
  s.greater = greater.mutable_data();
  s.equal = equal.mutable_data();
  std::fill_n(s.greater, s.queries.rows, 0);
  std::fill_n(s.equal, s.queries.rows, 0);
  call.execute();
  return py::make_tuple(greater, equal);
}

}  // namespace

void define_scores(py::module_& m) {
  m.def("score_matrix", &score_matrix);
  m.def("score_matrix_grad", &score_matrix_grad);
  m.def("softmax_stats", &softmax_stats);
  m.def("softmax_grad", &softmax_grad);
  m.def("sigmoid_stats", &sigmoid_stats);
  m.def("sigmoid_grad", &sigmoid_grad);
  m.def("top_k", &top_k);
  m.def("target_scores", &target_scores);
  m.def("ranks", &ranks);
}

}  // namespace fusionsum
