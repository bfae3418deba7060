// What both planners, cpu/sum/plan.cpp and cuda/sum/plan.cpp, ask of a problem's loop space and of its operands.
#pragma once
#include <algorithm>

#include "sum.h"

namespace fusionsum {

constexpr int64_t kSummed = 16;  // rows summed in the working precision, before sums are added in float64: 64 cost 6 ulp

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

// The dim along which most entries lie side by side; short dims count for less, since rows have a cost each. Not one along
// which an operand is broadcast and yet its mask varies: there it is neither a value per row nor a row of values.
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
  const int d = p.ndim++;  // every dim is such a one: a dim of size 1, which all operands have, is not
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
