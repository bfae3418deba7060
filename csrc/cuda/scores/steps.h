// The launches of a chunk's steps.
#pragma once
#include "../gpu.h"
#include "chunk.h"

namespace fusionsum {
namespace cuda {

int64_t step_workspace(const Chunk& chunk);  // bytes

// Launches a step. Returns the kernel whose launch failed, with the error; or null.
const char* launch_step(const Chunk& chunk, cudaStream_t stream, void* workspace, cudaError_t& error);

}  // namespace cuda
}  // namespace fusionsum
