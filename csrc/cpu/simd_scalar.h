// The scalar vocabulary: a vector of one. Portable C++; the fallback on every machine, and the baseline of the tests.
#pragma once
#include "../fusion.h"

#define FUSIONSUM_ISA scalar
#define FORM_INLINE inline

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {
#include "../dtype.h"

template <class T>
struct Simd {
  using V = T;
  static constexpr int width = 1;
  static V load(const T* p) { return *p; }
  static V load_part(const T* p, int) { return *p; }
  static void store(T* p, V v) { *p = v; }
  static void store_part(T* p, V v, int) { *p = v; }
  static void stream(T* p, V v) { *p = v; }
  static T sum(V v) { return v; }
};
template <class V>
using Scalar = V;

inline float load_wide(const Bf16* p) { return widen(*p); }
inline float load_wide(const F16* p) { return widen(*p); }
inline void store_narrow(Bf16* p, float v, bool) { narrow(v, p); }
inline void store_narrow(F16* p, float v, bool) { narrow(v, p); }

inline float madd(float a, float b, float c) { return a * b + c; }
inline double madd(double a, double b, double c) { return a * b + c; }
// A product of two floats is exact in double; doubles take the library's fma, used once per gelu.
inline float fused(float a, float b, float c) { return static_cast<float>(static_cast<double>(a) * b + c); }
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float abs(float x) { return __builtin_fabsf(x); }
inline double abs(double x) { return __builtin_fabs(x); }
inline float copysign(float x, float sign) { return __builtin_copysignf(x, sign); }
inline double copysign(double x, double sign) { return __builtin_copysign(x, sign); }
template <class V>
V select(bool condition, V a, V b) {
  return condition ? a : b;
}
template <class V>
V select_negative(V x, V a, V b) {
  return x < 0 ? a : b;
}
template <class V>
V at_least(V x, V bound) {  // NaN stays
  return x < bound ? bound : x;
}
template <class V>
V at_most(V x, V bound) {
  return x > bound ? bound : x;
}
// 2^n is lifted into the normal range and dropped again, so that subnormal results round once. NaN n gives any exponent: a is
// NaN too.
inline float scaled(float a, float n) {
  return a * float_of(static_cast<uint32_t>(n == n ? static_cast<int>(n) + 127 + 64 : 0) << 23) * 0x1p-64f;
}
inline double scaled(double a, double n) {
  const uint64_t u = static_cast<uint64_t>(n == n ? static_cast<int64_t>(n) + 1023 + 512 : 0) << 52;
  double power;
  __builtin_memcpy(&power, &u, 8);
  return a * power * 0x1p-512;
}

#include "../form.h"
}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
