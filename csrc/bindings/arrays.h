// An array of either framework as the bindings see it: where it lies, its shape and its strides; reading, allocating
// and clearing arrays.
//
// What lives here: the struct, and NumPy's side (arrays.cpp). What lives elsewhere: torch's side (torch.h), what a call
// makes of its arrays (parse.h).
#pragma once
#include <pybind11/pybind11.h>

#include "../space.h"
#include "dlpack.h"

namespace fusionsum {

namespace py = pybind11;

constexpr int kMaxArrayDims = 32;

constexpr const char* kDTypeNames[] = {  // as enum DType
#define NAME(name, type, python, bytes) python,
    FUSIONSUM_DTYPES(NAME)
#undef NAME
};
constexpr int kDTypes = sizeof kDTypeNames / sizeof *kDTypeNames;

enum class Framework { none, numpy, torch };

struct Array {
  void* data;
  dlpack::Device device;
  DType dtype;   // of floats
  bool boolean;  // instead
  bool integer;  // instead, of int64; of tensors alone
  int ndim;
  int64_t shape[kMaxArrayDims], stride[kMaxArrayDims];  // strides in elements
};

// By the exact type: subclasses have their own ideas.
Framework framework_of(py::handle object);

// False for an array of another framework, and for one whose values are no floats of the list and no booleans, or are
// not in its memory as shape and strides say.
bool read(py::handle object, Framework framework, Array& to);

int64_t bytes_of(DType dtype, int ndim, const int64_t* shape);

// A new contiguous array, and where its data are.
py::object allocate(Framework framework, dlpack::Device device, DType dtype, int ndim, const int64_t* shape,
                    void** data);

// Sets a new array to zero.
void clear(const py::object& array, dlpack::Device device, DType dtype, int ndim, const int64_t* shape, void* data);

}  // namespace fusionsum
