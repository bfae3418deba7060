// Strided, unaligned or mixed operands, and more than four varying ones: one value at a time.
#include "kernel.cuh"

namespace fusionsum {
namespace cuda {
extern const Kernels kernels_any32 = kernels<Any<float>>();
extern const Kernels kernels_any64 = kernels<Any<double>>();
}  // namespace cuda
}  // namespace fusionsum
