// The C interface of the CUDA library, libfusionsum_cuda: a library of its own, without Python, that _core loads when
// the first CUDA tensor arrives (bindings/execute.cpp), so that a machine without a driver never notices. Errors are
// words, and nothing throws.
//
// The library owns no memory. A problem is executed in steps: `plan` says how much workspace its plan needs, the caller
// allocates it, `execute` launches.
#pragma once
#include "../sum.h"
#include "scores/chunk.h"

namespace fusionsum {

struct CudaLibrary {
  // Null where the library can run; else why it cannot.
  const char* (*unavailable)() noexcept;

  int64_t plan_bytes;  // of memory for any plan, aligned as malloc's

  // Writes a plan of the problem to such memory. Returns null, or what about the problem no kernel takes.
  const char* (*plan)(const Problem* problem, void* plan, int64_t* workspace_bytes) noexcept;

  // Queues a plan on a stream of a device, which must be current. The data pointers of its problem and `workspace` are
  // that device's; the workspace must last until the stream has passed, and may be null where the plan needs none.
  // Returns null, or an error that names the kernel; then no result is valid. Launches only: nothing synchronises, so a
  // CUDA graph can capture it.
  const char* (*execute)(const void* plan, int device, void* stream, void* workspace) noexcept;

  // The same of a step of a chunk of scores, which needs no plan.
  int64_t (*step_workspace)(const Chunk* chunk) noexcept;  // bytes
  const char* (*step)(const Chunk* chunk, int device, void* stream, void* workspace) noexcept;
};

}  // namespace fusionsum

extern "C" __attribute__((visibility("default"))) const fusionsum::CudaLibrary* fusionsum_cuda();
