// The instruction set whose vocabulary and kernels the including file, isa_<name>.cpp, has brought in.
#include "isa.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {

#define FUSIONSUM_STRING(name) #name
#define FUSIONSUM_NAME(name) FUSIONSUM_STRING(name)
extern const SumKernels sum_kernels = {{walk<float>, walk<double>}, {combine<float>, combine<double>}};
extern const ScoreKernels score_kernels = {{Shape<float>::rows, Shape<double>::rows},
                                           {Shape<float>::cols, Shape<double>::cols},
                                           {score<Plain<float>>, score<Plain<double>>},
                                           false};
extern const Isa isa = {FUSIONSUM_NAME(FUSIONSUM_ISA), &sum_kernels, &score_kernels, nullptr};

}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
