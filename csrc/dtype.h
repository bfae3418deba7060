// The types of the list of dtypes (lists.h), and their conversions one value at a time. Vector conversions are each
// instruction set's own.
//
// Included inside an instruction set's namespace (cpu/simd/<isa>.h): no symbol compiled with that set's flags may be
// shared.

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Calls f(pointer of the right type) for a dtype.
template <class F>
FUSIONSUM_INLINE void with_dtype(DType dtype, const void* p, F f) {
  switch (dtype) {
#define CASE(name, type, ...)       \
  case DType::name:                 \
    f(static_cast<const type*>(p)); \
    break;
    FUSIONSUM_DTYPES(CASE)
#undef CASE
    default:
      __builtin_unreachable();
  }
}

FUSIONSUM_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
FUSIONSUM_INLINE float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

FUSIONSUM_INLINE double widen(double x) { return x; }
FUSIONSUM_INLINE float widen(float x) { return x; }
FUSIONSUM_INLINE float widen(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
FUSIONSUM_INLINE float widen(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13 | ((rest & 0x3ffu) ? 0x400000u : 0u));
  // A subnormal half times 2^-24 is exact in float, and so is the shift of exponents for the others.
  const float magnitude = rest < 0x400u ? static_cast<float>(rest) * 0x1p-24f : float_of((rest << 13) + (112u << 23));
  return float_of(sign | bits_of(magnitude));
}

// Round to nearest, ties to even, as the hardware does; NaN stays a quiet NaN.
FUSIONSUM_INLINE void narrow(double x, double* to) { *to = x; }
FUSIONSUM_INLINE void narrow(double x, float* to) { *to = static_cast<float>(x); }
FUSIONSUM_INLINE void narrow(float x, Bf16* to) {
  const uint32_t u = bits_of(x);
  to->bits = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
FUSIONSUM_INLINE void narrow(float x, F16* to) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u | ((rest >> 13) & 0x3ffu);
  } else if (rest >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, in the low mantissa
    half = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}
// A float64 is rounded to a 16-bit type by way of float32. The first step rounds to odd: an inexact result gets an odd
// last bit, so that it never looks like a tie to the second step, and both steps together round as one would.
FUSIONSUM_INLINE float round_to_odd(double x) {
  const float f = static_cast<float>(x);
  if (static_cast<double>(f) == x || x != x || (bits_of(f) & 0x7fffffffu) == 0x7f800000u) return f;
  const bool away = (static_cast<double>(f) > x) == (x > 0);
  const uint32_t truncated = bits_of(f) - (away ? 1u : 0u);
  return float_of(truncated | 1u);
}
FUSIONSUM_INLINE void narrow(double x, Bf16* to) { narrow(round_to_odd(x), to); }
FUSIONSUM_INLINE void narrow(double x, F16* to) { narrow(round_to_odd(x), to); }
