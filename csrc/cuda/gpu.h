// One source, two compilers: nvcc, or g++ with the emulator of tests/cuda, in which every CUDA thread is a fiber.
//
// What lives here: the vocabulary (form.h's, for one number per thread) and the few words that differ. Kernels use no inline
// PTX, no raw __shared__ and no <<<>>>.
#pragma once
#include <cmath>
#include <cstdint>

#include "../fusion.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FORM_INLINE __device__ __forceinline__
#define GPU_SHARED(type, name, count) __shared__ type name[count]
#define GPU_UNROLL(count) FORM_PRAGMA(unroll(count))

template <class Kernel, class Parameters>
cudaError_t gpu_launch(Kernel* kernel, dim3 grid, dim3 block, cudaStream_t stream, const Parameters& parameters) {
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, 0, stream);
  cudaGetLastError();  // or the next to ask, torch, would be told of it again
  return error;
}
#else
#include "emulator.h"

#define FORM_INLINE inline
#define GPU_UNROLL(count)
#endif

#define FORM_FUSES
#define GPU_LOOP GPU_UNROLL(1)

namespace fusionsum {
namespace cuda {
#include "../dtype.h"
#include "../scalar.h"

#include "../form.h"
}  // namespace cuda
}  // namespace fusionsum
