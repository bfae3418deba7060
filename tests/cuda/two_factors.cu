// The kernels of two float32 operands alone, which compile in seconds: what planted bugs (planted.py) are planted into.
//
// Together with launch.cu, plan.cpp and combine.cu this is a library. Two varying operands of float32 have kernels
// here, packed and loose, and other numbers of loose ones have that for any number; other calls have none:
// test_planted.py makes no such call.
#include "cuda/sum/kernel.cuh"

namespace fusionsum {
namespace cuda {
namespace {
constexpr Kernels of_width(int width) {
  Kernels table{};
  for (auto& of_count : table.width)
    for (auto& of_kernel : of_count)
      for (int& columns : of_kernel) columns = width;
  return table;
}
constexpr Kernels two_factors() {
  Kernels table = of_width(4);
  add_packed<float, 2>(table);
  return table;
}
constexpr Kernels two_loose_factors() {
  Kernels table{};
  for (const int count : {0, 2, 3, 4})
    for (const int grad : {0, 1})
      for (const int extra : {0, 1}) {
        table.rows[count][grad][extra] = rows<Loose<float, 1>, kAnyCount, true, true>;
        table.columns[count][grad][extra] = columns<Loose<float, 1>, kAnyCount, true, true>;
        table.width[count][0][extra] = table.width[count][1][extra] = 1;
      }
  add_loose<float, 2>(table);
  return table;
}
}  // namespace
extern const Kernels kernels_f32 = two_factors();
extern const Kernels kernels_f64 = of_width(2), kernels_bf16 = of_width(8), kernels_f16 = of_width(8);
extern const Kernels kernels_loose32 = two_loose_factors(), kernels_loose64 = of_width(1);
}  // namespace cuda
}  // namespace fusionsum
