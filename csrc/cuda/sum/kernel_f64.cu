#include "kernel.cuh"

namespace fusionsum {
namespace cuda {
extern const Kernels kernels_f64 = kernels<double>();
}
}  // namespace fusionsum
