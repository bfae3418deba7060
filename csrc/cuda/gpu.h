// One source, two compilers: nvcc, or g++ with the emulator of tests/cuda, in which every CUDA thread is a fiber.
//
// What lives here: the vocabulary (formula.h's, for one number per thread) and the few words that differ. Kernels use
// no inline PTX, no raw __shared__ and no <<<>>>.
#pragma once
#include <cmath>
#include <cstdint>

#include "../sum.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FUSIONSUM_INLINE __device__ __forceinline__
#define GPU_SHARED(type, name, count) __shared__ type name[count]
#define GPU_UNROLL(count) FUSIONSUM_PRAGMA(unroll(count))
FUSIONSUM_INLINE float gpu_exp(float x) { return __expf(x); }

// CUDA 12 cannot tell a kernel's type where it is launched.
template <class Parameters>
const void* gpu_kernel(void (*kernel)(Parameters)) {
  return reinterpret_cast<const void*>(kernel);
}

#else
#include "emulator.h"

#define FUSIONSUM_INLINE inline
#define GPU_UNROLL(count)
#endif

#define FUSIONSUM_FUSES
#define GPU_LOOP GPU_UNROLL(1)

template <class Parameters>
cudaError_t gpu_launch(void (*kernel)(Parameters), dim3 grid, dim3 block, cudaStream_t stream,
                       const Parameters& parameters) {
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  const cudaError_t error = cudaLaunchKernel(gpu_kernel(kernel), grid, block, arguments, 0, stream);
  cudaGetLastError();  // or the next to ask, torch, would be told of it again
  return error;
}

namespace fusionsum {
namespace cuda {
// clang-format off: each needs the one before
#include "../dtype.h"
#include "../scalar.h"
#include "../formula.h"
// clang-format on
}  // namespace cuda
}  // namespace fusionsum
