// Operands that are not packed: unaligned, of mixed dtypes, of any stride or count.
#include "kernel.cuh"

namespace fusionsum {
namespace cuda {
extern const Kernels kernels_loose64 = loose_kernels<double>();
}
}  // namespace fusionsum
