// The C interface of the CUDA library, libfusionsum_cuda: a library of its own, without Python, that _core loads when the first
// CUDA tensor arrives (bindings.cpp), so that a machine without a driver never notices.
#pragma once
#include "../sum.h"

namespace fusionsum {

struct CudaLibrary {
  // Null where the library can run; else why it cannot, in words.
  const char* (*unavailable)();
  // Queues the problem on a stream of a device; the data pointers are that device's. `allocate` is called at most once, for
  // workspace that must last until the stream has passed. Returns null, or an error that names the kernel; then no result is
  // valid. Launches only: nothing synchronises, so a CUDA graph can capture it.
  const char* (*run)(const Problem* problem, int device, void* stream, void* (*allocate)(void* context, int64_t bytes),
                     void* context);
};

}  // namespace fusionsum

extern "C" __attribute__((visibility("default"))) const fusionsum::CudaLibrary* fusionsum_cuda();
