// The top-k epilogue: a key's scores with a block of queries are compared with the least that each query still needs,
// and those above it are kept as candidates; now and then all but the best k of a query's are dropped (plan.cpp).
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

inline float below(float x) { return __builtin_nextafterf(x, -kInfinity<float>); }
inline double below(double x) { return __builtin_nextafter(x, -kInfinity<double>); }

// The score that one must exceed to be among the best k of query b, if some segment has k candidates yet; else NaN,
// which every score passes. Another segment's least candidate may be equalled, for equal scores go by their keys. The
// tasks of other segments write theirs meanwhile: which of these are seen here changes how many candidates are kept,
// and never the best k of them.
template <class T>
T find_bound(const ScorePlan& p, int64_t b, int64_t segment) {
  T bound = static_cast<T>(__builtin_nan("")), other = bound;
  for (int64_t g = 0; g < p.segments; ++g) {
    const int64_t slot = b * p.segments + g;
    if (!__atomic_load_n(&p.full[slot], __ATOMIC_ACQUIRE)) continue;
    T least;
    __atomic_load(piece<T>(p.threshold, 0) + slot, &least, __ATOMIC_RELAXED);
    T& greatest = g == segment ? bound : other;
    greatest = least <= greatest ? greatest : least;
  }
  if (!(other > -kInfinity<T>)) return bound;
  other = below(other);
  return other <= bound ? bound : other;
}

// `query` is the first of `count` queries of the chunk; `bound` has whole vectors, which nothing passes beyond them but
// NaN. Keys come in ascending order, so that a score equal to the bound comes too late.
template <class T>
void top_k_key(const ScorePlan& p, int64_t first_query, int64_t query, int64_t count, int64_t segment, int64_t key,
               T bias, const T* scores, T* bound) {
  using L = Simd<T>;
  for (int64_t j = 0; j < count; j += L::width) {
    unsigned passing = L::passes(L::load(scores + j) + L::broadcast(bias), L::load(bound + j));
    for (; passing; passing &= passing - 1) {
      const int64_t i = j + __builtin_ctz(passing);
      const T score = scores[i] + bias;
      if (i >= count || (bound[i] == bound[i] && !(score > bound[i]))) continue;
      if (is_excluded(*p.scores, first_query + query + i, key)) continue;
      const int64_t slot = (query + i) * p.segments + segment;
      if (p.held[slot] == p.room) {
        p.compact(p, slot);
        bound[i] = find_bound<T>(p, query + i, segment);
        if (score <= bound[i]) continue;
      }
      piece<Hit<T>>(p.candidates, 0)[slot * p.room + p.held[slot]++] = {score, key};
    }
  }
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
