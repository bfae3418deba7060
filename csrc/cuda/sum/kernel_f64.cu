#include "kernel.cuh"

namespace fusionsum {
namespace cuda {
extern const Kernels kernels_f64 = packed_kernels<double>();
}
}  // namespace fusionsum
