// The AVX-512 vocabulary (F, BW, DQ, VL): 512-bit vectors.
#pragma once
#include <immintrin.h>

#include "../../sum.h"

#ifndef FUSIONSUM_ISA  // avx512_bf16.h adds to this vocabulary
#define FUSIONSUM_ISA avx512
#endif
#define FUSIONSUM_INLINE inline __attribute__((always_inline))

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {
#include "../../dtype.h"

#define FUSIONSUM_VECTOR_BYTES 64
#include "vectors.h"

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using V = F32;
  static constexpr int width = 16, tile_rows = 6, tile_vectors = 4;  // 24 of 32 registers hold a tile of scores
  static V broadcast(float x) { return _mm512_set1_ps(x); }
  // A bit where a > b, or where one is NaN.
  static unsigned passes(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
  static float max(V v) {
    const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_maskz_extractf32x8_ps(0xff, v, 1));
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  // The entries of a and b in turn: the first halves of both, then the second.
  static void zip(V a, V b, V& low, V& high) {
    const __m512i first_half = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low = _mm512_permutex2var_ps(a, first_half, b);
    high = _mm512_permutex2var_ps(a, _mm512_add_epi32(first_half, _mm512_set1_epi32(8)), b);
  }
  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load_part(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static void store_part(float* p, V v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
  static void stream(float* p, V v) { _mm512_stream_ps(p, v); }
  static float sum(V v) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_maskz_extractf32x8_ps(0xff, v, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};
template <>
struct Simd<double> {
  using V = F64;
  static constexpr int width = 8, tile_rows = 6, tile_vectors = 4;
  static V broadcast(double x) { return _mm512_set1_pd(x); }
  static unsigned passes(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ); }
  static double max(V v) {
    const __m256d h = _mm256_max_pd(_mm512_castpd512_pd256(v), _mm512_maskz_extractf64x4_pd(0xf, v, 1));
    const __m128d m = _mm_max_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
    return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
  }
  static void zip(V a, V b, V& low, V& high) {
    const __m512i first_half = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    low = _mm512_permutex2var_pd(a, first_half, b);
    high = _mm512_permutex2var_pd(a, _mm512_add_epi64(first_half, _mm512_set1_epi64(4)), b);
  }
  static __mmask8 first(int count) { return static_cast<__mmask8>((1u << count) - 1); }
  static V load(const double* p) { return _mm512_loadu_pd(p); }
  static V load_part(const double* p, int count) { return _mm512_maskz_loadu_pd(first(count), p); }
  static void store(double* p, V v) { _mm512_storeu_pd(p, v); }
  static void store_part(double* p, V v, int count) { _mm512_mask_storeu_pd(p, first(count), v); }
  static void stream(double* p, V v) { _mm512_stream_pd(p, v); }
  static double sum(V v) {
    const __m256d h = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_maskz_extractf64x4_pd(0xf, v, 1));
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
};

inline F32 load_wide(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline F32 load_wide(const F16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_bits(void* p, __m256i bits, bool stream) {
  if (stream) {
    _mm256_stream_si256(static_cast<__m256i*>(p), bits);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
  }
}
inline void store_narrow(Bf16* p, F32 v, bool stream) {
  const __m512i u = _mm512_castps_si512(v), high = _mm512_srli_epi32(u, 16),
                odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  store_bits(p, _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40))), stream);
}
inline void store_narrow(F16* p, F32 v, bool stream) {
  store_bits(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), stream);
}

inline F32 madd(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F64 madd(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
inline F32 fused(F32 a, F32 b, F32 c) { return madd(a, b, c); }
inline F64 fused(F64 a, F64 b, F64 c) { return madd(a, b, c); }
inline F32 abs(F32 x) { return _mm512_abs_ps(x); }
inline F64 abs(F64 x) { return _mm512_abs_pd(x); }
// Where the mask has a bit, the second operand's, else the first's.
inline F32 copysign(F32 x, F32 sign) {
  const __m512i bits = _mm512_castps_si512(x), signs = _mm512_castps_si512(sign);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits, signs, _mm512_set1_epi32(INT32_MIN), 0xd8));
}
inline F64 copysign(F64 x, F64 sign) {
  const __m512i bits = _mm512_castpd_si512(x), signs = _mm512_castpd_si512(sign);
  return _mm512_castsi512_pd(_mm512_ternarylogic_epi64(bits, signs, _mm512_set1_epi64(INT64_MIN), 0xd8));
}
template <class Mask, class V>
inline V select(Mask condition, V a, V b) {
  return condition ? a : b;
}
inline F32 select_negative(F32 x, F32 a, F32 b) {
  return _mm512_mask_mov_ps(b, _mm512_movepi32_mask(_mm512_castps_si512(x)), a);
}
inline F64 select_negative(F64 x, F64 a, F64 b) {
  return _mm512_mask_mov_pd(b, _mm512_movepi64_mask(_mm512_castpd_si512(x)), a);
}
// min and max return their second operand where one is NaN.
inline F32 at_least(F32 x, F32 bound) { return _mm512_max_ps(bound, x); }
inline F64 at_least(F64 x, F64 bound) { return _mm512_max_pd(bound, x); }
inline F32 at_most(F32 x, F32 bound) { return _mm512_min_ps(bound, x); }
inline F64 at_most(F64 x, F64 bound) { return _mm512_min_pd(bound, x); }
inline F32 scaled(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }
inline F64 scaled(F64 a, F64 n) { return _mm512_scalef_pd(a, n); }

#include "../../formula.h"
}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
