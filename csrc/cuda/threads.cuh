// Sums over the threads of a warp or a block, each in a fixed order.
#pragma once
#include "gpu.h"
#include "sum/pass.h"

namespace fusionsum {
namespace cuda {

// Over a warp, returned to all of its lanes.
template <class T>
FUSIONSUM_INLINE T warp_sum(T x) {
  FUSIONSUM_UNROLL(8)
  for (int step = 16; step; step /= 2) x = x + __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
template <class T>
FUSIONSUM_INLINE T warp_max(T x) {
  FUSIONSUM_UNROLL(8)
  for (int step = 16; step; step /= 2) x = at_least(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// The sum of x over each aligned segment of 2^log2 threads, returned to the segment's first thread; to the others,
// anything. Every thread of the block must call it.
FUSIONSUM_INLINE double segment_sum(double x, int log2, double* buffer) {
  const int width = 1 << log2, index = static_cast<int>(threadIdx.x);
  GPU_LOOP
  for (int step = width < 32 ? width / 2 : 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (width > 32) {
    if (index % 32 == 0) buffer[index / 32] = x;
    __syncthreads();
    if ((index & (width - 1)) == 0) {
      GPU_LOOP
      for (int warp = 1; warp < width / 32; ++warp) x += buffer[index / 32 + warp];
    }
    __syncthreads();
  }
  return x;
}

// Each thread has W values, x[i * kThreads + thread]. Adds up, in each aligned segment of lanes * count threads, those
// of the `count` threads with the same lane, and leaves the sums with the one of them whose place among them, `which`,
// is 0. Every thread of the block must call it.
template <int W>
FUSIONSUM_INLINE void strided_sum(double* x, int lanes, int count, int which) {
  double* const own = x + threadIdx.x;
  GPU_LOOP
  for (int half = count / 2; half; half /= 2) {
    __syncthreads();
    if (which < half) {
      FUSIONSUM_UNROLL(8)
      for (int i = 0; i < W; ++i) own[i * kThreads] += own[i * kThreads + half * lanes];
    }
  }
  if (count > 1) __syncthreads();
}

}  // namespace cuda
}  // namespace fusionsum
