// The AVX2 + FMA + F16C vocabulary: 256-bit vectors. A set of another width is a file like this one, and no more.
#pragma once
#include <immintrin.h>

#include "../../sum.h"

#define FUSIONSUM_ISA avx2
#define FUSIONSUM_INLINE inline __attribute__((always_inline))

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {
#include "../../dtype.h"

#define FUSIONSUM_VECTOR_BYTES 32
#include "vectors.h"

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using V = F32;
  static constexpr int width = 8, tile_rows = 6, tile_vectors = 2;  // 12 of 16 registers hold a tile of scores
  static V broadcast(float x) { return _mm256_set1_ps(x); }
  static unsigned passes(V a, V b) {  // a bit where a > b, or where one is NaN
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
  }
  static float max(V v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  // The entries of a and b in turn: the first halves of both, then the second.
  static void zip(V a, V b, V& low, V& high) {
    const __m256 l = _mm256_unpacklo_ps(a, b), h = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(l, h, 0x20);
    high = _mm256_permute2f128_ps(l, h, 0x31);
  }
  static __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load_part(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store_part(float* p, V v, int count) { _mm256_maskstore_ps(p, first(count), v); }
  static void stream(float* p, V v) { _mm256_stream_ps(p, v); }
  static float sum(V v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};
template <>
struct Simd<double> {
  using V = F64;
  static constexpr int width = 4, tile_rows = 6, tile_vectors = 2;
  static V broadcast(double x) { return _mm256_set1_pd(x); }
  static unsigned passes(V a, V b) {
    return static_cast<unsigned>(_mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_NLE_UQ)));
  }
  static double max(V v) {
    const __m128d m = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
  }
  static void zip(V a, V b, V& low, V& high) {
    const __m256d l = _mm256_unpacklo_pd(a, b), h = _mm256_unpackhi_pd(a, b);
    low = _mm256_permute2f128_pd(l, h, 0x20);
    high = _mm256_permute2f128_pd(l, h, 0x31);
  }
  static __m256i first(int count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static V load(const double* p) { return _mm256_loadu_pd(p); }
  static V load_part(const double* p, int count) { return _mm256_maskload_pd(p, first(count)); }
  static void store(double* p, V v) { _mm256_storeu_pd(p, v); }
  static void store_part(double* p, V v, int count) { _mm256_maskstore_pd(p, first(count), v); }
  static void stream(double* p, V v) { _mm256_stream_pd(p, v); }
  static double sum(V v) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
};

inline F32 load_wide(const Bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F32 load_wide(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_bits(void* p, __m128i bits, bool stream) {
  if (stream) {
    _mm_stream_si128(static_cast<__m128i*>(p), bits);
  } else {
    _mm_storeu_si128(static_cast<__m128i*>(p), bits);
  }
}
inline void store_narrow(Bf16* p, F32 v, bool stream) {
  const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  store_bits(p, _mm256_castsi256_si128(packed), stream);
}
inline void store_narrow(F16* p, F32 v, bool stream) {
  store_bits(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), stream);
}

inline F32 madd(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F64 madd(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }
inline F32 fused(F32 a, F32 b, F32 c) { return madd(a, b, c); }
inline F64 fused(F64 a, F64 b, F64 c) { return madd(a, b, c); }
inline F32 abs(F32 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline F64 abs(F64 x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }
inline F32 copysign(F32 x, F32 sign) { return _mm256_or_ps(abs(x), _mm256_and_ps(sign, _mm256_set1_ps(-0.0f))); }
inline F64 copysign(F64 x, F64 sign) { return _mm256_or_pd(abs(x), _mm256_and_pd(sign, _mm256_set1_pd(-0.0))); }
template <class Mask>
inline F32 select(Mask condition, F32 a, F32 b) {
  return _mm256_blendv_ps(b, a, reinterpret_cast<F32>(condition));
}
template <class Mask>
inline F64 select(Mask condition, F64 a, F64 b) {
  return _mm256_blendv_pd(b, a, reinterpret_cast<F64>(condition));
}
inline F32 select_negative(F32 x, F32 a, F32 b) { return _mm256_blendv_ps(b, a, x); }
inline F64 select_negative(F64 x, F64 a, F64 b) { return _mm256_blendv_pd(b, a, x); }
// min and max return their second operand where one is NaN.
inline F32 at_least(F32 x, F32 bound) { return _mm256_max_ps(bound, x); }
inline F64 at_least(F64 x, F64 bound) { return _mm256_max_pd(bound, x); }
inline F32 at_most(F32 x, F32 bound) { return _mm256_min_ps(bound, x); }
inline F64 at_most(F64 x, F64 bound) { return _mm256_min_pd(bound, x); }

#include "../../formula.h"
}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
