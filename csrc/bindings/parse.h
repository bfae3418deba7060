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

// Sets the framework, that of one of the call's arrays. False also where torch watches the call (torch.h), unless
// `trusted` says that the caller has dealt with the watchers.
bool find_home(py::handle array, py::handle trusted, Home& home);

// Reads an array of floats of the call's framework and device; the first one that is read sets the device.
bool read_floats(py::handle object, Home& home, Array& to);

// The dtype of arrays together: that of all arrays with dims; where these differ, float32, or float64 where one is.
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

// Reads the number of a dim, of `ndim`, which may be counted from the end.
bool read_dim(py::handle dim, int ndim, int& to);

// Writes to `to` an array's strides along the kept dims, 0 where the array is broadcast. `dropped` is a broadcast dim
// that the array's shape lacks, as an output's lacks the summed dim; or -1.
void align(const Broadcast& b, int ndim, const int64_t* shape, const int64_t* stride, int dropped, int64_t* to);

// Sets the data, dtype, dims and strides of an operand, and clears the rest of it.
void set_operand(const Broadcast& b, const Array& array, Operand& to);

// A new array for the operand's derivative; its entries are set, to zero, only where the broadcast shape is empty.
py::object allocate_grad(const Broadcast& b, const Home& home, DType dtype, int ndim, const int64_t* shape, int dropped,
                         Operand& to);

// ---- options of factors ---------------------------------------------------------------------------------------------

// Reads None or a name.
bool read_activation(py::handle name, Activation& to);

// Sets the factors' activations: `activations` is None or a name for all, or a sequence with one for each.
bool read_activations(py::handle activations, int count, Operand* factors);

// Reads "one" or "zero" as a number.
bool read_absent(py::handle absent, double& to);

// Sets the factors' masks: `present` is None, or a sequence with None or, for each factor, a mask along the factor's
// leading dims. A mask may not vary along the broadcast dim `terms`.
bool read_masks(py::handle present, int count, const Array* arrays, const Broadcast& b, int terms, Home& home,
                Operand* factors);

}  // namespace fusionsum
