#include "kernel.cuh"

namespace fusionsum {
namespace cuda {
extern const Kernels kernels_f16 = packed_kernels<F16>();
}
}  // namespace fusionsum
