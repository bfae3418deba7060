// NumPy's arrays, and the choice between them and torch's.
#include "arrays.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "torch.h"

namespace fusionsum {
namespace {

// NumPy's type numbers, plus one, of the dtypes that it has been seen to use, and of bool: 0 until the first. The name
// of a dtype costs microseconds to ask for, its number nothing; and bfloat16's, which ml_dtypes registers, is no
// constant.
std::atomic<int> type_number[kDTypes + 1];

// Puts the dtype into `to`; false where it is not in the list.
bool read_dtype(const py::dtype& dtype, Array& to) {
  const int number = dtype.num();
  if (number < 0 || (dtype.byteorder() != '=' && dtype.byteorder() != '|')) return false;
  const auto is = [&](int i) {
    to.boolean = i == kDTypes;
    to.integer = false;
    to.dtype = to.boolean ? DType{} : static_cast<DType>(i);
    return true;
  };
  for (int i = 0; i <= kDTypes; ++i)
    if (type_number[i].load(std::memory_order_relaxed) == number + 1) return is(i);
  const std::string name = py::str(dtype.attr("name"));
  for (int i = 0; i <= kDTypes; ++i) {
    if (name != (i < kDTypes ? kDTypeNames[i] : "bool")) continue;
    if (dtype.itemsize() != (i < kDTypes ? item_size(static_cast<DType>(i)) : 1)) return false;
    type_number[i].store(number + 1, std::memory_order_relaxed);
    return is(i);
  }
  return false;
}

bool read_numpy(py::handle object, Array& to) {
  const auto array = py::reinterpret_borrow<py::array>(object);
  to.ndim = static_cast<int>(array.ndim());
  if (to.ndim > kMaxArrayDims || !read_dtype(array.dtype(), to)) return false;
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

// As py::array's constructor, without the two vectors that it makes for shape and strides: 0.03 us less.
py::object allocate_numpy(DType dtype, int ndim, const int64_t* shape, void** data) {
  const int number = type_number[static_cast<int>(dtype)].load(std::memory_order_relaxed) - 1;
  py::dtype type = number >= 0 ? py::dtype(number) : py::dtype(kDTypeNames[static_cast<int>(dtype)]);
  Py_intptr_t sizes[kMaxArrayDims];
  std::copy_n(shape, ndim, sizes);
  const auto& numpy = py::detail::npy_api::get();
  auto array = py::reinterpret_steal<py::array>(numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, type.release().ptr(),
                                                                            ndim, sizes, nullptr, nullptr, 0, nullptr));
  if (!array) throw py::error_already_set();
  *data = array.mutable_data();
  return array;
}

}  // namespace

Framework framework_of(py::handle object) {
  if (Py_TYPE(object.ptr()) == py::detail::npy_api::get().PyArray_Type_) return Framework::numpy;
  return is_tensor(object) ? Framework::torch : Framework::none;
}

bool read(py::handle object, Framework framework, Array& to) {
  if (framework_of(object) != framework) return false;
  return framework == Framework::numpy ? read_numpy(object, to) : read_tensor(object, to);
}

py::object allocate(Framework framework, dlpack::Device device, DType dtype, int ndim, const int64_t* shape,
                    void** data) {
  if (framework == Framework::torch) return allocate_tensor(device, dtype, ndim, shape, data);
  return allocate_numpy(dtype, ndim, shape, data);
}

int64_t bytes_of(DType dtype, int ndim, const int64_t* shape) {
  int64_t bytes = item_size(dtype);
  for (int d = 0; d < ndim; ++d) bytes *= shape[d];
  return bytes;
}

void clear(const py::object& array, dlpack::Device device, DType dtype, int ndim, const int64_t* shape, void* data) {
  if (device.type == dlpack::kCuda) {
    array.attr("zero_")();
  } else {
    std::memset(data, 0, static_cast<size_t>(bytes_of(dtype, ndim, shape)));
  }
}

}  // namespace fusionsum
