// The only pybind11 file: NumPy arrays and torch tensors become a Problem (sum.h), outputs are allocated, kernels called.
//
// A call that is not wholly as it should be is declined: NotImplemented goes back, api.py finds the error and words it. So the
// checks here return false and say nothing. Torch tensors cross through the DLPack C exchange API where torch has it (>= 2.10:
// 0.1 us a tensor, no libtorch), else by their Python attributes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../cuda/cuda.h"
#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"

namespace py = pybind11;

namespace fusionsum {
namespace {

// ---- the parts of DLPack 1.x that are used, as its ABI fixes them ----------------------------------------------------------

namespace dlpack {
struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
  bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Managed {
  Version version;
  void* manager;
  void (*deleter)(Managed*);
  uint64_t flags;
  Tensor tensor;
};
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor* prototype, Managed** out, void* context, void (*set_error)(void*, const char*, const char*));
  int (*managed_from_object)(void* object, Managed** out);
  int (*to_object)(Managed* tensor, void** object);
  int (*from_object)(void* object, Tensor* out);
  int (*work_stream)(int32_t device_type, int32_t device_id, void** stream);
};
constexpr int32_t kCpu = 1, kCuda = 2, kPinned = 3;  // pinned memory is the CPU's too
constexpr uint8_t kFloat = 2, kBfloat = 4, kBool = 6;
}  // namespace dlpack

// What torch_op.py hands over once torch is imported. Types are compared exactly: subclasses have their own ideas.
struct Torch {
  PyObject *tensor = nullptr, *parameter = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
  PyObject *empty = nullptr, *strided = nullptr, *cpu = nullptr;  // without the exchange API
  PyObject *dtype[4] = {}, *boolean = nullptr;
  PyObject* watchers[3] = {};  // functions that tell what would see a call that torch makes
  PyObject *forward_ad = nullptr, *current_level = nullptr, *is_neg = nullptr;  // a module, and two names
} torch;

// The CUDA library, which backend.py loads when the first CUDA tensor arrives.
struct Cuda {
  const CudaLibrary* library = nullptr;
  PyObject* load = nullptr;  // to be called once
  bool emulated = false;     // for the tests: arrays of the CPU go to the library, which is an emulation
} cuda;

// ---- arrays ------------------------------------------------------------------------------------------------------------

constexpr int kMaxArrayDims = 32;

struct Array {
  void* data;
  dlpack::Device device;
  DType dtype;
  bool boolean;
  int ndim;
  int64_t shape[kMaxArrayDims], stride[kMaxArrayDims];  // strides in elements
  py::handle object;
};

bool numpy_dtype(const py::dtype& dtype, Array& to) {
  if (dtype.byteorder() != '=' && dtype.byteorder() != '|') return false;
  const char kind = dtype.kind();
  const auto size = dtype.itemsize();
  to.boolean = kind == 'b';
  if (kind == 'f' && size == 8) {
    to.dtype = DType::f64;
  } else if (kind == 'f' && size == 4) {
    to.dtype = DType::f32;
  } else if (kind == 'f' && size == 2) {
    to.dtype = DType::f16;
  } else if (size == 2 && !to.boolean && py::str(dtype.attr("name")).equal(py::str("bfloat16"))) {
    to.dtype = DType::bf16;
  } else {
    return to.boolean;
  }
  return true;
}

bool read_numpy(py::handle object, Array& to) {
  const auto array = py::reinterpret_borrow<py::array>(object);
  to.ndim = static_cast<int>(array.ndim());
  if (to.ndim > kMaxArrayDims || !numpy_dtype(array.dtype(), to)) return false;
  to.data = const_cast<void*>(array.data());
  to.device = {dlpack::kCpu, 0};
  const int64_t size = to.boolean ? 1 : item_size(to.dtype);
  if (reinterpret_cast<uintptr_t>(to.data) % size) return false;
  for (int d = 0; d < to.ndim; ++d) {
    to.shape[d] = array.shape(d);
    to.stride[d] = array.strides(d) / size;
    if (array.strides(d) % size) return false;
  }
  return true;
}

// Only then may there be no data: torch's _efficientzerotensor has none either.
bool is_empty(const Array& a) { return std::find(a.shape, a.shape + a.ndim, 0) != a.shape + a.ndim; }

bool read_exchange(py::handle object, Array& to) {
  dlpack::Tensor t;
  if (torch.api->from_object(object.ptr(), &t)) {
    PyErr_Clear();  // sparse and the like: api.py words the error
    return false;
  }
  to.device = t.device.type == dlpack::kCuda ? t.device : dlpack::Device{dlpack::kCpu, 0};
  if ((t.device.type != dlpack::kCpu && t.device.type != dlpack::kCuda && t.device.type != dlpack::kPinned) || t.dtype.lanes != 1 ||
      t.ndim > kMaxArrayDims) {
    return false;
  }
  to.boolean = t.dtype.code == dlpack::kBool;
  if (t.dtype.code == dlpack::kBfloat) {
    to.dtype = DType::bf16;
  } else if (t.dtype.code == dlpack::kFloat && t.dtype.bits >= 16) {
    to.dtype = t.dtype.bits == 64 ? DType::f64 : t.dtype.bits == 32 ? DType::f32 : DType::f16;
  } else if (!to.boolean) {
    return false;
  }
  to.data = static_cast<char*>(t.data) + t.byte_offset;
  to.ndim = t.ndim;
  std::copy_n(t.shape, t.ndim, to.shape);
  std::copy_n(t.strides, t.ndim, to.stride);
  return t.data || is_empty(to);
}

bool read_attributes(py::handle object, Array& to) {
  if (py::object(object.attr("layout")).ptr() != torch.strided || !py::object(object.attr("device")).equal(py::reinterpret_borrow<py::object>(torch.cpu))) return false;
  const py::object dtype = object.attr("dtype");
  to.boolean = dtype.ptr() == torch.boolean;
  const auto found = std::find(torch.dtype, torch.dtype + 4, dtype.ptr());
  if (found == torch.dtype + 4 && !to.boolean) return false;
  to.dtype = static_cast<DType>(found - torch.dtype);
  to.ndim = object.attr("ndim").cast<int>();
  if (to.ndim > kMaxArrayDims) return false;
  const py::tuple shape = object.attr("shape"), stride = object.attr("stride")();
  for (int d = 0; d < to.ndim; ++d) {
    to.shape[d] = shape[d].cast<int64_t>();
    to.stride[d] = stride[d].cast<int64_t>();
  }
  to.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  to.device = {dlpack::kCpu, 0};
  return to.data || is_empty(to);
}

enum class Framework { none, numpy, torch };

Framework framework_of(py::handle object) {
  const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  if (type == reinterpret_cast<PyObject*>(py::detail::npy_api::get().PyArray_Type_)) return Framework::numpy;
  return torch.tensor && (type == torch.tensor || type == torch.parameter) ? Framework::torch : Framework::none;
}

bool is_true(PyObject* value) {  // of a new reference; an error counts as yes
  const int truth = value ? PyObject_IsTrue(value) : 1;
  Py_XDECREF(value);
  if (PyErr_Occurred()) PyErr_Clear();
  return truth != 0;
}

bool read(py::handle object, Framework framework, Array& to) {
  if (framework_of(object) != framework) return false;
  to.object = object;
  // A view that owes a sign (z.conj().imag) is not as it says; DLPack does not tell.
  if (framework == Framework::torch && is_true(PyObject_CallMethodNoArgs(object.ptr(), torch.is_neg))) return false;
  return framework == Framework::numpy ? read_numpy(object, to) : torch.api ? read_exchange(object, to) : read_attributes(object, to);
}

py::object allocate_exchange(dlpack::Device device, DType dtype, int ndim, const int64_t* shape, void** data) {
  int64_t sizes[kMaxArrayDims];
  std::copy_n(shape, ndim, sizes);
  dlpack::Tensor prototype{};
  prototype.device = device;
  prototype.ndim = ndim;
  prototype.dtype.code = dtype == DType::bf16 ? dlpack::kBfloat : dlpack::kFloat;
  prototype.dtype.bits = static_cast<uint8_t>(item_size(dtype) * 8);
  prototype.dtype.lanes = 1;
  prototype.shape = sizes;
  dlpack::Managed* managed = nullptr;
  const auto set_error = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_MemoryError, message); };
  void* object = nullptr;
  if (torch.api->allocate(&prototype, &managed, nullptr, set_error)) throw py::error_already_set();
  *data = static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
  if (torch.api->to_object(managed, &object)) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

// A new contiguous array. `like` has its dtype, where that is one NumPy does not know by itself.
py::object allocate(Framework framework, DType dtype, int ndim, const int64_t* shape, const Array& like, void** data) {
  if (framework == Framework::torch && torch.api) return allocate_exchange(like.device, dtype, ndim, shape, data);
  if (framework == Framework::torch) {
    py::tuple sizes(ndim);
    for (int d = 0; d < ndim; ++d) sizes[d] = shape[d];
    py::object tensor = py::reinterpret_borrow<py::object>(torch.empty)(
        sizes, py::arg("dtype") = py::handle(torch.dtype[static_cast<int>(dtype)]), py::arg("device") = py::handle(torch.cpu));
    *data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    return tensor;
  }
  const py::dtype numpy_dtype = dtype == DType::f64   ? py::dtype(py::detail::npy_api::NPY_DOUBLE_)
                                : dtype == DType::f32 ? py::dtype(py::detail::npy_api::NPY_FLOAT_)
                                : dtype == like.dtype ? py::reinterpret_borrow<py::array>(like.object).dtype()
                                                      : py::dtype("float16");
  py::array array(numpy_dtype, std::vector<py::ssize_t>(shape, shape + ndim));
  *data = array.mutable_data();
  return array;
}

bool is_sequence_of(py::handle object, size_t count) {
  return (PyTuple_Check(object.ptr()) || PyList_Check(object.ptr())) && py::len(object) == count;
}

py::handle item(py::handle sequence, size_t i) { return PySequence_Fast_GET_ITEM(sequence.ptr(), static_cast<Py_ssize_t>(i)); }

// Is anything watching that a direct call would go past: a functorch transform, a dispatch mode, a trace, forward AD? Whether
// autograd is, torch_op.py asks. 0.2 us from here, 0.5 from Python.
bool watched() {
  for (PyObject* watcher : torch.watchers)
    if (!watcher || is_true(PyObject_CallNoArgs(watcher))) return true;
  const auto level = py::reinterpret_steal<py::object>(PyObject_GetAttr(torch.forward_ad, torch.current_level));
  return !level || PyLong_AsLong(level.ptr()) >= 0;
}

// ---- a call ----------------------------------------------------------------------------------------------------------------

constexpr const char* kActivations[] = {  // as enum Activation
    nullptr,
#define NAME(name) #name,
    FUSIONSUM_ACTIVATIONS(NAME)
#undef NAME
};

bool read_activation(py::handle name, Activation& to) {
  if (!name.is_none() && !PyUnicode_Check(name.ptr())) return false;
  for (int i = 0; i < static_cast<int>(std::size(kActivations)); ++i) {
    if (name.is_none() ? i == 0 : i > 0 && PyUnicode_CompareWithASCIIString(name.ptr(), kActivations[i]) == 0) {
      to = static_cast<Activation>(i);
      return true;
    }
  }
  return false;
}

struct Call {
  Framework framework;
  Array given[kMaxOperands];  // 0: grad_output, where there is one; then the weights, if any; then the factors
  int operands = 1, factors_from = 1;
  DType output_dtype;
  int ndim = 0;                // of the broadcast shape
  int64_t size[kMaxArrayDims];
  int sum_dim;
  int output_ndim;
  int64_t output_shape[kMaxArrayDims];
  int kept[kMaxArrayDims];     // the broadcast dims that the problem has, those of size > 1
  bool empty = false;
  Problem problem;

  dlpack::Device device() const { return given[1].device; }
  bool on_cuda() const { return device().type == dlpack::kCuda; }
};

// The strides of one array, or of a new contiguous one of its shape, along the problem's dims. `skipped` is a broadcast dim
// that the array does not have (the summed dim, of the output).
void align(const Call& c, int ndim, const int64_t* shape, const int64_t* stride, int skipped, int64_t* to) {
  const int full = ndim + (skipped >= 0);
  for (int i = 0; i < c.problem.ndim; ++i) {
    int axis = c.kept[i] - (c.ndim - full);
    to[i] = 0;
    if (c.kept[i] == skipped || axis < 0) continue;
    if (skipped >= 0 && c.kept[i] > skipped) --axis;
    if (shape[axis] > 1 || c.size[c.kept[i]] == 1) to[i] = stride[axis];
  }
}

void contiguous(int ndim, const int64_t* shape, int64_t* stride) {
  int64_t step = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    stride[d] = step;
    step *= shape[d];
  }
}

uint32_t dims_of(const Call& c, const Array& a) {
  uint32_t dims = 0;
  for (int i = 0; i < c.problem.ndim; ++i) {
    const int axis = c.kept[i] - (c.ndim - a.ndim);
    if (axis >= 0 && a.shape[axis] == c.size[c.kept[i]]) dims |= 1u << i;
  }
  return dims;
}

// Along the dims of one factor, from the first on.
bool read_mask(Call& c, py::handle object, int k) {
  if (object.is_none()) return true;
  Array mask;
  const Array& factor = c.given[k];
  if (!read(object, c.framework, mask) || !mask.boolean || !(mask.device == c.device()) || mask.ndim > factor.ndim) return false;
  for (int axis = mask.ndim; axis < factor.ndim; ++axis) {
    mask.shape[axis] = 1;
    mask.stride[axis] = 0;
  }
  mask.ndim = factor.ndim;
  for (int axis = 0; axis < mask.ndim; ++axis) {
    const int d = axis + c.ndim - mask.ndim;
    if (mask.shape[axis] != 1 && (mask.shape[axis] != c.size[d] || d == c.sum_dim)) return false;
  }
  c.problem.operand[k].mask = static_cast<const uint8_t*>(mask.data);
  align(c, mask.ndim, mask.shape, mask.stride, -1, c.problem.operand[k].mask_stride);
  return true;
}

bool has_cuda() {
  if (!cuda.library && cuda.load) {
    const auto load = py::reinterpret_steal<py::object>(cuda.load);
    cuda.load = nullptr;  // once
    load();
  }
  return cuda.library;
}

bool parse(Call& c, py::handle grad_output, py::handle weights, py::handle factors, py::handle activations, py::handle present,
           py::handle absent, py::handle dim, py::handle trusted) {
  if (!PyTuple_Check(factors.ptr())) return false;
  const size_t count = py::len(factors);
  if (count < 1 || count > kMaxFactors) return false;
  c.framework = framework_of(item(factors, 0));
  if (c.framework == Framework::none || (c.framework == Framework::torch && trusted.ptr() != Py_True && watched())) return false;
  const auto read_floats = [&](py::handle object, Array& to) { return read(object, c.framework, to) && !to.boolean; };
  if (!weights.is_none() && !read_floats(weights, c.given[c.operands++])) return false;
  c.factors_from = c.operands;
  for (size_t m = 0; m < count; ++m)
    if (!read_floats(item(factors, m), c.given[c.operands++])) return false;
  for (int k = 2; k < c.operands; ++k)
    if (!(c.given[k].device == c.device())) return false;
  if (c.on_cuda() && !has_cuda()) return false;

  // The broadcast shape and the dtypes. Operands of no dims have no say in the output's dtype unless all are such.
  for (int k = 1; k < c.operands; ++k) c.ndim = std::max(c.ndim, c.given[k].ndim);
  std::fill_n(c.size, c.ndim, 1);
  bool voted[4] = {}, any[4] = {};
  for (int k = 1; k < c.operands; ++k) {
    const Array& a = c.given[k];
    any[static_cast<int>(a.dtype)] = true;
    if (a.ndim) voted[static_cast<int>(a.dtype)] = true;
    for (int axis = 0; axis < a.ndim; ++axis) {
      int64_t& size = c.size[axis + c.ndim - a.ndim];
      if (size == 1) size = a.shape[axis];
      if (a.shape[axis] != 1 && a.shape[axis] != size) return false;
    }
  }
  if (std::count(voted, voted + 4, true) == 1) {
    c.output_dtype = static_cast<DType>(std::find(voted, voted + 4, true) - voted);
  } else {
    c.output_dtype = voted[0] ? DType::f64 : DType::f32;
  }

  if (!PyIndex_Check(dim.ptr()) || PyBool_Check(dim.ptr())) return false;
  const Py_ssize_t axis = PyNumber_AsSsize_t(dim.ptr(), nullptr);  // what is too large is clipped, and out of range below
  if (axis == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  if (axis < -c.ndim || axis >= c.ndim) return false;
  c.sum_dim = static_cast<int>(axis < 0 ? axis + c.ndim : axis);
  c.output_ndim = 0;
  for (int d = 0; d < c.ndim; ++d)
    if (d != c.sum_dim) c.output_shape[c.output_ndim++] = c.size[d];

  Problem& p = c.problem;
  p.ndim = 0;
  p.sum_dim = -1;
  for (int d = 0; d < c.ndim; ++d) {
    c.empty = c.empty || c.size[d] == 0;
    if (c.size[d] == 1) continue;
    if (p.ndim + 1 == kMaxDims) return false;  // the planner may need one more
    if (d == c.sum_dim) p.sum_dim = p.ndim;
    p.size[p.ndim] = c.size[d];
    c.kept[p.ndim++] = d;
  }
  if (p.ndim == 0) {  // one entry: the loop is over its single term
    p.sum_dim = 0;
    p.size[0] = 1;
    c.kept[p.ndim++] = c.sum_dim;
  }

  p.operands = c.operands;
  p.wide = any[0];
  Operand& u = p.operand[0];
  u = Operand{};
  u.dtype = c.output_dtype;
  u.dims = (1u << p.ndim) - 1;
  if (p.sum_dim >= 0) u.dims &= ~(1u << p.sum_dim);
  if (!grad_output.is_none()) {
    Array& g = c.given[0];
    if (!read_floats(grad_output, g) || !(g.device == c.device()) || g.ndim != c.output_ndim) return false;
    if (!std::equal(g.shape, g.shape + g.ndim, c.output_shape)) return false;
    u.data = g.data;
    u.dtype = g.dtype;
    p.wide = p.wide || g.dtype == DType::f64;
    align(c, g.ndim, g.shape, g.stride, c.sum_dim, u.stride);
  }
  for (int k = 1; k < c.operands; ++k) {
    Operand& o = p.operand[k];
    const Array& a = c.given[k];
    o = Operand{};
    o.data = a.data;
    o.dtype = a.dtype;
    o.dims = dims_of(c, a);
    align(c, a.ndim, a.shape, a.stride, -1, o.stride);
  }

  const bool one_name = activations.is_none() || PyUnicode_Check(activations.ptr());
  if (!one_name && !is_sequence_of(activations, count)) return false;
  for (size_t m = 0; m < count; ++m)
    if (!read_activation(one_name ? activations : item(activations, m), p.operand[c.factors_from + m].activation)) return false;

  if (!PyUnicode_Check(absent.ptr())) return false;
  const bool one = PyUnicode_CompareWithASCIIString(absent.ptr(), "one") == 0;
  if (!one && PyUnicode_CompareWithASCIIString(absent.ptr(), "zero") != 0) return false;
  p.absent = one ? 1 : 0;
  if (present.is_none()) return true;
  if (!is_sequence_of(present, count)) return false;
  for (size_t m = 0; m < count; ++m)
    if (!read_mask(c, item(present, m), c.factors_from + static_cast<int>(m))) return false;
  return true;
}

bool ctrl_c() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// Queued on torch's current stream. The workspace goes back to torch's allocator at once: it gives the memory out again to what
// comes later on the same stream.
void carry_out_cuda(const Call& c) {
  struct Workspace {
    dlpack::Device device;
    py::object tensor;
    std::vector<double> emulated;
  } workspace{c.device(), py::none(), {}};
  const auto allocate = [](void* context, int64_t bytes) -> void* {
    Workspace& workspace = *static_cast<Workspace*>(context);
    const int64_t entries = (bytes + 7) / 8;
    if (workspace.device.type != dlpack::kCuda) {
      workspace.emulated.resize(static_cast<size_t>(entries));
      return workspace.emulated.data();
    }
    void* data;
    workspace.tensor = allocate_exchange(workspace.device, DType::f64, 1, &entries, &data);
    return data;
  };
  void* stream = nullptr;
  if (c.on_cuda() && torch.api->work_stream(c.device().type, c.device().id, &stream)) throw py::error_already_set();
  if (const char* error = cuda.library->run(&c.problem, c.device().id, stream, allocate, &workspace)) throw std::runtime_error(error);
}

void carry_out(const Call& c) {
  if (c.on_cuda() || cuda.emulated) return carry_out_cuda(c);
  int64_t entries = 1;
  for (int i = 0; i < c.problem.ndim; ++i) entries *= c.problem.size[i];
  Workspace workspace;
  bool done;
  if (entries < (1 << 14)) {  // a few microseconds: less than letting go of the GIL may cost
    done = execute(c.problem, active_isa().sum, workspace, [] { return false; });
  } else {
    py::gil_scoped_release no_gil;
    done = execute(c.problem, active_isa().sum, workspace, ctrl_c);
  }
  if (!done) throw py::error_already_set();
}

// A sum of nothing.
void clear(const Call& c, const py::object& array, void* data, int64_t bytes) {
  if (c.on_cuda()) {
    array.attr("zero_")();
  } else {
    std::memset(data, 0, static_cast<size_t>(bytes));
  }
}

py::object declined() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

py::object fusion_sum(py::handle weights, py::handle factors, py::handle activations, py::handle present, py::handle absent,
                      py::handle dim, py::handle trusted) {
  Call c;
  if (!parse(c, py::none(), weights, factors, activations, present, absent, dim, trusted)) return declined();
  Operand& u = c.problem.operand[0];
  const Array* like = &c.given[1];
  for (int k = 1; k < c.operands; ++k)
    if (c.given[k].dtype == c.output_dtype) like = &c.given[k];
  py::object output = allocate(c.framework, c.output_dtype, c.output_ndim, c.output_shape, *like, &u.grad);
  int64_t entries = 1, stride[kMaxArrayDims];
  for (int d = 0; d < c.output_ndim; ++d) entries *= c.output_shape[d];
  if (c.empty) {
    clear(c, output, u.grad, entries * item_size(c.output_dtype));
  } else {
    contiguous(c.output_ndim, c.output_shape, stride);
    align(c, c.output_ndim, c.output_shape, stride, c.sum_dim, u.grad_stride);
    carry_out(c);
  }
  return c.framework == Framework::numpy && c.output_ndim == 0 ? py::object(output[py::tuple()]) : output;
}

py::object fusion_sum_grad(py::handle grad_output, py::handle weights, py::handle factors, py::handle activations,
                           py::handle present, py::handle absent, py::handle dim, py::handle needs, py::handle trusted) {
  Call c;
  if (grad_output.is_none() || !parse(c, grad_output, weights, factors, activations, present, absent, dim, trusted)) return declined();
  const size_t count = 1 + py::len(factors);  // the weights' place is there even where they are None
  if (!is_sequence_of(needs, count)) return declined();
  py::tuple grads(count);
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    const int k = static_cast<int>(i) + c.factors_from - 1;
    grads[i] = py::none();
    if (k < 1 || PyObject_IsTrue(item(needs, i).ptr()) != 1) continue;
    const Array& a = c.given[k];
    Operand& o = c.problem.operand[k];
    grads[i] = allocate(c.framework, a.dtype, a.ndim, a.shape, a, &o.grad);
    any = true;
    int64_t entries = 1, stride[kMaxArrayDims];
    for (int d = 0; d < a.ndim; ++d) entries *= a.shape[d];
    if (c.empty) {
      clear(c, grads[i], o.grad, entries * item_size(a.dtype));
    } else {
      contiguous(a.ndim, a.shape, stride);
      align(c, a.ndim, a.shape, stride, -1, o.grad_stride);
    }
  }
  if (any && !c.empty) carry_out(c);
  return grads;
}

// ---- what torch_op.py hands over -----------------------------------------------------------------------------------------

void use_torch(py::object module, py::object parallel_for, py::object num_threads, py::object load_cuda) {
  const auto keep = [](py::object object) { return object.release().ptr(); };  // as long as the process
  torch.tensor = keep(module.attr("Tensor"));
  torch.parameter = keep(module.attr("nn").attr("Parameter"));
  if (py::hasattr(module.attr("Tensor"), "__dlpack_c_exchange_api__")) {
    const py::object capsule = module.attr("Tensor").attr("__dlpack_c_exchange_api__");
    const auto api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->version.major == 1 && api->from_object) torch.api = api;
  }
  torch.empty = keep(module.attr("empty"));
  torch.strided = keep(module.attr("strided"));
  torch.cpu = keep(module.attr("device")("cpu"));
  const char* names[] = {"float64", "float32", "bfloat16", "float16"};
  for (int i = 0; i < 4; ++i) torch.dtype[i] = keep(module.attr(names[i]));
  torch.boolean = keep(module.attr("bool"));
  const py::object c = module.attr("_C");
  const char* watchers[] = {"_are_functorch_transforms_active", "_len_torch_dispatch_stack", "_is_tracing"};
  for (size_t i = 0; i < std::size(watchers); ++i)
    if (py::hasattr(c, watchers[i])) torch.watchers[i] = keep(c.attr(watchers[i]));
  torch.forward_ad = keep(module.attr("autograd").attr("forward_ad"));
  torch.is_neg = keep(py::str("is_neg"));
  torch.current_level = keep(py::str("_current_level"));
  cuda.load = keep(std::move(load_cuda));
  if (!parallel_for.is_none())
    use_torch_pool(reinterpret_cast<void*>(parallel_for.cast<uintptr_t>()), reinterpret_cast<void*>(num_threads.cast<uintptr_t>()));
}

// Takes the address of fusionsum_cuda (cuda/cuda.h). Returns why it cannot be used, or None. With `emulated`, for the tests, it
// takes the CPU's arrays; an address of 0 ends that.
py::object use_cuda(uintptr_t address, bool emulated) {
  cuda.library = address ? reinterpret_cast<decltype(&fusionsum_cuda)>(address)() : nullptr;
  cuda.emulated = emulated && cuda.library;
  const char* const reason = cuda.library ? cuda.library->unavailable() : nullptr;
  if (!reason) return py::none();
  cuda.library = nullptr;
  return py::str(reason);
}

// For the tests: the road that torch < 2.10 takes.
void forget_exchange_api() { torch.api = nullptr; }

}  // namespace
}  // namespace fusionsum

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  using namespace fusionsum;
  m.def("fusion_sum", &fusion_sum);
  m.def("fusion_sum_grad", &fusion_sum_grad);
  m.def("isa", [] { return active_isa().name; });
  m.def("isas", [] {
    py::list all;
    for (const auto& [name, runs_here] : isas()) all.append(py::make_tuple(name, runs_here));
    return all;
  });
  m.def("thread_backend", [] { return uses_torch_pool() ? "torch" : "own"; });
  m.def("set_num_threads", &set_num_threads);
  m.def("get_num_threads", &get_num_threads);
  m.def("use_torch", &use_torch);
  m.def("use_cuda", &use_cuda);
  m.def("forget_exchange_api", &forget_exchange_api);
}
