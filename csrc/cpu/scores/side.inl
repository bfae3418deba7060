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

// Packs `count` rows as columns: to[i * width + r] = row r's term i, zero beyond them. In pieces of terms, so that what
// is written is still in the first-level cache when the next row comes.
template <class T>
void pack_panel(const Rows<T>& rows, int64_t count, int64_t terms, int64_t width, T* to) {
  constexpr int64_t kPiece = 64;
  for (int64_t begin = 0; begin < terms; begin += kPiece) {
    const int64_t end = smaller(begin + kPiece, terms);
    for (int64_t r = 0; r < width; ++r) {
      const T* const from = r < count ? rows.row(r) : nullptr;
      for (int64_t i = begin; i < end; ++i) to[i * width + r] = from ? from[i] : T(0);
    }
  }
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
