#include "merge.cuh"

namespace fusionsum {
namespace cuda {

// A warp has an entry; its lanes take the parts in turns.
__global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ Merge m) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (entry >= m.entries) return;
  const double* const parts = m.parts + entry * m.parts_of_entry * m.values;
  double* const to = m.to + entry;
  if (m.log_sum_exp) {
    double top = lane == 0 ? *to : -kHighest<double>, sum = 0;
    GPU_LOOP
    for (int64_t i = lane; i < m.parts_of_entry; i += 32) top = at_least(top, parts[2 * i]);
    top = warp_max(top);
    GPU_LOOP
    for (int64_t i = lane; i < m.parts_of_entry; i += 32) sum += parts[2 * i + 1] * exp_or_zero(parts[2 * i] - top);
    sum = warp_sum(sum);
    if (lane != 0) return;
    to[m.step] = to[m.step] * exp_or_zero(*to - top) + sum;
    *to = top;
    return;
  }
  GPU_LOOP
  for (int value = 0; value < m.values; ++value) {
    double sum = 0;
    GPU_LOOP
    for (int64_t i = lane; i < m.parts_of_entry; i += 32) sum += parts[i * m.values + value];
    sum = warp_sum(sum);
    if (lane == 0) to[value * m.step] += sum;
  }
}

}  // namespace cuda
}  // namespace fusionsum
