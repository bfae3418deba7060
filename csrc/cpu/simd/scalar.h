// The scalar vocabulary: a vector of one. Portable C++; the fallback on every machine, and the baseline of the tests.
#pragma once
#include "../../sum.h"

#define FUSIONSUM_ISA scalar
#define FUSIONSUM_INLINE inline

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {
#include "../../dtype.h"

template <class T>
struct Simd {
  using V = T;
  static constexpr int width = 1, tile_rows = 4, tile_vectors = 4;
  static V broadcast(T x) { return x; }
  static unsigned passes(V a, V b) { return !(a <= b); }
  static T max(V v) { return v; }
  static void zip(V a, V b, V& low, V& high) {
    low = a;
    high = b;
  }
  static V load(const T* p) { return *p; }
  static V load_part(const T* p, int) { return *p; }
  static void store(T* p, V v) { *p = v; }
  static void store_part(T* p, V v, int) { *p = v; }
  static void stream(T* p, V v) { *p = v; }
  static T sum(V v) { return v; }
};
inline float load_wide(const Bf16* p) { return widen(*p); }
inline float load_wide(const F16* p) { return widen(*p); }
inline void store_narrow(Bf16* p, float v, bool) { narrow(v, p); }
inline void store_narrow(F16* p, float v, bool) { narrow(v, p); }

#include "../../scalar.h"
#include "../../formula.h"
}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
