#include "kernel.cuh"

namespace fusionsum {
namespace cuda {
extern const Kernels kernels_f32 = kernels<float>();
}
}  // namespace fusionsum
