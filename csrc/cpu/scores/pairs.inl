// Which pairs of a row of scores are positive, and which are excluded.
//
// What lives elsewhere: what an epilogue makes of them (softmax.inl, sigmoid.inl, top_k.inl, rank.inl).
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T kHighest = static_cast<T>(sizeof(T) == 8 ? __DBL_MAX__ : static_cast<double>(__FLT_MAX__));
template <class T>
constexpr T kLowest = static_cast<T>(sizeof(T) == 8 ? -__DBL_MAX__ : -static_cast<double>(__FLT_MAX__));

// The keys of a strip, and what is known of them; arrays start at the strip's first key.
template <class T>
struct Keys {
  int64_t first, count, padded;  // of all keys; `padded`: whole vectors, whose last scores are -inf
  const T *bias, *label, *id;
  const T* coef[kSoftmaxCoefs];
  T *reference, *sum;  // softmax: of sums over queries, in scratch memory

  // Calls f(offset) for key c if the strip has it.
  template <class F>
  void with(int64_t c, F f) const {
    if (c >= first && c < first + count) f(c - first);
  }
};

inline bool masked_out(const Scores& s, int64_t b, int64_t c) {
  return s.exclude && s.exclude[b * s.exclude_row + c * s.exclude_col];
}

// The first of a query's excluded keys from key c on.
inline const int64_t* excluded_from(const Scores& s, int64_t b, int64_t c) {
  const int64_t *low = s.excluded + s.excluded_from[b], *high = s.excluded + s.excluded_from[b + 1];
  while (low < high) {
    const int64_t* const middle = low + (high - low) / 2;
    if (*middle < c) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Whether the caller's array or lists exclude a pair. Ids are compared a vector at a time (leave_out).
inline bool is_excluded(const Scores& s, int64_t b, int64_t c) {
  if (masked_out(s, b, c)) return true;
  if (!s.excluded_from) return false;
  const int64_t* const found = excluded_from(s, b, c);
  return found < s.excluded + s.excluded_from[b + 1] && *found == c;
}

// Puts `value` in the place of excluded scores of query b.
template <class T>
void leave_out(const Scores& s, int64_t b, const Keys<T>& keys, T value, T* row) {
  using L = Simd<T>;
  if (s.query_ids) {
    const auto id = L::broadcast(static_cast<T>(s.query_ids[b]));
    T diagonal{};
    if (!s.query_labels) keys.with(b, [&](int64_t j) { diagonal = row[j]; });
    for (int64_t j = 0; j < keys.padded; j += L::width) {
      const auto score = L::load(row + j);
      auto other = L::broadcast(value);
      if (s.query_labels)
        other = select(L::load(keys.label + j) == L::broadcast(static_cast<T>(s.query_labels[b])), score, other);
      L::store(row + j, select(L::load(keys.id + j) == id, other, score));
    }
    if (!s.query_labels) keys.with(b, [&](int64_t j) { row[j] = diagonal; });
  }
  for (int64_t j = 0; s.exclude && j < keys.count; ++j)
    if (masked_out(s, b, keys.first + j)) row[j] = value;
  if (s.excluded_from) {
    const int64_t* const end = s.excluded + s.excluded_from[b + 1];
    for (const int64_t* c = excluded_from(s, b, keys.first); c < end && *c < keys.first + keys.count; ++c)
      row[*c - keys.first] = value;
  }
}

// Calls f(offset) for each positive of query b among the keys.
template <class T, class F>
void for_positives(const Scores& s, int64_t b, const Keys<T>& keys, F f) {
  using L = Simd<T>;
  using V = typename L::V;
  if (!s.query_labels) {
    keys.with(b, [&](int64_t j) {
      if (!masked_out(s, b, b)) f(j);
    });
    return;
  }
  const T label = static_cast<T>(s.query_labels[b]);
  V hits{};
  for (int64_t j = 0; j < keys.padded; j += L::width)
    hits = hits + select(L::load(keys.label + j) == L::broadcast(label), L::broadcast(1), V{});
  if (L::sum(hits) == 0) return;
  for (int64_t j = 0; j < keys.count; ++j)
    if (keys.label[j] == label && !masked_out(s, b, keys.first + j)) f(j);
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
