// AVX-512 on a processor without it: csrc/cpu/simd/avx512.h as it stands, its intrinsics in AVX2, FMA and F16C by
// SIMDe.
//
// CMakeLists.txt (FUSIONSUM_SIMDE) puts this file before the compiler's <immintrin.h>. What lives elsewhere: the tests,
// which are those of every instruction set (test_kernel.py).
#pragma once
#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

namespace simde_lacks {

inline __m256 low(__m512 v) { return _mm512_castps512_ps256(v); }
inline __m256 high(__m512 v) { return _mm512_extractf32x8_ps(v, 1); }

// Those that SIMDe 0.8.2 does not have.
inline __m256i cvtepi32_epi16(__m512i v) {
  typedef int I32 __attribute__((vector_size(64)));
  typedef short I16 __attribute__((vector_size(32)));
  return reinterpret_cast<__m256i>(__builtin_convertvector(reinterpret_cast<I32>(v), I16));
}
template <int kRounding>
inline __m256i cvtps_ph(__m512 v) {
  return _mm256_set_m128i(_mm256_cvtps_ph(high(v), kRounding), _mm256_cvtps_ph(low(v), kRounding));
}
inline void stream_ps(float* p, __m512 v) {
  _mm256_stream_ps(p, low(v));
  _mm256_stream_ps(p + 8, high(v));
}
inline void stream_pd(double* p, __m512d v) {
  _mm256_stream_pd(p, _mm512_castpd512_pd256(v));
  _mm256_stream_pd(p + 4, _mm512_extractf64x4_pd(v, 1));
}

// Those that it has otherwise: its masked loads and stores touch the entries that the mask leaves out, and its scalef
// takes subnormals for 0. n is a whole number here, as in the vocabulary.
template <class V, class T>
inline V load_part(unsigned mask, const T* p) {
  V v{};
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) v[i] = p[i];
  return v;
}
template <class V, class T>
inline void store_part(T* p, unsigned mask, V v) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) p[i] = v[i];
}
template <class V>
inline V scalef(V a, V n) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) a[i] = __builtin_scalbn(a[i], static_cast<int>(n[i]));
  return a;
}

}  // namespace simde_lacks

// Macros, because the compiler's header has functions of these names, which it inlines only for a processor that has
// AVX-512.
#undef _mm512_maskz_loadu_ps
#undef _mm512_maskz_loadu_pd
#undef _mm512_mask_storeu_ps
#undef _mm512_mask_storeu_pd
#undef _mm512_scalef_ps
#undef _mm512_scalef_pd
#define _mm512_maskz_extractf32x8_ps(mask, v, which) _mm256_maskz_mov_ps(mask, _mm512_extractf32x8_ps(v, which))
#define _mm512_cvtepi32_epi16(v) simde_lacks::cvtepi32_epi16(v)
#define _mm512_cvtps_ph(v, rounding) simde_lacks::cvtps_ph<rounding>(v)
#define _mm512_stream_ps(p, v) simde_lacks::stream_ps(p, v)
#define _mm512_stream_pd(p, v) simde_lacks::stream_pd(p, v)
#define _mm512_maskz_loadu_ps(mask, p) simde_lacks::load_part<__m512>(mask, p)
#define _mm512_maskz_loadu_pd(mask, p) simde_lacks::load_part<__m512d>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) simde_lacks::store_part<__m512>(p, mask, v)
#define _mm512_mask_storeu_pd(p, mask, v) simde_lacks::store_part<__m512d>(p, mask, v)
#define _mm512_scalef_ps(a, n) simde_lacks::scalef<__m512>(a, n)
#define _mm512_scalef_pd(a, n) simde_lacks::scalef<__m512d>(a, n)
