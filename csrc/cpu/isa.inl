// The instruction set whose vocabulary and kernels the including file, isa_<name>.cpp, has brought in.
#include "isa.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {

#define FUSIONSUM_STRING(name) #name
#define FUSIONSUM_NAME(name) FUSIONSUM_STRING(name)
extern const Isa isa = {FUSIONSUM_NAME(FUSIONSUM_ISA), kSumKernels, kScoreKernels};

}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
