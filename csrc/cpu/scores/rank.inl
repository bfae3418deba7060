// The rank epilogue: how many of a row's scores are above its target's, and how many equal to it.
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

template <class T>
void rank_row(const Scores& s, int64_t b, T target, const Keys<T>& keys, T* row, int64_t& greater, int64_t& equal) {
  using L = Simd<T>;
  using V = typename L::V;
  if (target != target) {  // its rank is the last
    for (int64_t j = 0; j < keys.count; ++j)
      greater += keys.first + j != s.targets[b] && !is_excluded(s, b, keys.first + j);
    return;
  }
  const T nan = static_cast<T>(__builtin_nan(""));
  leave_out(s, b, keys, nan, row);
  keys.with(s.targets[b], [&](int64_t j) { row[j] = nan; });
  for (int64_t j = keys.count; j < keys.padded; ++j) row[j] = nan;
  V above{}, same{};
  const V one = L::broadcast(1), score_of_target = L::broadcast(target);
  for (int64_t j = 0; j < keys.padded; j += L::width) {
    const V score = L::load(row + j);
    above = above + select(score > score_of_target, one, V{});
    same = same + select(score == score_of_target, one, V{});
  }
  greater += static_cast<int64_t>(L::sum(above));
  equal += static_cast<int64_t>(L::sum(same));
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
