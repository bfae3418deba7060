// NEON with FEAT_BF16, by which the vocabulary rounds to bfloat16.
#define FUSIONSUM_ISA neon_bf16
#include "simd/neon.h"
#include "sum/walk.inl"
#include "scores/walk.inl"
#include "isa.inl"
