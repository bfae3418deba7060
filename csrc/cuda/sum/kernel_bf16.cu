#include "kernel.cuh"

namespace fusionsum {
namespace cuda {
extern const Kernels kernels_bf16 = packed_kernels<Bf16>();
}
}  // namespace fusionsum
