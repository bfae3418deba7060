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
  static constexpr int rows = L::tile_rows, vectors = L::tile_vectors, cols = vectors * L::width;
};

template <class T>
using TileOf = typename Shape<T>::V[Shape<T>::rows][Shape<T>::vectors];

// tile[r][c] = sum over i < terms of a[r * a_row + i * a_term] * b[i * cols + c], each sum one chain of fused
// multiply-adds: its bits depend on neither the tile's place nor its neighbours.
template <class T>
FUSIONSUM_INLINE void multiply(int64_t terms, const T* a, int64_t a_row, int64_t a_term, const T* b, TileOf<T>& tile) {
  using S = Shape<T>;
  using L = Simd<T>;
  using V = typename L::V;
  FUSIONSUM_UNROLL(16)
  for (int r = 0; r < S::rows; ++r)
    for (int v = 0; v < S::vectors; ++v) tile[r][v] = V{};
  for (int64_t i = 0; i < terms; ++i, a += a_term, b += S::cols) {
    V column[S::vectors];
    for (int v = 0; v < S::vectors; ++v) column[v] = L::load(b + v * L::width);
    FUSIONSUM_UNROLL(16)
    for (int r = 0; r < S::rows; ++r) {
      const V x = L::broadcast(a[r * a_row]);
      for (int v = 0; v < S::vectors; ++v) tile[r][v] = madd(x, column[v], tile[r][v]);
    }
  }
}

// The scores of a tile's rows of queries (of which all are read) with the keys of `cols / Shape<T>::cols` panels:
// to[r * step + c]. `bias` has one value per key.
template <class T>
void score_strip(int64_t terms, const T* a, int64_t a_row, const T* panels, int64_t cols, T scale, const T* bias, T* to,
                 int64_t step) {
  using S = Shape<T>;
  using L = Simd<T>;
  const auto scales = L::broadcast(scale);
  for (int64_t c = 0; c < cols; c += S::cols) {
    TileOf<T> tile;
    multiply<T>(terms, a, a_row, 1, panels + c * terms, tile);
    FUSIONSUM_UNROLL(16)
    for (int r = 0; r < S::rows; ++r)
      for (int v = 0; v < S::vectors; ++v)
        L::store(to + r * step + c + v * L::width, madd(tile[r][v], scales, L::load(bias + c + v * L::width)));
  }
}

// The same for few queries, whose keys are read as they lie: a sum of `width` chains per score.
template <class T>
void score_by_dots(int64_t terms, const Rows<T>& queries, int64_t count, const Rows<T>& keys, int64_t cols, T scale,
                   const T* bias, T* to, int64_t step) {
  using L = Simd<T>;
  using V = typename L::V;
  for (int64_t c = 0; c < cols; ++c) {
    const T* const key = keys.row(c);
    for (int64_t r = 0; r < count; ++r) {
      const T* const query = queries.row(r);
      V s0{}, s1{}, s2{}, s3{};
      int64_t i = 0;
      for (; i + 4 * L::width <= terms; i += 4 * L::width) {
        for (int v = 0; v < 4; ++v) __builtin_prefetch(key + i + v * L::width + 4096 / sizeof(T));
        s0 = madd(L::load(query + i), L::load(key + i), s0);
        s1 = madd(L::load(query + i + L::width), L::load(key + i + L::width), s1);
        s2 = madd(L::load(query + i + 2 * L::width), L::load(key + i + 2 * L::width), s2);
        s3 = madd(L::load(query + i + 3 * L::width), L::load(key + i + 3 * L::width), s3);
      }
      along<T>(i, terms,
               [&](auto access, int64_t at) { s0 = madd(access.load(query + at), access.load(key + at), s0); });
      to[r * step + c] = L::sum((s0 + s1) + (s2 + s3)) * scale + bias[c];
    }
  }
}

// Asks memory for as many columns as a tile has.
template <class T>
FUSIONSUM_INLINE void ask_for(const T* p) {
  for (int v = 0; v < Shape<T>::vectors; ++v) __builtin_prefetch(p + v * Simd<T>::width);
}

// to[r * step + c] += sum over i < terms of a[r * a_row + i * a_term] * b[i][c], for `rows` rows and `cols` columns. b
// comes as rows, of which `panel` takes as many columns as a tile has.
template <class T>
void add_product(int64_t rows, int64_t cols, int64_t terms, const T* a, int64_t a_row, int64_t a_term, const Rows<T>& b,
                 T* panel, T* to, int64_t step) {
  using S = Shape<T>;
  using L = Simd<T>;
  for (int64_t c = 0; c < cols; c += S::cols) {
    const int64_t width = smaller(S::cols, cols - c);
    for (int64_t i = 0; i < terms; ++i) {
      const T* const from = b.row(i) + c;
      along<T>(0, width, [&](auto access, int64_t j) { L::store(panel + i * S::cols + j, access.load(from + j)); });
    }
    for (int64_t r = 0; r < rows; r += S::rows) {
      const int64_t count = smaller(S::rows, rows - r);
      T* const out = to + r * step + c;
      for (int64_t q = 0; q < count; ++q) ask_for<T>(out + q * step);
      for (int64_t i = r; i < smaller(r + S::rows, terms); ++i) ask_for<T>(b.row(i) + c + S::cols);  // the next panel
      TileOf<T> tile;
      multiply<T>(terms, a + r * a_row, a_row, a_term, panel, tile);
      if (count == S::rows && width == S::cols) {
        FUSIONSUM_UNROLL(16)
        for (int q = 0; q < S::rows; ++q)
          for (int v = 0; v < S::vectors; ++v) {
            T* const p = out + q * step + v * L::width;
            L::store(p, L::load(p) + tile[q][v]);
          }
      } else {
        T whole[S::rows * S::cols];  // a tile that is indexed by variables would not stay in registers
        FUSIONSUM_UNROLL(16)
        for (int q = 0; q < S::rows; ++q)
          for (int v = 0; v < S::vectors; ++v) L::store(whole + q * S::cols + v * L::width, tile[q][v]);
        for (int64_t q = 0; q < count; ++q)
          for (int64_t j = 0; j < width; ++j) out[q * step + j] += whole[q * S::cols + j];
      }
    }
  }
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
