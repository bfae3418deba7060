// The softmax epilogue: statistics of rows and columns of scores, from which log-sum-exps and contrastive losses are
// made; and Gamma, the derivative by each score.
//
// Sums of exponentials are relative to a reference, a score seen before, which is raised when a score exceeds it by
// more than kMargin: any score is safe, and few are the reason to rescale. Sums run in T over a strip, then in float64.
// References are finite: a score of +inf makes the sum infinite, whatever the others are but NaN.
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

inline void raise(Statistics& of, double reference) {
  of.sum *= __builtin_exp(of.reference - reference);
  of.reference = reference;
}

// A positive's score, `any`: as one more term of a sum of exponentials.
inline void add_positive(Statistics& to, double score, bool any) {
  to.positives += 1;
  if (!any) {
    to.positive += score;
  } else if (score > to.positive_reference) {
    to.positive = to.positive * __builtin_exp(to.positive_reference - score) + 1;
    to.positive_reference = score;
  } else {
    to.positive += score == to.positive_reference ? 1 : __builtin_exp(score - to.positive_reference);  // both +inf, too
  }
}

// Brings the keys' references to what was seen of them in earlier strips.
template <class T>
void begin_keys(const Scores& s, const Keys<T>& keys) {
  for (int64_t j = 0; j < keys.padded; ++j) {
    keys.reference[j] = j < keys.count ? static_cast<T>(s.key_stats[keys.first + j].reference) : kLowest<T>;
    keys.sum[j] = 0;
  }
}
template <class T>
void end_keys(const Scores& s, const Keys<T>& keys) {
  for (int64_t j = 0; j < keys.count; ++j) {
    Statistics& key = s.key_stats[keys.first + j];
    if (static_cast<double>(keys.reference[j]) != key.reference) raise(key, static_cast<double>(keys.reference[j]));
    key.sum += static_cast<double>(keys.sum[j]);
  }
}

template <class T>
void softmax_row(const Scores& s, int64_t b, const Keys<T>& keys, T* row) {
  using L = Simd<T>;
  using V = typename L::V;
  leave_out(s, b, keys, -kInfinity<T>, row);
  Statistics& query = s.query_stats[b];

  V top = L::broadcast(kLowest<T>), over = V{};
  for (int64_t j = 0; j < keys.padded; j += L::width) {
    const V score = L::load(row + j);
    top = at_least(top, score);
    if (s.symmetric) over = at_least(over, score - L::load(keys.reference + j));
  }
  const T highest = L::max(top);
  if (static_cast<double>(highest) > query.reference + kMargin)
    raise(query, static_cast<double>(highest < kHighest<T> ? highest : kHighest<T>));
  const V margin = L::broadcast(T(kMargin));
  if (s.symmetric && static_cast<double>(L::max(over)) > kMargin) {
    for (int64_t j = 0; j < keys.padded; j += L::width) {
      const V old = L::load(keys.reference + j), score = L::load(row + j), by = score - old;
      const V raised = select(by > margin, at_most(score, L::broadcast(kHighest<T>)), old);
      L::store(keys.reference + j, raised);
      L::store(keys.sum + j, L::load(keys.sum + j) * exp_or_zero(old - raised));
    }
  }

  const V reference = L::broadcast(static_cast<T>(query.reference));
  V sum{};
  for (int64_t j = 0; j < keys.padded; j += L::width) {
    const V score = L::load(row + j);
    sum = sum + exp_or_zero(at_most(score - reference, margin));
    if (s.symmetric)
      L::store(keys.sum + j, L::load(keys.sum + j) + exp_or_zero(at_most(score - L::load(keys.reference + j), margin)));
  }
  query.sum += static_cast<double>(L::sum(sum));
  for (int64_t j = 0; highest == kInfinity<T> && j < keys.count; ++j) {
    if (row[j] != kInfinity<T>) continue;
    query.sum += row[j];
    if (s.symmetric) keys.sum[j] = row[j] + keys.sum[j];
  }

  for_positives(s, b, keys, [&](int64_t j) {
    add_positive(query, static_cast<double>(row[j]), s.any);
    if (s.symmetric) add_positive(s.key_stats[keys.first + j], static_cast<double>(row[j]), s.any);
  });
  for (int64_t j = 0; s.totals && j < keys.count; ++j) {
    if (row[j] == -kInfinity<T>) continue;
    Statistics* const both[] = {&query, s.symmetric ? &s.key_stats[keys.first + j] : nullptr};
    for (Statistics* of : both) {
      if (!of) continue;
      of->total += static_cast<double>(row[j]);
      of->valid += 1;
    }
  }
}

// Turns a row of scores into Gamma.
template <class T>
void softmax_gamma(const Scores& s, int64_t b, const Keys<T>& keys, T* row) {
  using L = Simd<T>;
  using V = typename L::V;
  const auto coef = [&](int c) { return static_cast<T>(s.query_coefs[c * s.queries.rows + b]); };
  const T positive = coef(kPositive), positive_lse = coef(kPositiveLse);
  leave_out(s, b, keys, -kInfinity<T>, row);
  // With `any` the positives' scores are needed after Gamma has replaced them: these come first, in `kept`.
  T* const kept = keys.sum;
  if (s.any)
    for (int64_t j = 0; j < keys.count; ++j) kept[j] = row[j];

  const V lse = L::broadcast(coef(kLse)), softmax = L::broadcast(coef(kSoftmax)),
          smoothing = L::broadcast(coef(kSmoothing));
  const V lowest = L::broadcast(kLowest<T>);
  for (int64_t j = 0; j < keys.padded; j += L::width) {
    const V score = L::load(row + j);
    V gamma = softmax * exp_or_zero(score - lse);
    V smooth = smoothing;
    if (s.key_coefs) {
      gamma = madd(L::load(keys.coef[kSoftmax] + j), exp_or_zero(score - L::load(keys.coef[kLse] + j)), gamma);
      smooth = smooth + L::load(keys.coef[kSmoothing] + j);
    }
    L::store(row + j, gamma - select(score < lowest, V{}, smooth));
  }
  for_positives(s, b, keys, [&](int64_t j) {
    const bool symmetric = s.key_coefs;
    if (s.any) {
      const double score = static_cast<double>(kept[j]);
      row[j] -= positive * static_cast<T>(__builtin_exp(score - static_cast<double>(positive_lse)));
      if (symmetric)
        row[j] -= keys.coef[kPositive][j] *
                  static_cast<T>(__builtin_exp(score - static_cast<double>(keys.coef[kPositiveLse][j])));
    } else {
      row[j] -= positive + (symmetric ? keys.coef[kPositive][j] : T(0));
    }
  });
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
