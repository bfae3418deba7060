#include "kernel.cuh"

namespace fusionsum {
namespace cuda {
extern const Kernels kernels_bf16 = kernels<Bf16>();
}
}  // namespace fusionsum
