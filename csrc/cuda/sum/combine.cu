// The kernel `combine`, the second stage of a sum in which several blocks have parts (pass.h).
#include "kernel.cuh"

namespace fusionsum {
namespace cuda {
// A block has kCombined neighbouring entries, and for each of them kThreads / kCombined threads, which add its parts in
// turns.
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Combine c) {
  GPU_SHARED(double, buffer, kThreads);
  const int index = static_cast<int>(threadIdx.x), lane = index % kCombined, group = index / kCombined;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kCombined + lane;
  double sum = 0;
  if (entry < c.entries) {
    FUSIONSUM_UNROLL(8)
    for (int64_t part = group; part < c.parts; part += kThreads / kCombined) sum += c.sums[part * c.entries + entry];
  }
  buffer[index] = sum;
  strided_sum<1>(buffer, kCombined, kThreads / kCombined, group);
  if (entry >= c.entries || group != 0) return;
  int64_t rest = entry, at = 0;
  GPU_LOOP
  for (int d = c.dims - 1; d >= 0; --d) {
    const int64_t next = quotient(rest, c.size[d], c.inverse_size[d]);
    at += (rest - next * c.size[d]) * c.stride[d];
    rest = next;
  }
  store_value(c.dtype, c.grad, at, buffer[index]);
}
}  // namespace cuda
}  // namespace fusionsum
