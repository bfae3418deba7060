// The kernels of two float32 operands alone, which compile in seconds: what planted bugs (planted.py) are planted into.
//
// Together with launch.cu, plan.cpp, combine.cu and kernel_any.cu this is a library. Two packed varying operands of
// float32 have kernels here, any that are not packed have kernel_any.cu's; other packed calls have none:
// test_planted.py makes no such call.
#include "cuda/sum/kernel.cuh"

namespace fusionsum {
namespace cuda {
namespace {
constexpr Kernels two_factors() {
  Kernels table{};
  table.width = Storage<float>::width;
  add<float, 2>(table);
  return table;
}
constexpr Kernels none() {
  Kernels table{};
  table.width = 1;
  return table;
}
}  // namespace
extern const Kernels kernels_f32 = two_factors();
extern const Kernels kernels_f64 = none(), kernels_bf16 = none(), kernels_f16 = none();
}  // namespace cuda
}  // namespace fusionsum
