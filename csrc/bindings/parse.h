// What every operation reads from its arguments in the same way: arrays of one framework and device, their broadcast
// shape, the dtype they promote to, a dim, activations, presence masks.
//
// All functions that read return false, and say nothing, for an argument that is not wholly as it should be: the
// operation then returns NotImplemented, and api.py finds the error and words it.
//
// What lives elsewhere: one array (arrays.h), which arguments an operation has and the problem it makes of them
// (sum.cpp).
#pragma once
#include "arrays.h"

namespace fusionsum {

constexpr const char* kActivationNames[] = {  // as enum Activation
    nullptr,
#define NAME(name) #name,
    FUSIONSUM_ACTIVATIONS(NAME)
#undef NAME
};

inline py::object declined() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

// ---- sequences ------------------------------------------------------------------------------------------------------

bool is_sequence_of(py::handle object, size_t count);  // a tuple or a list of so many
inline py::handle item(py::handle sequence, size_t i) {
  return PySequence_Fast_GET_ITEM(sequence.ptr(), static_cast<Py_ssize_t>(i));
}

// ---- arrays ---------------------------------------------------------------------------------------------------------

// What the arrays of a call have in common.
struct Home {
  Framework framework;
  dlpack::Device device{0, 0};  // none, before the first array is read
};

// The framework, by one of the arrays. False where torch watches the call, unless it is `trusted`: the caller has seen
// to that.
bool find_home(py::handle array, py::handle trusted, Home& home);

// An array of floats that is at home there; the first that is read says on which device that is.
bool read_floats(py::handle object, Home& home, Array& to);

// The dtype of arrays together. Arrays of no dims have no say unless all are such; mixed ones promote to float32, or
// float64 where one is.
DType promoted(const Array* arrays, int count);
bool has_float64(const Array* arrays, int count);

// ---- shapes ---------------------------------------------------------------------------------------------------------

// The shape to which arrays broadcast; and of its dims those that a problem keeps, of size != 1.
struct Broadcast {
  int ndim = 0;
  int64_t size[kMaxArrayDims];
  int kept_dims = 0, kept[kMaxDims];
  bool empty = false;  // some size is 0
};

bool broadcast(const Array* arrays, int count, Broadcast& to);

// A dim of a shape, which may be counted from the end.
bool read_dim(py::handle dim, int ndim, int& to);

// The strides along the kept dims, of an array whose shape broadcasts, or would with dim `dropped` put back (-1: none
// is missing).
void align(const Broadcast& b, int ndim, const int64_t* shape, const int64_t* stride, int dropped, int64_t* to);

// The data, dtype, dims and strides of an operand; the rest of it is cleared.
void set_operand(const Broadcast& b, const Array& array, Operand& to);

// A new array for the operand's derivative, zero where the broadcast shape is empty.
py::object allocate_grad(const Broadcast& b, const Home& home, DType dtype, int ndim, const int64_t* shape, int dropped,
                         Operand& to);

// ---- options of factors ---------------------------------------------------------------------------------------------

// None or a name for all factors, or one for each.
bool read_activations(py::handle activations, int count, Operand* factors);

// "one" or "zero", as the number.
bool read_absent(py::handle absent, double& to);

// None or, for each factor, None or a mask along its leading dims, not along broadcast dim `terms`.
bool read_masks(py::handle present, int count, const Array* arrays, const Broadcast& b, int terms, Home& home,
                Operand* factors);

}  // namespace fusionsum
