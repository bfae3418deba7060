// torch without libtorch: tensors cross through the DLPack C exchange API, which torch has since 2.10 (pointers,
// strides, stream and allocation in 0.1 us a tensor).
//
// What lives here: what the bindings ask of torch, once backend.adopt_torch has handed it over. What lives elsewhere:
// torch's thread pool (cpu/parallel.h), the CUDA library (execute.h).
#pragma once
#include "arrays.h"

namespace fusionsum {

// Takes the module torch; the addresses of libtorch's thread pool (cpu/parallel.h) or None; and the function that loads
// the CUDA library (execute.h). Raises ImportError for a torch without the exchange API.
void use_torch(py::object module, py::object parallel_for, py::object num_threads, py::object load_cuda);

bool is_tensor(py::handle object);  // a Tensor or Parameter of the torch that was handed over
bool read_tensor(py::handle tensor, Array& to);
py::object allocate_tensor(dlpack::Device device, DType dtype, int ndim, const int64_t* shape, void** data);
void* current_stream(dlpack::Device device);

// Makes a GPU current, and the one before it current again. By torch, which creates no context on the latter where
// there is none yet: cudaSetDevice would, and take hundreds of megabytes of it.
class OnDevice {
 public:
  explicit OnDevice(dlpack::Device device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// Does torch watch calls of its functions, so that a direct call here would pass unseen: a functorch transform, a
// dispatch mode, a trace, forward AD? Whether autograd records, autograd/routing.py asks. 0.2 us from here, 0.5 from
// Python.
bool is_watched();

}  // namespace fusionsum
