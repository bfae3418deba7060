// The kernels of the steps top_k and leave_out (chunk.h).
#include <type_traits>

#include "select.cuh"

namespace fusionsum {
namespace cuda {
namespace {

FUSIONSUM_INLINE uint32_t ordered(float x) {
  if (x != x) return 1;
  const uint32_t bits = bits_of(x + 0.0f);  // of the zeros one
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
FUSIONSUM_INLINE uint64_t ordered(double x) {
  if (x != x) return 1;
  const uint64_t bits = bits_of(x + 0.0);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}
FUSIONSUM_INLINE float score_of(uint32_t ordered) {
  if (ordered == 0) return -kInfinity<float>;
  if (ordered == 1) return float_of(0x7fc00000u);
  return float_of(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
FUSIONSUM_INLINE double score_of(uint64_t ordered) {
  if (ordered == 0) return -kInfinity<double>;
  if (ordered == 1) return double_of(uint64_t{0x7ff8} << 48);
  return double_of(ordered >> 63 ? ordered & ~(uint64_t{1} << 63) : ~ordered);
}

// Sorts the first `held` hits of a warp's room, the best first: a bitonic network over the next power of two.
template <class U>
FUSIONSUM_INLINE void sort(Hit<U>* room, int held, int lane) {
  int size = 32;
  while (size < held) size *= 2;
  GPU_LOOP
  for (int i = held + lane; i < size; i += 32) room[i] = {0, 0};
  GPU_LOOP
  for (int run = 2; run <= size; run *= 2) {
    GPU_LOOP
    for (int half = run / 2; half; half /= 2) {
      __syncwarp();
      GPU_LOOP
      for (int i = lane; i < size / 2; i += 32) {
        const int a = ((i & ~(half - 1)) << 1) | (i & (half - 1)), b = a + half;
        const Hit<U> first = room[a], second = room[b];
        if ((first < second) != ((a & run) == 0)) continue;
        room[a] = second;
        room[b] = first;
      }
    }
  }
  __syncwarp();
}

}  // namespace

template <class T, bool kLarge>
__global__ void __launch_bounds__(kThreads) select(const __grid_constant__ Selection p) {
  using U = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  using H = Hit<U>;
  constexpr int kSize = kLarge ? kLargeRoom : kRoom, kHere = kSelectWarps<H, kLarge>, kAtOnce = 4;
  GPU_SHARED(H, rooms, (kHere * kSize));
  const Chunk& c = p.c;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kHere + warp, row = index / p.segments,
                segment = index - row * p.segments;
  if (row >= c.rows) return;  // all of the warp; there is no barrier of the block
  H* const room = rooms + warp * kSize;
  const int k = static_cast<int>(c.k);
  const int64_t b = c.first_row + row;
  const H* const known = static_cast<const H*>(c.best) + b * c.k;
  const T scale = scale_of<T>(c);

  // From how many on the room is sorted: long before it is full where k is small, so that the k-th best is known early.
  const int full = min(kSize - 32 * kAtOnce, max(32 * kAtOnce, 2 * k));
  int held = 0;
  H least = k ? known[k - 1] : H{0, 0};  // a hit must exceed it
  if (p.with_known) {
    GPU_LOOP
    for (int i = lane; i < k; i += 32) room[i] = known[i];
    held = k;
  }
  const int64_t count = p.lists ? p.listed : c.cols, begin = segment * p.of_segment;
  const int64_t end = begin + p.of_segment < count ? begin + p.of_segment : count;
  GPU_LOOP
  for (int64_t at = begin; at < end; at += 32 * kAtOnce) {
    H hit[kAtOnce];
    bool exceeds = false;
    FUSIONSUM_UNROLL(4)
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t i = at + u * 32 + lane;
      hit[u] = {0, 0};
      if (i >= end) continue;
      if (p.lists) {
        hit[u] = static_cast<const H*>(p.lists)[row * p.listed + i];
      } else if (i >= c.skip) {
        const T product = static_cast<const T*>(c.products)[row * c.stride + i];
        if (!is_left_out(product) && !is_excluded(c, row, i))
          hit[u] = {ordered(madd(scale, product, bias_of<T>(c, i))), static_cast<U>(~static_cast<U>(c.first_col + i))};
      }
      exceeds = exceeds || least < hit[u];
    }
    if (!__ballot_sync(0xffffffffu, exceeds)) continue;
    if (held >= full) {
      sort(room, held, lane);
      held = k;
      if (k) least = room[k - 1];
      __syncwarp();
    }
    FUSIONSUM_UNROLL(4)
    for (int u = 0; u < kAtOnce; ++u) {
      const bool passes = least < hit[u];
      const unsigned all = __ballot_sync(0xffffffffu, passes);
      if (passes) room[held + __popc(all & ((1u << lane) - 1))] = hit[u];
      held += __popc(all);
    }
  }
  sort(room, held, lane);
  H* const to = p.to ? static_cast<H*>(p.to) + (row * p.segments + segment) * c.k : static_cast<H*>(c.best) + b * c.k;
  GPU_LOOP
  for (int i = lane; i < k; i += 32) {
    const H hit = i < held ? room[i] : H{0, 0};
    to[i] = hit;
    if (p.to || !c.values) continue;
    static_cast<T*>(c.values)[b * c.k + i] = score_of(hit.score);
    c.indices[b * c.k + i] = hit.score ? static_cast<int64_t>(static_cast<U>(~hit.place)) : -1;
  }
}

// A warp has a row, and walks through those of its places that are in the chunk.
template <class T>
__global__ void __launch_bounds__(kThreads) leave_out(const __grid_constant__ Chunk c) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= c.rows) return;
  const int64_t first = (c.first_row + row) * c.all_cols + c.first_col;
  int64_t low = 0, high = c.places_count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (c.places[middle] < first) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  GPU_LOOP
  for (int64_t i = low + lane; i < c.places_count && c.places[i] < first + c.cols; i += 32)
    if (i == low || c.places[i - 1] != c.places[i])
      static_cast<T*>(c.products)[row * c.stride + c.places[i] - first] = left_out(T());
}

SelectKernel* select_kernel(bool wide, bool large) {
  if (large) return wide ? select<double, true> : select<float, true>;
  return wide ? select<double, false> : select<float, false>;
}
LeaveOutKernel* leave_out_kernel(bool wide) { return wide ? leave_out<double> : leave_out<float>; }

}  // namespace cuda
}  // namespace fusionsum
