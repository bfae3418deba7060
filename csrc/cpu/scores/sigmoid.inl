// The sigmoid epilogue: the losses of rows of scores, softplus(-z S) with z = 1 for positives and -1 for all others
// (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training"); and Gamma, the derivative by each score.
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

// Adds the losses of query b.
template <class T>
void sigmoid_row(const Scores& s, int64_t b, const Keys<T>& keys, T* row) {
  using L = Simd<T>;
  using V = typename L::V;
  leave_out(s, b, keys, -kInfinity<T>, row);  // whose loss and derivative are 0
  const auto negate = [&](int64_t j) { row[j] = -row[j]; };
  for_positives(s, b, keys, negate);
  V sum{};
  for (int64_t j = 0; j < keys.padded; j += L::width) sum = sum + softplus(L::load(row + j));
  for_positives(s, b, keys, negate);
  s.losses[b] += static_cast<double>(L::sum(sum));
}

// Adds them too, and turns the row of scores into Gamma.
template <class T>
void sigmoid_gamma(const Scores& s, int64_t b, const Keys<T>& keys, T* row) {
  using L = Simd<T>;
  sigmoid_row(s, b, keys, row);
  const T coef = static_cast<T>(s.query_coefs[b]);
  for_positives(s, b, keys, [&](int64_t j) { row[j] = -row[j]; });
  for (int64_t j = 0; j < keys.padded; j += L::width)
    L::store(row + j, L::broadcast(coef) * sigmoid_value(L::load(row + j)).y);
  for_positives(s, b, keys, [&](int64_t j) { row[j] = -row[j]; });  // sigmoid(S) - 1 = -sigmoid(-S)
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
