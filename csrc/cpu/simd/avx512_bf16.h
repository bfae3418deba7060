// The AVX-512 vocabulary and pairs of bf16 (AVX512_BF16), each of which is carried as one float: the first in its low
// half.
#pragma once
#define FUSIONSUM_ISA avx512_bf16
#include "avx512.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

// Rounds to nearest, ties to even; subnormals become zeros.
inline F32 pair(F32 first, F32 second) {
  const __m512i places =
      _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                        0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
  const auto rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(places, rounded));
}
// Adds both products of pairs to c; what is subnormal counts as zero.
inline F32 dot_pairs(F32 a, F32 b, F32 c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
