// The micro-kernel of scores and of their gradients: a tile of a product of matrices, in registers.
//
// What lives elsewhere: which tiles there are (walk.inl), what becomes of them (the epilogues, *.inl).
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

template <class T>
struct Shape {
  using L = Simd<T>;
  using V = typename L::V;
  static constexpr int rows = L::tile_rows, vectors = L::tile_vectors, width = L::width, cols = vectors * width;
};

template <class T, int vectors>
using TileOf = typename Shape<T>::V[Shape<T>::rows][vectors];

// tile[r][c] = sum over i < lanes of a[r * a_row + i * a_lane] * b[i * Shape<T>::cols + c], each sum one chain of fused
// multiply-adds: its bits depend on neither the tile's place nor its neighbours. P says what lanes are (side.inl).
template <class P, int vectors, class T = typename P::Lane>
FUSIONSUM_INLINE void multiply(int64_t lanes, const T* a, int64_t a_row, int64_t a_lane, const T* b,
                               TileOf<T, vectors>& tile) {
  using S = Shape<T>;
  using L = Simd<T>;
  using V = typename L::V;
  FUSIONSUM_UNROLL(16)
  for (int r = 0; r < S::rows; ++r)
    for (int v = 0; v < vectors; ++v) tile[r][v] = V{};
  for (int64_t i = 0; i < lanes; ++i, a += a_lane, b += S::cols) {
    V column[vectors];
    for (int v = 0; v < vectors; ++v) column[v] = L::load(b + v * L::width);
    FUSIONSUM_UNROLL(16)
    for (int r = 0; r < S::rows; ++r) {
      T entry;
      __builtin_memcpy(&entry, a + r * a_row, sizeof(T));  // a pair may just have been written as two bf16
      const V x = L::broadcast(entry);
      for (int v = 0; v < vectors; ++v) tile[r][v] = P::multiply_add(x, column[v], tile[r][v]);
    }
  }
}

// Not inlined: among a caller's variables GCC 12 runs out of registers, and columns go to the stack (0.75 of the
// speed).
template <class P, int vectors, class T = typename P::Lane>
__attribute__((noinline)) void score_panel(int64_t lanes, const T* a, int64_t a_row, const T* panel, T scale,
                                           const T* bias, T* to, int64_t step) {
  using L = Simd<T>;
  const auto scales = L::broadcast(scale);
  TileOf<T, vectors> tile;
  multiply<P, vectors>(lanes, a, a_row, 1, panel, tile);
  FUSIONSUM_UNROLL(16)
  for (int r = 0; r < Shape<T>::rows; ++r)
    for (int v = 0; v < vectors; ++v)
      L::store(to + r * step + v * L::width, madd(tile[r][v], scales, L::load(bias + v * L::width)));
}

// The same of a panel of which `vectors` or fewer hold keys.
template <class P, int vectors, class T = typename P::Lane>
void score_rest(int64_t count, int64_t lanes, const T* a, int64_t a_row, const T* panel, T scale, const T* bias, T* to,
                int64_t step) {
  if constexpr (vectors > 1)
    if (count < vectors) return score_rest<P, vectors - 1>(count, lanes, a, a_row, panel, scale, bias, to, step);
  score_panel<P, vectors>(lanes, a, a_row, panel, scale, bias, to, step);
}

// The scores of a tile's rows of queries (of which all are read) with the first `cols` keys, whole vectors, of panels:
// to[r * step + c]. `bias` has one value per key.
template <class P, class T = typename P::Lane>
void score_strip(int64_t lanes, const T* a, int64_t a_row, const T* panels, int64_t cols, T scale, const T* bias, T* to,
                 int64_t step) {
  using S = Shape<T>;
  int64_t c = 0;
  for (; c + S::cols <= cols; c += S::cols)
    score_panel<P, S::vectors>(lanes, a, a_row, panels + c * lanes, scale, bias + c, to + c, step);
  if (c < cols)
    score_rest<P, S::vectors>((cols - c) / S::width, lanes, a, a_row, panels + c * lanes, scale, bias + c, to + c,
                              step);
}

// The same for few queries, whose keys are read as they lie: a sum of `width` chains per score, which goes to
// to[r * step + c * col].
template <class P, class T = typename P::Lane>
void score_by_dots(int64_t lanes, const Rows<T>& queries, int64_t count, const Rows<T>& keys, int64_t cols, T scale,
                   const T* bias, T* to, int64_t step, int64_t col) {
  using L = Simd<T>;
  using V = typename L::V;
  for (int64_t c = 0; c < cols; ++c) {
    const T* const key = keys.row(c);
    for (int64_t r = 0; r < count; ++r) {
      const T* const query = queries.row(r);
      V s0{}, s1{}, s2{}, s3{};
      int64_t i = 0;
      for (; i + 4 * L::width <= lanes; i += 4 * L::width) {
        for (int v = 0; v < 4; ++v) __builtin_prefetch(key + i + v * L::width + 4096 / sizeof(T));
        s0 = P::multiply_add(L::load(query + i), L::load(key + i), s0);
        s1 = P::multiply_add(L::load(query + i + L::width), L::load(key + i + L::width), s1);
        s2 = P::multiply_add(L::load(query + i + 2 * L::width), L::load(key + i + 2 * L::width), s2);
        s3 = P::multiply_add(L::load(query + i + 3 * L::width), L::load(key + i + 3 * L::width), s3);
      }
      along<T>(i, lanes, [&](auto access, int64_t at) {
        s0 = P::multiply_add(access.load(query + at), access.load(key + at), s0);
      });
      to[r * step + c * col] = L::sum((s0 + s1) + (s2 + s3)) * scale + bias[c];
    }
  }
}

// Asks memory for `cols` entries.
template <int cols, class E>
FUSIONSUM_INLINE void ask_for(const E* p) {
  constexpr int kLine = 64 / sizeof(E);
  for (int j = 0; j < cols; j += kLine) __builtin_prefetch(p + j);
}

// Adds to `width` columns, which need `vectors` vectors or fewer, as add_product does, of which `b` is a panel. `next`
// holds the rows of the panel after it.
template <class P, int vectors, class T = typename P::Lane>
void add_panel(int64_t rows, int64_t width, int64_t terms, const T* a, int64_t a_row, int64_t a_lane, const T* b,
               const Rows<typename P::Entry>& next, T* to, int64_t step) {
  using S = Shape<T>;
  using L = Simd<T>;
  if constexpr (vectors > 1)
    if (width <= (vectors - 1) * L::width)
      return add_panel<P, vectors - 1>(rows, width, terms, a, a_row, a_lane, b, next, to, step);
  for (int64_t r = 0; r < rows; r += S::rows) {
    const int64_t count = smaller(S::rows, rows - r);
    T* const out = to + r * step;
    for (int64_t q = 0; q < count; ++q) ask_for<S::cols>(out + q * step);
    for (int64_t i = r; i < smaller(r + S::rows, terms); ++i) ask_for<S::cols>(next.row(i));
    TileOf<T, vectors> tile;
    multiply<P, vectors>(lanes_of<P>(terms), a + r * a_row, a_row, a_lane, b, tile);
    if (count == S::rows && width == vectors * L::width) {
      FUSIONSUM_UNROLL(16)
      for (int q = 0; q < S::rows; ++q)
        for (int v = 0; v < vectors; ++v) {
          T* const p = out + q * step + v * L::width;
          L::store(p, L::load(p) + tile[q][v]);
        }
    } else {
      T whole[S::rows][vectors * L::width];  // a tile that is indexed by variables would not stay in registers
      FUSIONSUM_UNROLL(16)
      for (int q = 0; q < S::rows; ++q)
        for (int v = 0; v < vectors; ++v) L::store(whole[q] + v * L::width, tile[q][v]);
      for (int64_t q = 0; q < count; ++q)
        for (int64_t j = 0; j < width; ++j) out[q * step + j] += whole[q][j];
    }
  }
}

// to[r * step + c] += sum over i < terms of A[r][i] * b[i][c], for `rows` rows and `cols` columns. A comes as lanes,
// a[r * a_row + lane * a_lane]; b as rows, of which `panel` takes as many columns as a tile has.
template <class P, class T = typename P::Lane>
void add_product(int64_t rows, int64_t cols, int64_t terms, const T* a, int64_t a_row, int64_t a_lane,
                 const Rows<typename P::Entry>& b, T* panel, T* to, int64_t step) {
  using S = Shape<T>;
  using L = Simd<T>;
  for (int64_t c = 0; c < cols; c += S::cols) {
    const int64_t width = smaller(S::cols, cols - c);
    for (int64_t i = 0; i < lanes_of<P>(terms); ++i)
      along<T>(0, width,
               [&](auto access, int64_t j) { L::store(panel + i * S::cols + j, P::load(access, b, terms, i, c + j)); });
    add_panel<P, S::vectors>(rows, width, terms, a, a_row, a_lane, panel, {b.first + c + S::cols, b.step}, to + c,
                             step);
  }
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
