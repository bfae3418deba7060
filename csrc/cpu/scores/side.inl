// A side of scores: its rows, formed (factors converted, activated, masked, multiplied), and panels of rows transposed.
//
// What lives elsewhere: the conversion and activation of one row (../sum/tile.inl), the arithmetic (formula.h).
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

// Forms row `row` of a side in `to`; `factor` is room for a row.
template <class T>
void form_row(const Side& side, double absent, int64_t terms, int64_t row, T* to, T* factor) {
  for (int m = 0; m < side.factors; ++m) {
    const Factor& f = side.factor[m];
    T* const row_of_factor = m ? factor : to;
    if (f.mask && !f.mask[row * f.mask_row]) {
      fill(row_of_factor, static_cast<T>(absent), terms);
    } else {
      with_dtype(f.dtype, f.data, [&](auto data) { load_row(row_of_factor, data + row * f.row, f.term, terms); });
      activate(f.activation, row_of_factor, row_of_factor, static_cast<T*>(nullptr), terms);
    }
    for (int64_t i = 0; m && i < terms; ++i) to[i] *= factor[i];
  }
}

// Where a row of a side lies: in the caller's array or, formed, in `formed`.
template <class T>
struct Rows {
  const T* first;
  int64_t step;

  const T* row(int64_t r) const { return first + r * step; }
};

// How the micro-kernel reads what it multiplies: a vector's lanes hold an entry each or, of bf16, a pair of
// neighbouring ones (bf16_pairs.inl). Rows of sides are rows of lanes.
template <class T>
struct Plain {
  using Lane = T;
  using Entry = T;
  using V = typename Simd<T>::V;
  static constexpr int per_lane = 1;

  static V multiply_add(V a, V b, V c) { return madd(a, b, c); }
  // Forms a row of a side; `room` is for two rows of it in T.
  static void form(const Side& side, double absent, int64_t terms, int64_t row, T* to, T* room) {
    form_row(side, absent, terms, row, to, room);
  }
  // Lane i of columns `at` and on, of `count` rows.
  template <class Access>
  static V load(Access access, const Rows<T>& rows, int64_t, int64_t i, int64_t at) {
    return access.load(rows.row(i) + at);
  }
  // A matrix whose rows are multiplied, and one whose columns are, as lanes; `to` is room for half of it.
  static const T* by_rows(const T* matrix, int64_t, int64_t, int64_t, T*) { return matrix; }
  static const T* by_columns(const T* matrix, int64_t, int64_t, int64_t, T*) { return matrix; }
};

template <class P>
constexpr int64_t lanes_of(int64_t entries) {
  return (entries + P::per_lane - 1) / P::per_lane;
}

template <class P>
Rows<typename P::Lane> rows_of(const Side& side, bool in_place, const char* formed, int64_t first, int64_t lanes) {
  using T = typename P::Lane;
  const int64_t step = in_place ? side.factor[0].row / P::per_lane : lanes;
  const T* const rows = static_cast<const T*>(in_place ? side.factor[0].data : formed);
  return {rows + (in_place ? first * step : 0), step};
}
// The same rows, from one of them and from a term on, by entries.
template <class P>
Rows<typename P::Entry> entries_of(const Rows<typename P::Lane>& rows, int64_t from, int64_t term) {
  return {static_cast<const typename P::Entry*>(static_cast<const void*>(rows.row(from))) + term,
          rows.step * P::per_lane};
}

// Transposes as many vectors as a vector has entries. A zip of the first half of the vectors with the second turns the
// bits of (vector, entry) by one place.
template <class T>
FUSIONSUM_INLINE void transpose(typename Simd<T>::V* v) {
  using L = Simd<T>;
  typename L::V zipped[L::width];
  FUSIONSUM_UNROLL(4)
  for (int turns = 1; turns < L::width; turns *= 2) {
    FUSIONSUM_UNROLL(16)
    for (int i = 0; i < L::width / 2; ++i) L::zip(v[i], v[i + L::width / 2], zipped[2 * i], zipped[2 * i + 1]);
    FUSIONSUM_UNROLL(16)
    for (int i = 0; i < L::width; ++i) v[i] = zipped[i];
  }
}

// Packs `count` rows as columns: to[i * width + r] = row r's term i, zero beyond them. `width` is a number of vectors.
template <class T>
void pack_panel(const Rows<T>& rows, int64_t count, int64_t terms, int64_t width, T* to) {
  using L = Simd<T>;
  for (int64_t first = 0; first < width; first += L::width) {
    along<T>(0, terms, [&](auto access, int64_t i) {
      typename L::V v[L::width];
      FUSIONSUM_UNROLL(16)
      for (int r = 0; r < L::width; ++r)
        v[r] = first + r < count ? access.load(rows.row(first + r) + i) : typename L::V{};
      transpose<T>(v);
      T* const out = to + i * width + first;
      if (access.count == L::width) {
        FUSIONSUM_UNROLL(16)
        for (int t = 0; t < L::width; ++t) L::store(out + t * width, v[t]);
      } else {
        T part[L::width * L::width];
        FUSIONSUM_UNROLL(16)
        for (int t = 0; t < L::width; ++t) L::store(part + t * L::width, v[t]);
        for (int t = 0; t < access.count; ++t) L::store(out + t * width, L::load(part + t * L::width));
      }
    });
  }
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
