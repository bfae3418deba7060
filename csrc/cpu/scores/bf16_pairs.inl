// Lanes of two bf16: a row's neighbouring entries, multiplied and added by one instruction (simd/avx512_bf16.h).
//
// What is formed in float32, the products of factors and Gamma, is rounded to bf16 (../../scores.h says the error); a
// row of an odd number of entries ends with a zero.
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

struct Bf16Pairs {
  using Lane = float;
  using Entry = Bf16;
  using V = F32;
  static constexpr int per_lane = 2;

  static V multiply_add(V a, V b, V c) { return dot_pairs(a, b, c); }
  static void form(const Side& side, double absent, int64_t terms, int64_t row, float* to, float* room) {
    form_row(side, absent, terms, row, room, room + terms);
    round_row(room, terms, to);
  }
  template <class Access>
  static V load(Access access, const Rows<Bf16>& rows, int64_t count, int64_t i, int64_t at) {
    return pair(access.load(rows.row(2 * i) + at), 2 * i + 1 < count ? access.load(rows.row(2 * i + 1) + at) : V{});
  }
  static const float* by_rows(const float* matrix, int64_t step, int64_t rows, int64_t cols, float* to) {
    for (int64_t r = 0; r < rows; ++r) round_row(matrix + r * step, cols, to + r * (step / 2));
    return to;
  }
  static const float* by_columns(const float* matrix, int64_t step, int64_t rows, int64_t cols, float* to) {
    for (int64_t r = 0; r < rows; r += 2)
      along<float>(0, cols, [&](auto access, int64_t j) {
        const float* const from = matrix + r * step + j;
        access.store(to + r / 2 * step + j, pair(access.load(from), r + 1 < rows ? access.load(from + step) : V{}),
                     false);
      });
    return to;
  }

 private:
  static void round_row(const float* from, int64_t count, float* to) {
    Bf16* const entries = static_cast<Bf16*>(static_cast<void*>(to));
    store_row(entries, 1, from, count, false);
    if (count % 2) entries[count] = Bf16{0};
  }
};

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
