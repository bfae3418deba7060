// The top-k epilogue: each row's scores are compared with the least that the query still needs, and those above it are
// kept as candidates; now and then all but the best k of them are dropped (plan.cpp).
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

// `slot` has the candidates of query b and this segment; keys come in ascending order, so a score equal to the threshold
// comes too late.
template <class T>
void top_k_row(const ScorePlan& p, int64_t b, int64_t slot, const Keys<T>& keys, const T* row) {
  using L = Simd<T>;
  const Scores& s = *p.scores;
  Hit<T>* const candidates = piece<Hit<T>>(p.candidates, 0) + slot * p.room;
  int64_t& held = p.held[slot];
  T& threshold = piece<T>(p.threshold, 0)[slot];
  const auto keep = [&](int64_t j) {
    if (is_excluded(s, b, keys.first + j)) return;
    if (held == p.room) p.compact(p, slot);
    candidates[held++] = {row[j], keys.first + j};
  };
  for (int64_t j = 0; j < keys.count; j += L::width) {
    const int64_t end = smaller(j + L::width, keys.count);
    if (!p.full[slot]) {
      for (int64_t i = j; i < end; ++i) keep(i);
      continue;
    }
    unsigned above = L::above(L::load(row + j), L::broadcast(threshold));  // NaN never is; beyond the keys lies -inf
    for (; above; above &= above - 1) {
      const int64_t i = j + __builtin_ctz(above);
      if (row[i] > threshold) keep(i);  // which may have been raised meanwhile
    }
  }
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
