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
template <class T>
Rows<T> rows_of(const Side& side, bool in_place, const char* formed, int64_t first, int64_t terms) {
  if (in_place) return {static_cast<const T*>(side.factor[0].data) + first * side.factor[0].row, side.factor[0].row};
  return {static_cast<const T*>(static_cast<const void*>(formed)), terms};
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
