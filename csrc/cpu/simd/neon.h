// The NEON vocabulary, of every AArch64 processor: 128-bit vectors. float16 is converted by instructions that all have,
// and bfloat16 rounded by one that most since ARMv8.6 have (FEAT_BF16), for a set of its own: for the others it takes
// seven in integers, with the same bits.
#pragma once
#include <arm_neon.h>

#include "../../sum.h"

#ifndef FUSIONSUM_ISA  // isa_neon_bf16.cpp has the same vocabulary
#define FUSIONSUM_ISA neon
#endif
#define FUSIONSUM_INLINE inline __attribute__((always_inline))

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {
#include "../../dtype.h"

#define FUSIONSUM_VECTOR_BYTES 16
#include "vectors.h"

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using V = F32;
  static constexpr int width = 4, tile_rows = 6, tile_vectors = 4;  // 24 of 32 registers hold a tile of scores
  static V broadcast(float x) { return vdupq_n_f32(x); }
  static unsigned passes(V a, V b) {  // a bit where a > b, or where one is NaN
    const uint32x4_t bits{1, 2, 4, 8};
    return vaddvq_u32(vbicq_u32(bits, vcleq_f32(a, b)));
  }
  static float max(V v) { return vmaxvq_f32(v); }
  // The entries of a and b in turn: the first halves of both, then the second.
  static void zip(V a, V b, V& low, V& high) {
    low = vzip1q_f32(a, b);
    high = vzip2q_f32(a, b);
  }
  static V load(const float* p) { return vld1q_f32(p); }
  static V load_part(const float* p, int count) {
    V v{p[0]};
    if (count > 1) v[1] = p[1];
    if (count > 2) v[2] = p[2];
    return v;
  }
  static void store(float* p, V v) { vst1q_f32(p, v); }
  static void store_part(float* p, V v, int count) {
    p[0] = v[0];
    if (count > 1) p[1] = v[1];
    if (count > 2) p[2] = v[2];
  }
  static void stream(float* p, V v) { store(p, v); }  // what stores past the caches, STNP, takes pairs of vectors only
  static float sum(V v) { return vaddvq_f32(v); }
};
template <>
struct Simd<double> {
  using V = F64;
  static constexpr int width = 2, tile_rows = 6, tile_vectors = 4;
  static V broadcast(double x) { return vdupq_n_f64(x); }
  static unsigned passes(V a, V b) {
    const uint64x2_t bits{1, 2};
    return static_cast<unsigned>(vaddvq_u64(vbicq_u64(bits, vcleq_f64(a, b))));
  }
  static double max(V v) { return vmaxvq_f64(v); }
  static void zip(V a, V b, V& low, V& high) {
    low = vzip1q_f64(a, b);
    high = vzip2q_f64(a, b);
  }
  static V load(const double* p) { return vld1q_f64(p); }
  static V load_part(const double* p, int) { return V{p[0]}; }
  static void store(double* p, V v) { vst1q_f64(p, v); }
  static void store_part(double* p, V v, int) { p[0] = v[0]; }
  static void stream(double* p, V v) { store(p, v); }
  static double sum(V v) { return vaddvq_f64(v); }
};

inline uint16x4_t load_bits(const void* p) { return vld1_u16(static_cast<const uint16_t*>(p)); }
inline void store_bits(void* p, uint16x4_t bits) { vst1_u16(static_cast<uint16_t*>(p), bits); }
inline F32 load_wide(const Bf16* p) { return reinterpret_cast<F32>(vshll_n_u16(load_bits(p), 16)); }
inline F32 load_wide(const F16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_bits(p))); }
inline void store_narrow(Bf16* p, F32 v, bool) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  store_bits(p, vreinterpret_u16_bf16(vcvt_bf16_f32(v)));
#else
  const uint32x4_t u = vreinterpretq_u32_f32(v);
  const uint32x4_t rounded = vsraq_n_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), vshlq_n_u32(u, 15), 31);  // + 1 where odd
  const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
  store_bits(p, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
#endif
}
inline void store_narrow(F16* p, F32 v, bool) { store_bits(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

inline F32 madd(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
inline F64 madd(F64 a, F64 b, F64 c) { return vfmaq_f64(c, a, b); }
inline F32 fused(F32 a, F32 b, F32 c) { return madd(a, b, c); }
inline F64 fused(F64 a, F64 b, F64 c) { return madd(a, b, c); }
inline F32 abs(F32 x) { return vabsq_f32(x); }
inline F64 abs(F64 x) { return vabsq_f64(x); }
inline F32 copysign(F32 x, F32 sign) { return vbslq_f32(vdupq_n_u32(1u << 31), sign, x); }
inline F64 copysign(F64 x, F64 sign) { return vbslq_f64(vdupq_n_u64(uint64_t{1} << 63), sign, x); }
template <class Mask>
inline F32 select(Mask condition, F32 a, F32 b) {
  return vbslq_f32(reinterpret_cast<uint32x4_t>(condition), a, b);
}
template <class Mask>
inline F64 select(Mask condition, F64 a, F64 b) {
  return vbslq_f64(reinterpret_cast<uint64x2_t>(condition), a, b);
}
inline F32 select_negative(F32 x, F32 a, F32 b) { return select(vcltzq_s32(reinterpret_cast<int32x4_t>(x)), a, b); }
inline F64 select_negative(F64 x, F64 a, F64 b) { return select(vcltzq_s64(reinterpret_cast<int64x2_t>(x)), a, b); }
// NaN stays, as a bound is ignored that is NaN: FMAX would return it, and FMAXNM lose x.
template <class V>
inline V at_least(V x, V bound) {
  return select(x < bound, bound, x);
}
template <class V>
inline V at_most(V x, V bound) {
  return select(x > bound, bound, x);
}

#include "../../formula.h"
}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
