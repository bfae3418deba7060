#include "kernel.cuh"

namespace fusionsum {
namespace cuda {
extern const Kernels kernels_f32 = packed_kernels<float>();
}
}  // namespace fusionsum
