// The vocabulary of formula.h for single numbers: what the scalar instruction set and every CUDA thread computes with.
//
// Included after dtype.h inside a namespace, by cpu/simd/scalar.h and cuda/gpu.h, which define FUSIONSUM_INLINE, and
// FUSIONSUM_FUSES where a fused multiply-add costs no more than a product.
template <class V>
using Scalar = V;

#if defined(FUSIONSUM_FUSES)
FUSIONSUM_INLINE float fused(float a, float b, float c) { return fmaf(a, b, c); }
FUSIONSUM_INLINE double fused(double a, double b, double c) { return fma(a, b, c); }
template <class V>
FUSIONSUM_INLINE V madd(V a, V b, V c) {
  return fused(a, b, c);
}
#else
// A product of two floats is exact in double; doubles take the library's fma, used once per gelu.
FUSIONSUM_INLINE float fused(float a, float b, float c) { return static_cast<float>(static_cast<double>(a) * b + c); }
FUSIONSUM_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <class V>
FUSIONSUM_INLINE V madd(V a, V b, V c) {
  return a * b + c;
}
#endif
FUSIONSUM_INLINE float abs(float x) { return __builtin_fabsf(x); }
FUSIONSUM_INLINE double abs(double x) { return __builtin_fabs(x); }
FUSIONSUM_INLINE float copysign(float x, float sign) { return __builtin_copysignf(x, sign); }
FUSIONSUM_INLINE double copysign(double x, double sign) { return __builtin_copysign(x, sign); }
template <class V>
FUSIONSUM_INLINE V select(bool condition, V a, V b) {
  return condition ? a : b;
}
template <class V>
FUSIONSUM_INLINE V select_negative(V x, V a, V b) {
  return x < 0 ? a : b;
}
template <class V>
FUSIONSUM_INLINE V at_least(V x, V bound) {  // NaN stays
  return x < bound ? bound : x;
}
template <class V>
FUSIONSUM_INLINE V at_most(V x, V bound) {
  return x > bound ? bound : x;
}
// 2^n is lifted into the normal range and dropped again, so that subnormal results round once. NaN n gives any
// exponent: a is NaN too.
FUSIONSUM_INLINE float scaled(float a, float n) {
  return a * float_of(static_cast<uint32_t>(n == n ? static_cast<int>(n) + 127 + 64 : 0) << 23) * 0x1p-64f;
}
FUSIONSUM_INLINE double scaled(double a, double n) {
  const uint64_t u = static_cast<uint64_t>(n == n ? static_cast<int64_t>(n) + 1023 + 512 : 0) << 52;
  double power;
  __builtin_memcpy(&power, &u, 8);
  return a * power * 0x1p-512;
}
