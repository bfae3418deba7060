// Who executes a problem: the CPU's kernels or, for tensors on a GPU, the CUDA library (cuda/cuda.h). Its workspace,
// the GIL and Ctrl-C are seen to here.
//
// The tests of the CUDA kernels link tests/cuda/execute_emulated.cpp in the place of execute.cpp.
#pragma once
#include <pybind11/pybind11.h>

#include "../cuda/scores/chunk.h"
#include "../sum.h"
#include "dlpack.h"

namespace fusionsum {

namespace py = pybind11;

// The function that loads the CUDA library and hands it to use_cuda: called when a CUDA tensor arrives, until one is
// there.
void load_cuda_by(py::object load);

// Is there a usable CUDA library? Loads it where that has not been tried.
bool has_cuda();

// Takes the address of fusionsum_cuda. Returns why the library cannot be used, or None.
py::object use_cuda(uintptr_t address);

// Computes the derivatives that a problem asks for, its arrays being on the device; on a GPU it queues that on torch's
// current stream. Throws Python's error, of Ctrl-C for one, and std::runtime_error or std::bad_alloc.
void execute(const Problem& problem, dlpack::Device device);

// Queues a step of a chunk of scores, likewise; the device is a GPU.
void execute(const Chunk& chunk, dlpack::Device device);

}  // namespace fusionsum
