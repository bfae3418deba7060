// Tiles: rows brought into the working precision, and the three inner loops over them, once, over the vocabulary of an
// instruction set (simd_<isa>.h, included before this file).
//
// Shape letters: N vector operands, `rows` by `cols` entries of each. What lives elsewhere: the arithmetic (form.h), the walk
// that makes the tiles (kernel.inl). Everything is in an unnamed namespace, so that no code compiled for one instruction set
// is ever linked into another.
#include "../plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

// ---- rows: from memory to the working precision T and back --------------------------------------------------------------

template <class S>
inline S* unconst(const S* p) {
  return const_cast<S*>(p);
}
// Calls f(pointer of the right type) for a dtype.
template <class F>
inline void with_dtype(DType dtype, const void* p, F f) {
  switch (dtype) {
#define CASE(name, type)            \
  case DType::name:                 \
    f(static_cast<const type*>(p)); \
    break;
    FUSIONSUM_DTYPES(CASE)
#undef CASE
    default:
      __builtin_unreachable();
  }
}

template <class T, class S>
inline void load_row(T* to, const S* from, int64_t stride, int64_t cols, int64_t = 0) {
  if (stride == 1)  // a loop of its own, which the compiler makes vectors of
    for (int64_t i = 0; i < cols; ++i) to[i] = static_cast<T>(widen(from[i]));
  else
    for (int64_t i = 0; i < cols; ++i) to[i] = static_cast<T>(widen(from[i * stride]));
}
// Contiguous 16-bit rows convert a vector at a time. `ahead` is how far on the next rows lie that will be asked for: memory
// would idle while this tile is multiplied, and 16-bit rows would take as long as float32 ones.
template <class S>
inline void load_row16(float* to, const S* from, int64_t stride, int64_t cols, int64_t ahead) {
  using L = Simd<float>;
  int64_t i = 0;
  if (stride == 1)
    for (; i + L::width <= cols; i += L::width) {
      __builtin_prefetch(from + i + ahead);
      L::store(to + i, load_wide(from + i));
    }
  for (; i < cols; ++i) to[i] = widen(from[i * stride]);
}
inline void load_row(float* to, const Bf16* from, int64_t stride, int64_t cols, int64_t ahead = 0) {
  load_row16(to, from, stride, cols, ahead);
}
inline void load_row(float* to, const F16* from, int64_t stride, int64_t cols, int64_t ahead = 0) {
  load_row16(to, from, stride, cols, ahead);
}

template <class T, class S>
inline void store_row(S* to, int64_t stride, const T* from, int64_t cols, bool) {
  if (stride == 1)
    for (int64_t i = 0; i < cols; ++i) narrow(from[i], to + i);
  else
    for (int64_t i = 0; i < cols; ++i) narrow(from[i], to + i * stride);
}
// Streaming stores are worth it for whole vectors at their natural alignment.
template <class S>
inline bool aligned(const S* p, int width) {
  return reinterpret_cast<uintptr_t>(p) % (width * sizeof(S)) == 0;
}
template <class S>
inline void store_row16(S* to, int64_t stride, const float* from, int64_t cols, bool stream) {
  using L = Simd<float>;
  int64_t i = 0;
  stream = stream && aligned(to, L::width);
  if (stride == 1)
    for (; i + L::width <= cols; i += L::width) store_narrow(to + i, L::load(from + i), stream);
  for (; i < cols; ++i) narrow(from[i], to + i * stride);
}
inline void store_row(Bf16* to, int64_t s, const float* from, int64_t cols, bool stream) { store_row16(to, s, from, cols, stream); }
inline void store_row(F16* to, int64_t s, const float* from, int64_t cols, bool stream) { store_row16(to, s, from, cols, stream); }
template <class T>
inline void store_row(T* to, int64_t stride, const T* from, int64_t cols, bool stream) {
  using L = Simd<T>;
  int64_t i = 0;
  stream = stream && aligned(to, L::width);
  if (stride == 1)
    for (; i + L::width <= cols; i += L::width) {
      if (stream) L::stream(to + i, L::load(from + i));
      else L::store(to + i, L::load(from + i));
    }
  for (; i < cols; ++i) to[i * stride] = from[i];
}

template <class T>
inline void fill(T* to, T value, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) to[i] = value;
}

// y = phi(x), and dy = phi'(x) where it is asked for. x may be y.
template <bool kSlope, class T, class Phi>
inline void activate(const T* x, T* y, T* dy, int64_t cols, int64_t ahead, Phi phi) {
  using L = Simd<T>;
  int64_t i = 0;
  for (; i + L::width <= cols; i += L::width) {
    __builtin_prefetch(x + i + ahead);
    const auto value = phi(L::load(x + i));
    L::store(y + i, value.y);
    if (kSlope) L::store(dy + i, value.dy);
  }
  if (const int rest = static_cast<int>(cols - i)) {
    const auto value = phi(L::load_part(x + i, rest));
    L::store_part(y + i, value.y, rest);
    if (kSlope) L::store_part(dy + i, value.dy, rest);
  }
}
template <class T>
inline void activate(Activation activation, const T* x, T* y, T* dy, int64_t cols, int64_t ahead = 0) {
  switch (activation) {
    case Activation::none:
      if (x != y) load_row(y, x, 1, cols);
      break;
#define CASE(name)                                                    \
  case Activation::name: {                                            \
    const auto phi = [](auto v) { return name##_value(v); };          \
    dy ? activate<true>(x, y, dy, cols, ahead, phi) : activate<false>(x, y, dy, cols, ahead, phi); \
    break;                                                            \
  }
      FUSIONSUM_ACTIVATIONS(CASE)
#undef CASE
  }
}

// ---- the inner loops over a tile -----------------------------------------------------------------------------------------

template <class T>
struct Tile {
  int64_t rows, cols;
  int operands;                   // N: those that vary along the columns
  int summing;                    // the first of them sum their derivative over the rows into out[k], one row
  const T* in[kMaxOperands];
  int64_t in_step[kMaxOperands];  // from row to row; 0 repeats one row
  T* out[kMaxOperands];           // where derivatives go; null: not asked for
  int64_t out_step[kMaxOperands];
  const T* const* in_rows[kMaxOperands];  // masked operands: where each row is instead; null: as in and in_step say
  T* const* out_rows[kMaxOperands];
  const T* scale;                 // per row: the product of the operands that do not vary along the columns
  double* sum;                    // per row: += sum over the columns of the product, without scale; null: not asked for
  bool stream[kMaxOperands];      // store out[k] past the caches

  const T* in_row(int k, int64_t r) const { return in_rows[k] ? in_rows[k][r] : in[k] + r * in_step[k]; }
  T* out_row(int k, int64_t r) const {
    return !out[k] ? nullptr : out_rows[k] ? out_rows[k][r] : out[k] + r * out_step[k];
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};
template <class T, bool kPart>
struct Access {  // a vector, or the part of it that the row still has
  using L = Simd<T>;
  int count;
  typename L::V load(const T* p) const { return kPart ? L::load_part(p, count) : L::load(p); }
  void store(T* p, typename L::V v, bool stream) const {
    if (kPart) {
      L::store_part(p, v, count);
    } else if (stream) {
      L::stream(p, v);
    } else {
      L::store(p, v);
    }
  }
};

// Runs step(access, i) on whole vectors along the columns, then on the part that is left.
template <class T, class Step>
FORM_INLINE void along(int64_t i, int64_t cols, Step step) {
  constexpr int kWidth = Simd<T>::width;
  for (; i + kWidth <= cols; i += kWidth) step(Access<T, false>{kWidth}, i);
  if (i < cols) step(Access<T, true>{static_cast<int>(cols - i)}, i);
}

// N is known at compile time, or 0 and read from the tile.
template <int N>
constexpr int kSlots = N ? N : kMaxOperands;

// sum[r] += sum over the columns of the product.
template <class T, int N>
void dot(const Tile<T>& t) {
  using L = Simd<T>;
  using V = typename L::V;
  const int n = N ? N : t.operands;
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* in[kSlots<N>];
    for (int k = 0; k < n; ++k) in[k] = t.in_row(k, r);
    const auto add = [&](V s, auto access, int64_t i) {
      V p = access.load(in[0] + i);
      if (n == 1) return s + p;
      for (int k = 1; k + 1 < n; ++k) p = p * access.load(in[k] + i);
      return madd(p, access.load(in[n - 1] + i), s);
    };
    // Four sums hide the latency of the fma; two loads a cycle feed no more. None takes more than 32 terms in T.
    constexpr int64_t kPiece = 32 * 4 * L::width;
    for (int64_t begin = 0; begin < t.cols; begin += kPiece) {
      const int64_t end = begin + kPiece < t.cols ? begin + kPiece : t.cols;
      V s0{}, s1{}, s2{}, s3{};
      int64_t i = begin;
      for (; i + 4 * L::width <= end; i += 4 * L::width) {
        const Access<T, false> whole{L::width};
        s0 = add(s0, whole, i);
        s1 = add(s1, whole, i + L::width);
        s2 = add(s2, whole, i + 2 * L::width);
        s3 = add(s3, whole, i + 3 * L::width);
      }
      along<T>(i, end, [&](auto access, int64_t at) { s0 = add(s0, access, at); });
      t.sum[r] += static_cast<double>(L::sum((s0 + s1) + (s2 + s3)));
    }
  }
}

// out[0] += sum over the rows of scale times the product: the forward pass where outputs are contiguous.
template <class T, int N>
void accumulate(const Tile<T>& t) {
  using V = typename Simd<T>::V;
  const int n = N ? N : t.operands;
  // Four rows at a time share one load and store of the sums.
  const auto rows = [&](auto count, int64_t r) {
    constexpr int kRows = decltype(count)::value;
    T* const out = t.out[0];
    const T* in[kRows][kSlots<N>];
    V scale[kRows];
    for (int j = 0; j < kRows; ++j) {
      scale[j] = V{} + t.scale[r + j];
      for (int k = 0; k < n; ++k) in[j][k] = t.in_row(k, r + j);
    }
    along<T>(0, t.cols, [&](auto access, int64_t i) {
      V s = access.load(out + i);
      for (int j = 0; j < kRows; ++j) {
        V p = scale[j];
        for (int k = 0; k + 1 < n; ++k) p = p * access.load(in[j][k] + i);
        s = madd(p, access.load(in[j][n - 1] + i), s);
      }
      access.store(out + i, s, false);
    });
  };
  int64_t r = 0;
  for (; r + 4 <= t.rows; r += 4) rows(Count<4>{}, r);
  for (; r < t.rows; ++r) rows(Count<1>{}, r);
}

// Derivatives of all operands that ask for one, in one pass; with kSum, the products' sums too.
template <class T, int N, int kSumming, bool kSum>
void differentiate(const Tile<T>& t) {
  using L = Simd<T>;
  using V = typename L::V;
  const int n = N ? N : t.operands, summing = N ? kSumming : t.summing;
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* in[kSlots<N>];
    T* out[kSlots<N>];
    bool stream[kSlots<N>];
    for (int k = 0; k < n; ++k) {
      in[k] = t.in_row(k, r);
      out[k] = t.out_row(k, r);
      stream[k] = t.stream[k] && aligned(out[k], L::width);
    }
    const V scale = V{} + t.scale[r];
    V sum{};
    along<T>(0, t.cols, [&](auto access, int64_t i) {
      V v[kSlots<N>], partial[kSlots<N>];
      for (int k = 0; k < n; ++k) v[k] = access.load(in[k] + i);
      const V product = partial_products<N>(scale, v, partial, n);
      for (int k = 0; k < summing; ++k) access.store(out[k] + i, access.load(out[k] + i) + partial[k], false);
      for (int k = summing; k < n; ++k)
        if (out[k]) access.store(out[k] + i, partial[k], stream[k]);
      if (kSum) sum = sum + product;
    });
    if (kSum) t.sum[r] += static_cast<double>(L::sum(sum));
  }
}

template <class T>
using Inner = void (*)(const Tile<T>&);

template <class T>
inline Inner<T> dot_for(int n) {
  constexpr Inner<T> table[] = {dot<T, 0>, dot<T, 1>, dot<T, 2>, dot<T, 3>, dot<T, 4>, dot<T, 5>};
  return table[n <= 5 ? n : 0];
}
template <class T>
inline Inner<T> accumulate_for(int n) {
  constexpr Inner<T> table[] = {accumulate<T, 0>, accumulate<T, 1>, accumulate<T, 2>, accumulate<T, 3>, accumulate<T, 4>};
  return table[n <= 4 ? n : 0];
}
template <class T, bool kSum>
inline Inner<T> differentiate_for(int n, int summing) {
  constexpr Inner<T> table[4][5] = {
      {differentiate<T, 1, 0, kSum>, differentiate<T, 1, 1, kSum>},
      {differentiate<T, 2, 0, kSum>, differentiate<T, 2, 1, kSum>, differentiate<T, 2, 2, kSum>},
      {differentiate<T, 3, 0, kSum>, differentiate<T, 3, 1, kSum>, differentiate<T, 3, 2, kSum>, differentiate<T, 3, 3, kSum>},
      {differentiate<T, 4, 0, kSum>, differentiate<T, 4, 1, kSum>, differentiate<T, 4, 2, kSum>, differentiate<T, 4, 3, kSum>,
       differentiate<T, 4, 4, kSum>}};
  return n <= 4 ? table[n - 1][summing] : differentiate<T, 0, 0, kSum>;
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
