#include "parse.h"

#include <algorithm>
#include <iterator>

#include "execute.h"
#include "torch.h"

namespace fusionsum {
namespace {

bool read_mask(py::handle object, const Array& factor, const Broadcast& b, int terms, Home& home, Operand& to) {
  if (object.is_none()) return true;
  Array mask;
  if (!read(object, home.framework, mask) || !mask.boolean || !(mask.device == home.device) || mask.ndim > factor.ndim)
    return false;
  for (int axis = mask.ndim; axis < factor.ndim; ++axis) {
    mask.shape[axis] = 1;
    mask.stride[axis] = 0;
  }
  mask.ndim = factor.ndim;
  for (int axis = 0; axis < mask.ndim; ++axis) {
    const int d = axis + b.ndim - mask.ndim;
    if (mask.shape[axis] != 1 && (mask.shape[axis] != b.size[d] || d == terms)) return false;
  }
  to.mask = static_cast<const uint8_t*>(mask.data);
  align(b, mask.ndim, mask.shape, mask.stride, -1, to.mask_stride);
  return true;
}

}  // namespace

bool read_activation(py::handle name, Activation& to) {
  if (!name.is_none() && !PyUnicode_Check(name.ptr())) return false;
  for (int i = 0; i < static_cast<int>(std::size(kActivationNames)); ++i) {
    if (name.is_none() ? i == 0 : i > 0 && PyUnicode_CompareWithASCIIString(name.ptr(), kActivationNames[i]) == 0) {
      to = static_cast<Activation>(i);
      return true;
    }
  }
  return false;
}

bool is_sequence_of(py::handle object, size_t count) {
  return (PyTuple_Check(object.ptr()) || PyList_Check(object.ptr())) && py::len(object) == count;
}

bool find_home(py::handle array, py::handle trusted, Home& home) {
  home.framework = framework_of(array);
  return home.framework == Framework::numpy ||
         (home.framework == Framework::torch && (trusted.ptr() == Py_True || !is_watched()));
}

bool read_floats(py::handle object, Home& home, Array& to) {
  if (!read(object, home.framework, to) || to.boolean || to.integer) return false;
  if (home.device.type) return to.device == home.device;
  home.device = to.device;
  return home.device.type != dlpack::kCuda || has_cuda();
}

DType promoted(const Array* arrays, int count) {
  uint32_t votes = 0;
  for (int k = 0; k < count; ++k)
    if (arrays[k].ndim) votes |= 1u << static_cast<int>(arrays[k].dtype);
  for (int i = 0; i < kDTypes; ++i)
    if (votes == 1u << i) return static_cast<DType>(i);
  return votes >> static_cast<int>(DType::f64) & 1 ? DType::f64 : DType::f32;
}

bool has_float64(const Array* arrays, int count) {
  return std::any_of(arrays, arrays + count, [](const Array& a) { return a.dtype == DType::f64; });
}

bool broadcast(const Array* arrays, int count, Broadcast& to) {
  for (int k = 0; k < count; ++k) to.ndim = std::max(to.ndim, arrays[k].ndim);
  std::fill_n(to.size, to.ndim, 1);
  for (int k = 0; k < count; ++k) {
    const Array& a = arrays[k];
    for (int axis = 0; axis < a.ndim; ++axis) {
      int64_t& size = to.size[axis + to.ndim - a.ndim];
      if (size == 1) size = a.shape[axis];
      if (a.shape[axis] != 1 && a.shape[axis] != size) return false;
    }
  }
  for (int d = 0; d < to.ndim; ++d) {
    to.empty = to.empty || to.size[d] == 0;
    if (to.size[d] == 1) continue;
    if (to.kept_dims + 1 == kMaxDims) return false;  // the planner may need one more
    to.kept[to.kept_dims++] = d;
  }
  return true;
}

bool read_dim(py::handle dim, int ndim, int& to) {
  if (!PyIndex_Check(dim.ptr()) || PyBool_Check(dim.ptr())) return false;
  const Py_ssize_t axis = PyNumber_AsSsize_t(dim.ptr(), nullptr);  // clips an integer too large: out of range below
  if (axis == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  if (axis < -ndim || axis >= ndim) return false;
  to = static_cast<int>(axis < 0 ? axis + ndim : axis);
  return true;
}

void align(const Broadcast& b, int ndim, const int64_t* shape, const int64_t* stride, int dropped, int64_t* to) {
  const int full = ndim + (dropped >= 0);
  for (int i = 0; i < b.kept_dims; ++i) {
    int axis = b.kept[i] - (b.ndim - full);
    to[i] = 0;
    if (b.kept[i] == dropped || axis < 0) continue;
    if (dropped >= 0 && b.kept[i] > dropped) --axis;
    if (shape[axis] > 1 || b.size[b.kept[i]] == 1) to[i] = stride[axis];
  }
}

void set_operand(const Broadcast& b, const Array& array, Operand& to) {
  to = Operand{};
  to.data = array.data;
  to.dtype = array.dtype;
  for (int i = 0; i < b.kept_dims; ++i) {
    const int axis = b.kept[i] - (b.ndim - array.ndim);
    if (axis >= 0 && array.shape[axis] == b.size[b.kept[i]]) to.dims |= 1u << i;
  }
  align(b, array.ndim, array.shape, array.stride, -1, to.stride);
}

py::object allocate_grad(const Broadcast& b, const Home& home, DType dtype, int ndim, const int64_t* shape, int dropped,
                         Operand& to) {
  py::object array = allocate(home.framework, home.device, dtype, ndim, shape, &to.grad);
  if (b.empty) {
    clear(array, home.device, dtype, ndim, shape, to.grad);
    return array;
  }
  int64_t stride[kMaxArrayDims], step = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    stride[d] = step;
    step *= shape[d];
  }
  align(b, ndim, shape, stride, dropped, to.grad_stride);
  return array;
}

bool read_activations(py::handle activations, int count, Operand* factors) {
  const bool one_name = activations.is_none() || PyUnicode_Check(activations.ptr());
  if (!one_name && !is_sequence_of(activations, count)) return false;
  for (int m = 0; m < count; ++m)
    if (!read_activation(one_name ? activations : item(activations, m), factors[m].activation)) return false;
  return true;
}

bool read_absent(py::handle absent, double& to) {
  if (!PyUnicode_Check(absent.ptr())) return false;
  const bool one = PyUnicode_CompareWithASCIIString(absent.ptr(), "one") == 0;
  to = one ? 1 : 0;
  return one || PyUnicode_CompareWithASCIIString(absent.ptr(), "zero") == 0;
}

bool read_masks(py::handle present, int count, const Array* arrays, const Broadcast& b, int terms, Home& home,
                Operand* factors) {
  if (present.is_none()) return true;
  if (!is_sequence_of(present, count)) return false;
  for (int m = 0; m < count; ++m)
    if (!read_mask(item(present, m), arrays[m], b, terms, home, factors[m])) return false;
  return true;
}

}  // namespace fusionsum
