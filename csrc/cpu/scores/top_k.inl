// The top-k epilogue: each row's scores are compared with the least that the query still needs, and those above it are
// kept as candidates; now and then all but the best k of them are dropped (plan.cpp).
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

inline float below(float x) { return __builtin_nextafterf(x, -kInfinity<float>); }
inline double below(double x) { return __builtin_nextafter(x, -kInfinity<double>); }

// The score that one must exceed to be among the best k of query b, if some segment has k candidates yet. Another
// segment's least candidate may be equalled, for equal scores go by their keys. The tasks of other segments write
// theirs meanwhile: which of these are seen here changes how many candidates are kept, and never the best k of them.
template <class T>
bool find_bound(const ScorePlan& p, int64_t b, int64_t segment, T& bound) {
  bool found = false;
  for (int64_t g = 0; g < p.segments; ++g) {
    const int64_t slot = b * p.segments + g;
    if (!__atomic_load_n(&p.full[slot], __ATOMIC_ACQUIRE)) continue;
    T least;
    __atomic_load(piece<T>(p.threshold, 0) + slot, &least, __ATOMIC_RELAXED);
    if (g != segment && least == -kInfinity<T>) continue;
    if (g != segment) least = below(least);
    bound = !found || least > bound ? least : bound;
    found = true;
  }
  return found;
}

// Keys come in ascending order, so that a score equal to the bound comes too late. `query` is one of the chunk.
template <class T>
void top_k_row(const ScorePlan& p, int64_t b, int64_t query, int64_t segment, const Keys<T>& keys, const T* row) {
  using L = Simd<T>;
  const Scores& s = *p.scores;
  const int64_t slot = query * p.segments + segment;
  Hit<T>* const candidates = piece<Hit<T>>(p.candidates, 0) + slot * p.room;
  int64_t& held = p.held[slot];
  T bound{};
  bool bounded = find_bound(p, query, segment, bound);
  const auto keep = [&](int64_t j) {
    if (is_excluded(s, b, keys.first + j)) return;
    if (held == p.room) {
      p.compact(p, slot);
      bounded = find_bound(p, query, segment, bound);
    }
    candidates[held++] = {row[j], keys.first + j};
  };
  for (int64_t j = 0; j < keys.count; j += L::width) {
    if (!bounded) {
      for (int64_t i = j; i < smaller(j + L::width, keys.count); ++i) keep(i);
      continue;
    }
    unsigned above = L::above(L::load(row + j), L::broadcast(bound));  // NaN never is; beyond the keys lies -inf
    for (; above; above &= above - 1) {
      const int64_t i = j + __builtin_ctz(above);
      if (row[i] > bound) keep(i);
    }
  }
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
