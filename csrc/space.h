// What both planners, cpu/sum/plan.cpp and cuda/sum/plan.cpp, ask of a problem; and their words.
//
//   vector dim   the dim along which kernels take several entries at once; its entries are the columns
//   rows         all other dims, the row dims, flattened in the planner's order
//   run          neighbouring rows along which an operand has no dim: they sum to one row of its derivative
//   splat        an operand without the vector dim: one value per row, the same for all columns
//   uniform      an operand whose row of values serves all rows that are walked together
//   varying      an operand with a row of values of its own for each row
//
// Example, low-rank fusion forward: f, g (B = 4096, R = 16, O = 128), weights (R, 1), summed over R into u (B, O). The
// vector dim is O: 128 columns. The row dims are B and R, in this order: 65,536 rows. f and g are varying; the weights
// lack O: splat; u lacks R: uniform, and runs of 16 rows sum to one of its rows.
//
// On the CPU (cpu/sum/plan.h) rows and columns are cut into tasks, the unit of what a thread does: here 64 tasks of
// 1,024 rows, one slice each (long tasks have several: Ctrl-C is looked for between them). A task walks through groups
// of at most 64 rows that have the outer row dims in common, here 16, and in a group through blocks of at most 1,024
// columns; a tile is as much of a block as is brought in at once. Where runs are short and share their splats, as here,
// one group holds many runs, and each is a tile.
//
// On CUDA (cuda/sum/pass.h) the rows are units (B) times the run (R), cut into blocks of slots, groups and lanes.
#pragma once
#include <algorithm>

#include "sum.h"

namespace fusionsum {

// Rows summed in the working precision, before sums are added in float64: 64 cost 6 ulp.
constexpr int64_t kSummed = 16;

constexpr int64_t item_size(DType dtype) {
  constexpr int64_t kBytes[] = {
#define BYTES(name, type, python, bytes) bytes,
      FUSIONSUM_DTYPES(BYTES)
#undef BYTES
  };
  return kBytes[static_cast<int>(dtype)];
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool has(const Operand& o, int d) { return o.dims >> d & 1; }

inline int64_t extent(const Problem& p, const Operand& o) {
  int64_t n = 1;
  for (int d = 0; d < p.ndim; ++d)
    if (has(o, d)) n *= p.size[d];
  return n;
}

// The dim along which most entries lie side by side; short dims count for less, since rows have a cost each. Not one
// along which an operand is broadcast and yet its mask varies: there it is neither a value per row nor a row of values.
inline int vector_dim(Problem& p) {
  int best = -1;
  double best_score = -1;
  for (int d = p.ndim - 1; d >= 0; --d) {
    double score = 0;
    bool fits = true;
    for (int k = 0; k < p.operands; ++k) {
      const Operand& o = p.operand[k];
      fits = fits && (has(o, d) || !o.mask || o.mask_stride[d] == 0);
      const bool beside = o.data ? o.stride[d] == 1 : has(o, d) && o.grad_stride[d] == 1;
      score += (beside ? 1.0 : 0.25) * static_cast<double>(extent(p, o));
    }
    score *= static_cast<double>(std::min<int64_t>(p.size[d], 8));
    if (fits && score > best_score) {
      best_score = score;
      best = d;
    }
  }
  if (best >= 0) return best;
  // Along every dim some broadcast operand has a varying mask. A new dim of size 1, which all operands have, serves.
  const int d = p.ndim++;
  p.size[d] = 1;
  for (int k = 0; k < p.operands; ++k) {
    Operand& o = p.operand[k];
    o.dims |= 1u << d;
    o.stride[d] = o.grad_stride[d] = 1;
    o.mask_stride[d] = 0;
  }
  return d;
}

}  // namespace fusionsum
