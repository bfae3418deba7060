#include "torch.h"

#include <algorithm>
#include <iterator>

#include "../cpu/parallel.h"
#include "../cpu/work.h"
#include "execute.h"

namespace fusionsum {
namespace {

struct Torch {  // objects live as long as the process
  PyObject *tensor = nullptr, *parameter = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* watchers[3] = {};                                                   // functions
  PyObject *forward_ad = nullptr, *current_level = nullptr, *is_neg = nullptr;  // a module, and two names
  PyObject* module = nullptr;
} torch;

const dlpack::ExchangeApi* exchange_api(const py::object& module) {
  const py::object capsule = py::getattr(module.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
  if (!capsule.is_none()) {
    const auto api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->version.major == 1 && api->from_object) return api;
  }
  throw py::import_error(
      "fusionsum needs torch >= 2.10, whose tensors have the DLPack C exchange API 1.x; this is torch " +
      py::str(py::getattr(module, "__version__", py::str("of no version"))).cast<std::string>());
}

dlpack::Type dlpack_type(DType dtype) {
  return {dtype == DType::bf16 ? dlpack::kBfloat : dlpack::kFloat, static_cast<uint8_t>(item_size(dtype) * 8), 1};
}

// Only then may there be no data: torch's _efficientzerotensor has none either.
bool is_empty(const Array& a) { return std::find(a.shape, a.shape + a.ndim, 0) != a.shape + a.ndim; }

bool is_true(PyObject* value) {  // of a new reference; an error counts as yes
  const int truth = value ? PyObject_IsTrue(value) : 1;
  Py_XDECREF(value);
  if (PyErr_Occurred()) PyErr_Clear();
  return truth != 0;
}

}  // namespace

void use_torch(py::object module, py::object parallel_for, py::object num_threads, py::object load_cuda) {
  const dlpack::ExchangeApi* const api = exchange_api(module);
  const auto keep = [](py::object object) { return object.release().ptr(); };
  const py::object c = module.attr("_C");
  const char* watchers[] = {"_are_functorch_transforms_active", "_len_torch_dispatch_stack", "_is_tracing"};
  for (size_t i = 0; i < std::size(watchers); ++i)
    if (py::hasattr(c, watchers[i])) torch.watchers[i] = keep(c.attr(watchers[i]));
  torch.forward_ad = keep(module.attr("autograd").attr("forward_ad"));
  torch.current_level = keep(py::str("_current_level"));
  torch.is_neg = keep(py::str("is_neg"));
  torch.api = api;
  torch.parameter = keep(module.attr("nn").attr("Parameter"));
  torch.tensor = keep(module.attr("Tensor"));
  torch.module = keep(module);
  load_cuda_by(std::move(load_cuda));
  if (!parallel_for.is_none())
    use_torch_pool(reinterpret_cast<void*>(parallel_for.cast<uintptr_t>()),
                   reinterpret_cast<void*>(num_threads.cast<uintptr_t>()));
}

bool is_tensor(py::handle object) {
  const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return torch.tensor && (type == torch.tensor || type == torch.parameter);
}

bool read_tensor(py::handle object, Array& to) {
  // The memory of some views (z.conj().imag) holds the values with the other sign: is_neg() says so, DLPack does not.
  if (is_true(PyObject_CallMethodNoArgs(object.ptr(), torch.is_neg))) return false;
  dlpack::Tensor t;
  if (torch.api->from_object(object.ptr(), &t)) {
    PyErr_Clear();  // sparse and the like: api.py words the error
    return false;
  }
  to.device = t.device.type == dlpack::kCuda ? t.device : dlpack::Device{dlpack::kCpu, 0};
  if ((t.device.type != dlpack::kCpu && t.device.type != dlpack::kCuda && t.device.type != dlpack::kPinned) ||
      t.ndim > kMaxArrayDims) {
    return false;
  }
  to.boolean = t.type.code == dlpack::kBool && t.type.lanes == 1;
  to.integer = t.type == dlpack::Type{dlpack::kInt, 64, 1};
  to.dtype = DType{};
  if (!to.boolean && !to.integer) {
    int i = 0;
    while (i < kDTypes && !(dlpack_type(static_cast<DType>(i)) == t.type)) ++i;
    if (i == kDTypes) return false;
    to.dtype = static_cast<DType>(i);
  }
  to.data = static_cast<char*>(t.data) + t.byte_offset;
  to.ndim = t.ndim;
  std::copy_n(t.shape, t.ndim, to.shape);
  std::copy_n(t.strides, t.ndim, to.stride);
  return t.data || is_empty(to);
}

// By torch.empty, as its own operations: record_stream, resize_ and the trees of CUDA graphs take no notice of memory
// that came through DLPack, or refuse it.
py::object allocate_on_gpu(dlpack::Device device, DType dtype, int ndim, const int64_t* shape, void** data) {
  const py::handle module(torch.module);
  py::tuple sizes(ndim);
  for (int d = 0; d < ndim; ++d) sizes[static_cast<size_t>(d)] = shape[d];
  py::object tensor = module.attr("empty")(sizes, py::arg("dtype") = module.attr(kDTypeNames[static_cast<int>(dtype)]),
                                           py::arg("device") = module.attr("device")("cuda", device.id));
  dlpack::Tensor t;
  if (torch.api->from_object(tensor.ptr(), &t)) throw py::error_already_set();
  *data = static_cast<char*>(t.data) + t.byte_offset;
  return tensor;
}

// From so many bytes on, glibc's malloc maps each block anew: the system clears its pages, and nothing else will lie
// there. NumPy asks for huge pages for its arrays, torch does not.
constexpr int64_t kMapped = int64_t{32} << 20;

py::object allocate_tensor(dlpack::Device device, DType dtype, int ndim, const int64_t* shape, void** data) {
  if (device.type == dlpack::kCuda) return allocate_on_gpu(device, dtype, ndim, shape, data);
  int64_t sizes[kMaxArrayDims];
  std::copy_n(shape, ndim, sizes);
  dlpack::Tensor prototype{};
  prototype.device = device;
  prototype.ndim = ndim;
  prototype.type = dlpack_type(dtype);
  prototype.shape = sizes;
  dlpack::Managed* managed = nullptr;
  const auto set_error = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_MemoryError, message); };
  void* object = nullptr;
  if (torch.api->allocate(&prototype, &managed, nullptr, set_error)) throw py::error_already_set();
  *data = static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
  if (const int64_t bytes = bytes_of(dtype, ndim, shape); bytes >= kMapped) ask_for_huge_pages(*data, bytes);
  if (torch.api->to_object(managed, &object)) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

void* current_stream(dlpack::Device device) {
  void* stream = nullptr;
  if (torch.api->work_stream(device.type, device.id, &stream)) throw py::error_already_set();
  return stream;
}

OnDevice::OnDevice(dlpack::Device device)
    : before_(py::handle(torch.module).attr("_C").attr("_cuda_exchangeDevice")(device.id).cast<int>()) {}

OnDevice::~OnDevice() {
  const py::error_scope kept;  // of an exception that passes
  try {
    py::handle(torch.module).attr("_C").attr("_cuda_maybeExchangeDevice")(before_);
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("torch._C._cuda_maybeExchangeDevice");
  }
}

bool is_watched() {
  for (PyObject* watcher : torch.watchers)
    if (!watcher || is_true(PyObject_CallNoArgs(watcher))) return true;
  const auto level = py::reinterpret_steal<py::object>(PyObject_GetAttr(torch.forward_ad, torch.current_level));
  return !level || PyLong_AsLong(level.ptr()) >= 0;
}

}  // namespace fusionsum
