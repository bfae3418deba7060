// The walk through a chunk of scores (chunk.h), a tile of rows and columns for each block: a warp has a row of the tile
// at a time, and a lane of it kLane entries. So rows are summed by shuffles, and columns in registers.
//
// What lives elsewhere: what is made of the scores (*.cu), sums over a warp or a block (../threads.cuh).
#pragma once
#include "../threads.cuh"
#include "chunk.h"

namespace fusionsum {
namespace cuda {

constexpr int kWarps = kThreads / 32, kTileCols = kThreads, kLane = kTileCols / 32;
constexpr int kTileRows = 64;  // at most
template <class T>
constexpr int kBlocksOf = sizeof(T) == 4 ? 2 : 1;  // per multiprocessor, at least: 128 or 255 registers

// The parameters of a launch. The parts of a sum that tiles share are float64: [row][tile][value],
// [column][tile][value] and, of the whole, [block][value].
struct Tiles {
  Chunk c;
  int64_t tile_rows, across, down;  // rows of a tile, tiles
  double *row_parts, *col_parts, *all_parts;
};

using TilesKernel = void(const Tiles);
// The kernel of a step, for float32 or float64; `pairs`: some are excluded, or more than the diagonal is positive.
TilesKernel* statistics_kernel(Step step, bool wide, bool pairs);  // statistics.cu
TilesKernel* gamma_kernel(Step step, bool wide, bool pairs);       // gamma.cu

// A float64 as its bits, and back; dtype.h has the same of float32.
FUSIONSUM_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  return bits;
}
FUSIONSUM_INLINE double double_of(uint64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, 8);
  return x;
}

// The products in the places of pairs that lists exclude: a NaN that no arithmetic makes.
constexpr uint32_t kLeftOut32 = 0x7fc0f5f5u;
constexpr uint64_t kLeftOut64 = 0x7ff8f5f5f5f5f5f5u;
FUSIONSUM_INLINE float left_out(float) { return float_of(kLeftOut32); }
FUSIONSUM_INLINE double left_out(double) { return double_of(kLeftOut64); }
FUSIONSUM_INLINE bool is_left_out(float x) { return bits_of(x) == kLeftOut32; }
FUSIONSUM_INLINE bool is_left_out(double x) { return bits_of(x) == kLeftOut64; }

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T kHighest = static_cast<T>(sizeof(T) == 8 ? __DBL_MAX__ : static_cast<double>(__FLT_MAX__));

// exp(x), of any x that is at most kMargin or +inf. In float32 by the GPU's own exponential, 6 instructions for 35: its
// error is |x| 2^-24 + 2^-22 of the result, of the greatest term of a sum 2^-22.
FUSIONSUM_INLINE float fast_exp(float x) { return gpu_exp(x); }
FUSIONSUM_INLINE double fast_exp(double x) {
  return x == kInfinity<double> ? x : exp_or_zero(at_most(x, static_cast<double>(kMargin)));
}

template <class T>
FUSIONSUM_INLINE T scale_of(const Chunk& c) {
  return static_cast<T>(c.scale_at ? *c.scale_at : c.scale);
}
template <class T>
FUSIONSUM_INLINE T bias_of(const Chunk& c, int64_t col) {
  T bias = static_cast<T>(c.bias_at ? *c.bias_at : c.bias);
  if (c.key_bias)
    with_dtype(c.key_bias_dtype, c.key_bias,
               [&](const auto* p) { bias = bias + static_cast<T>(widen(p[(c.first_col + col) * c.key_bias_stride])); });
  return bias;
}
FUSIONSUM_INLINE bool is_excluded(const Chunk& c, int64_t row, int64_t col) {
  return c.exclude && c.exclude[(c.first_row + row) * c.exclude_row + (c.first_col + col) * c.exclude_col];
}

// A lane's entries of a row. Bit j of `here` and of `positive` is of entry j; the score of one that is not here, for
// want of columns or for being excluded, is -inf.
template <class T>
struct Entries {
  T product[kLane], score[kLane];
  unsigned here, positive;
};

// kPairs: some pairs are excluded, or more than the diagonal is positive.
template <class T, bool kPairs>
struct Walk {
  static constexpr int W = 16 / sizeof(T);  // entries that are read together

  const Chunk& c;
  int lane, warp;
  int64_t across, down, first_row, last_row;
  T scale, bias[kLane];
  unsigned live;

  FUSIONSUM_INLINE explicit Walk(const Tiles& p)
      : c(p.c), lane(static_cast<int>(threadIdx.x) % 32), warp(static_cast<int>(threadIdx.x) / 32), live(0) {
    down = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(p.across));
    across = static_cast<int64_t>(blockIdx.x) - down * p.across;
    first_row = down * p.tile_rows;
    last_row = first_row + p.tile_rows < c.rows ? first_row + p.tile_rows : c.rows;
    scale = scale_of<T>(c);
    FUSIONSUM_UNROLL(8)
    for (int j = 0; j < kLane; ++j) {
      const int64_t at = col(j);
      bias[j] = 0;
      if (at < c.skip || at >= c.cols) continue;
      live |= 1u << j;
      bias[j] = bias_of<T>(c, at);
    }
  }

  FUSIONSUM_INLINE int in_tile(int j) const { return (j / W * 32 + lane) * W + j % W; }
  FUSIONSUM_INLINE int64_t col(int j) const { return across * kTileCols + in_tile(j); }

  FUSIONSUM_INLINE void load(int64_t row, Entries<T>& to) const {
    const T* const from = static_cast<const T*>(c.products) + row * c.stride;
    FUSIONSUM_UNROLL(8)
    for (int i = 0; i < kLane; i += W) {
      const int64_t at = col(i);
      if (at + W <= c.cols) {
        const uint4 packet = *reinterpret_cast<const uint4*>(from + at);
        __builtin_memcpy(&to.product[i], &packet, sizeof packet);
      } else {
        FUSIONSUM_UNROLL(4)
        for (int j = 0; j < W; ++j) to.product[i + j] = at + j < c.cols ? from[at + j] : T(0);
      }
    }
    to.here = live;
    to.positive = 0;
    const int64_t b = c.first_row + row, diagonal = b - c.first_col - across * kTileCols;
    if (!c.query_labels && diagonal >= 0 && diagonal < kTileCols) {
      const int d = static_cast<int>(diagonal);
      if (d / W % 32 == lane) to.positive = live & 1u << (d / W / 32 * W + d % W);
    }
    if (kPairs) exclude(row, b, to);
    FUSIONSUM_UNROLL(8)
    for (int j = 0; j < kLane; ++j)
      to.score[j] = to.here >> j & 1 ? madd(scale, to.product[j], bias[j]) : -kInfinity<T>;
  }

 private:
  FUSIONSUM_INLINE void exclude(int64_t row, int64_t b, Entries<T>& to) const {
    const int64_t label = c.query_labels ? c.query_labels[b] : 0, id = c.query_ids ? c.query_ids[b] : 0;
    FUSIONSUM_UNROLL(8)
    for (int j = 0; j < kLane; ++j) {
      const unsigned bit = 1u << j;
      if (!(live & bit)) continue;
      const int64_t key = c.first_col + col(j);
      if (c.query_labels && c.key_labels[key] == label) to.positive |= bit;
      const bool same_id = c.query_ids && c.key_ids[key] == id && !(to.positive & bit);
      if (same_id || is_excluded(c, row, col(j)) || is_left_out(to.product[j])) {
        to.here &= ~bit;
        to.positive &= ~bit;
      }
    }
  }
};

// ---- sums of columns ----------------------------------------------------------------------------------------------

// Puts a lane's values of its columns where those of all warps are found, [warp][column of the tile].
template <class W, class T>
FUSIONSUM_INLINE void put_columns(const W& w, const T (&x)[kLane], T* shared) {
  FUSIONSUM_UNROLL(8)
  for (int j = 0; j < kLane; ++j) shared[w.warp * kTileCols + w.in_tile(j)] = x[j];
}

// Adds up the warps' sums of each column, of value `value` of `values`. Every thread of the block must call it.
template <class W, class T>
FUSIONSUM_INLINE void sum_columns(const Tiles& p, const W& w, const T (&x)[kLane], T* shared, int value, int values) {
  put_columns(w, x, shared);
  __syncthreads();
  const int64_t col = w.across * kTileCols + static_cast<int64_t>(threadIdx.x);
  if (col < p.c.cols) {
    double sum = 0;
    GPU_LOOP
    for (int warp = 0; warp < kWarps; ++warp) sum += static_cast<double>(shared[warp * kTileCols + threadIdx.x]);
    p.col_parts[(col * p.down + w.down) * values + value] = sum;
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace fusionsum
