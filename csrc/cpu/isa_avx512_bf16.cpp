// Scores of bf16 by pairs; all else is avx512's, compiled there.
#include "simd/avx512_bf16.h"
#include "sum/walk.inl"
#include "scores/walk.inl"
#include "scores/bf16_pairs.inl"
#include "isa.h"

namespace fusionsum {
namespace avx512 {
extern const SumKernels sum_kernels;
extern const ScoreKernels score_kernels;
}  // namespace avx512
namespace avx512_bf16 {

extern const ScoreKernels pair_kernels = {
    {Shape<float>::rows, 0}, {Shape<float>::cols, 0}, {score<Bf16Pairs>, nullptr}, true};
extern const Isa isa = {"avx512_bf16", &avx512::sum_kernels, &avx512::score_kernels, &pair_kernels};

}  // namespace avx512_bf16
}  // namespace fusionsum
