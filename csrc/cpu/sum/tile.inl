// Tiles: rows brought into the working precision, and the three inner loops over them, once, over the vocabulary of an
// instruction set (simd/<isa>.h, included before this file).
//
// Shape letters: N varying operands (space.h), `rows` by `cols` entries of each. What lives elsewhere: the arithmetic
// (formula.h), the walk that makes the tiles (walk.inl). Everything is in an unnamed namespace, so that no code
// compiled for one instruction set is ever linked into another.
#include "plan.h"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

// ---- rows: from memory to the working precision T and back
// --------------------------------------------------------------

template <class S>
inline S* unconst(const S* p) {
  return const_cast<S*>(p);
}

template <class T, class S>
inline void load_row(T* to, const S* from, int64_t stride, int64_t cols, int64_t = 0) {
  if (stride == 1)  // a loop of its own, which the compiler makes vectors of
    for (int64_t i = 0; i < cols; ++i) to[i] = static_cast<T>(widen(from[i]));
  else
    for (int64_t i = 0; i < cols; ++i) to[i] = static_cast<T>(widen(from[i * stride]));
}
// Contiguous 16-bit rows convert a vector at a time. `ahead` is how far on the next rows lie that will be asked for:
// memory would idle while this tile is multiplied, and 16-bit rows would take as long as float32 ones. (Vectors of one
// are left to the last loop: after them it would be empty, and GCC 13 warns that it overflows.)
template <class S>
inline void load_row16(float* to, const S* from, int64_t stride, int64_t cols, int64_t ahead) {
  using L = Simd<float>;
  int64_t i = 0;
  if (L::width > 1 && stride == 1)
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
  if (L::width > 1 && stride == 1)
    for (; i + L::width <= cols; i += L::width) store_narrow(to + i, L::load(from + i), stream);
  for (; i < cols; ++i) narrow(from[i], to + i * stride);
}
inline void store_row(Bf16* to, int64_t s, const float* from, int64_t cols, bool stream) {
  store_row16(to, s, from, cols, stream);
}
inline void store_row(F16* to, int64_t s, const float* from, int64_t cols, bool stream) {
  store_row16(to, s, from, cols, stream);
}
template <class T>
inline void store_row(T* to, int64_t stride, const T* from, int64_t cols, bool stream) {
  using L = Simd<T>;
  int64_t i = 0;
  stream = stream && aligned(to, L::width);
  if (stride == 1)
    for (; i + L::width <= cols; i += L::width) {
      if (stream)
        L::stream(to + i, L::load(from + i));
      else
        L::store(to + i, L::load(from + i));
    }
  for (; i < cols; ++i) to[i * stride] = from[i];
}

template <class T>
inline void fill(T* to, T value, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) to[i] = value;
}

// y = phi(x), and dy = phi'(x) where it is asked for. x may be y. Memory is asked for what comes next: x `ahead`, and
// the rows `beside`, which are multiplied with these.
template <bool kSlope, class T, class Phi>
inline void activate(const T* x, T* y, T* dy, int64_t cols, int64_t ahead, const T* beside, Phi phi) {
  using L = Simd<T>;
  int64_t i = 0;
  for (; i + L::width <= cols; i += L::width) {
    __builtin_prefetch(x + i + ahead);
    __builtin_prefetch(beside + i);
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
inline void activate(Activation activation, const T* x, T* y, T* dy, int64_t cols, int64_t ahead = 0,
                     const T* beside = nullptr) {
  if (!beside) beside = x;
  switch (activation) {
    case Activation::none:
      if (x != y) load_row(y, x, 1, cols);
      break;
#define CASE(name)                                                                                                 \
  case Activation::name: {                                                                                         \
    const auto phi = [](auto v) { return name##_value(v); };                                                       \
    dy ? activate<true>(x, y, dy, cols, ahead, beside, phi) : activate<false>(x, y, dy, cols, ahead, beside, phi); \
    break;                                                                                                         \
  }
      FUSIONSUM_ACTIVATIONS(CASE)
#undef CASE
  }
}

// ---- the inner loops over a tile
// -----------------------------------------------------------------------------------------

// T is the working precision; S what the rows are stored in: T, or a 16-bit type that is converted on the way.
template <class T, class S>
struct Tile {
  int64_t rows, cols;
  int operands;  // N: the varying ones
  const S* in[kMaxOperands];
  int64_t in_step[kMaxOperands];  // from row to row
  S* out[kMaxOperands];           // where derivatives go; null: not asked for
  int64_t out_step[kMaxOperands];
  const S* const* in_rows[kMaxOperands];  // masked operands: where each row is instead; null: as in and in_step say
  S* const* out_rows[kMaxOperands];
  bool stream[kMaxOperands];     // store out[k] past the caches
  bool in_memory[kMaxOperands];  // rows are read where they lie, not from scratch memory
  bool masked;                   // rows may lie anywhere
  const T* uniform;              // the product of the uniform operands, a row for all rows; null: none
  T* uniform_out;                // += its derivative; null: not asked for
  bool fresh;                    // these rows are the first that `accumulate` adds to uniform_out: it holds nothing yet
  const T* scale;                // per row: the product of the splat operands
  double* sum;                   // per row: += sum over the columns of the product, without scale

  const S* in_row(int k, int64_t r) const { return in_rows[k] ? in_rows[k][r] : in[k] + r * in_step[k]; }
  S* out_row(int k, int64_t r) const {
    return !out[k] ? nullptr : out_rows[k] ? out_rows[k][r] : out[k] + r * out_step[k];
  }
};

// A vector of a row, or the part of one that the row still has.
template <class T, bool kPart>
struct Access {
  using L = Simd<T>;
  using V = typename L::V;
  int count;

  V load(const T* p) const { return kPart ? L::load_part(p, count) : L::load(p); }
  void store(T* p, V v, bool stream) const {
    if (kPart) {
      L::store_part(p, v, count);
    } else if (stream) {
      L::stream(p, v);
    } else {
      L::store(p, v);
    }
  }
  template <class S>
  V load(const S* p) const {
    if (!kPart) return load_wide(p);
    S part[L::width] = {};
    for (int i = 0; i < count; ++i) part[i] = p[i];
    return load_wide(part);
  }
  template <class S>
  void store(S* p, V v, bool stream) const {
    if (!kPart) return store_narrow(p, v, stream);
    S part[L::width];
    store_narrow(part, v, false);
    for (int i = 0; i < count; ++i) p[i] = part[i];
  }
};

// Runs step(access, i) on whole vectors along the columns, then on the part that is left.
template <class T, class Step>
FUSIONSUM_INLINE void along(int64_t i, int64_t cols, Step step) {
  constexpr int kWidth = Simd<T>::width;
  for (; i + kWidth <= cols; i += kWidth) step(Access<T, false>{kWidth}, i);
  if (i < cols) step(Access<T, true>{static_cast<int>(cols - i)}, i);
}

// to = a * b, element by element; to may be a, for which the compiler's own vectors are not used.
template <class T>
inline void multiply(T* to, const T* a, const T* b, int64_t cols) {
  along<T>(0, cols,
           [&](auto access, int64_t i) { access.store(to + i, access.load(a + i) * access.load(b + i), false); });
}

// N is known at compile time, or kAnyCount and read from the tile.
constexpr int kAnyCount = kMaxOperands;
template <class T, class S, int N>
FUSIONSUM_INLINE int count_of(const Tile<T, S>& t) {
  return N == kAnyCount ? t.operands : N;
}
constexpr int at_least_one(int n) { return n ? n : 1; }  // arrays of nothing are not C++

// What to ask memory for while row `in` of operand k is read: bytes further on, or the row `next` where rows are masked
// and may lie anywhere. The processor's own prefetcher stops at each page. 12 KB under way, of all operands and of what
// is stored together, hide the latency of memory: on Zen 5 one operand reads 1.2 times as fast as with 2 KB, two of 16
// bits 1.15 times as fast.
template <int N, bool kStores, class T, class S>
FUSIONSUM_INLINE const S* ahead(const Tile<T, S>& t, int k, int64_t next, const S* in) {
  if (!t.in_memory[k]) return in;  // beyond a scratch row lies another thread's, whose core would lose the line
  if (t.masked) return next < t.rows ? t.in_row(k, next) : in;
  return in + 12288 / (kStores ? 2 : 1) / at_least_one(N) / static_cast<int64_t>(sizeof(S));
}

// sum[r] += sum over the columns of the product.
template <class T, class S, int N>
void dot(const Tile<T, S>& t) {
  using L = Simd<T>;
  using V = typename L::V;
  const int n = count_of<T, S, N>(t);
  for (int64_t r = 0; r < t.rows; ++r) {
    const S *in[at_least_one(N)], *next[at_least_one(N)];
    for (int k = 0; k < n; ++k) {
      in[k] = t.in_row(k, r);
      next[k] = ahead<N, false>(t, k, r + 1, in[k]);
    }
    const auto add = [&](V s, auto access, int64_t i) {
      for (int k = 0; k < n; ++k) __builtin_prefetch(next[k] + i);
      if (n == 0) return s + access.load(t.uniform + i);
      V p = access.load(in[0] + i);
      for (int k = 1; k < n; ++k) {
        if (k + 1 == n && !t.uniform) return madd(p, access.load(in[k] + i), s);
        p = p * access.load(in[k] + i);
      }
      return t.uniform ? madd(p, access.load(t.uniform + i), s) : s + p;
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

// P vectors of uniform_out from column `col` on, in registers while the rows [begin, end) are added.
template <int P, int N, class T, class S, bool kPart>
FUSIONSUM_INLINE void accumulate_panel(const Tile<T, S>& t, Access<T, kPart> access, int64_t col, int64_t begin,
                                       int64_t end) {
  using L = Simd<T>;
  using V = typename L::V;
  const int n = count_of<T, S, N>(t);
  T* const out = t.uniform_out + col;
  V sum[P];
  for (int j = 0; j < P; ++j) sum[j] = t.fresh && begin == 0 ? V{} : access.load(out + j * L::width);
  for (int64_t r = begin; r < end; ++r) {
    const S *in[at_least_one(N)], *next[at_least_one(N)];
    for (int k = 0; k < n; ++k) {
      in[k] = t.in_row(k, r);
      next[k] = ahead<N, false>(t, k, r + 1, in[k]) + col;
      in[k] += col;
    }
    const V scale = V{} + t.scale[r];
    for (int j = 0; j < P; ++j) {
      const int i = j * L::width;
      for (int k = 0; k < n; ++k) __builtin_prefetch(next[k] + i);
      V p = scale;
      for (int k = 0; k + 1 < n; ++k) p = p * access.load(in[k] + i);
      sum[j] = n ? madd(p, access.load(in[n - 1] + i), sum[j]) : sum[j] + p;
    }
  }
  for (int j = 0; j < P; ++j) access.store(out + j * L::width, sum[j], false);
}

// uniform_out += sum over the rows of scale times the product: the forward pass where outputs are contiguous. Short
// rows go panel by panel, each through all rows; long ones row by row, for as many streams as there are rows would be
// too many for memory.
template <class T, class S, int N>
void accumulate(const Tile<T, S>& t) {
  constexpr int kWidth = Simd<T>::width;
  const Access<T, false> whole{kWidth};
  const int64_t step = t.cols <= 16 * kWidth ? t.rows : 1;
  for (int64_t r = 0; r < t.rows; r += step) {
    int64_t i = 0;
    for (; i + 8 * kWidth <= t.cols; i += 8 * kWidth) accumulate_panel<8, N>(t, whole, i, r, r + step);
    for (; i + 4 * kWidth <= t.cols; i += 4 * kWidth) accumulate_panel<4, N>(t, whole, i, r, r + step);
    along<T>(i, t.cols, [&](auto access, int64_t at) { accumulate_panel<1, N>(t, access, at, r, r + step); });
  }
}

// Derivatives of all operands that ask for one, in one pass; with kSum, the products' sums too. (Two rows at a time,
// which share what is uniform, are no faster in cache and up to 1.7 times as slow where stores go past it.)
template <class T, class S, int N, bool kUniform, bool kSum>
void differentiate(const Tile<T, S>& t) {
  using L = Simd<T>;
  using V = typename L::V;
  const int n = count_of<T, S, N>(t);
  for (int64_t r = 0; r < t.rows; ++r) {
    const S *in[N], *next[N];
    S* out[N];
    bool stream[N];
    for (int k = 0; k < n; ++k) {
      in[k] = t.in_row(k, r);
      next[k] = ahead<N, true>(t, k, r + 1, in[k]);
      out[k] = t.out_row(k, r);
      stream[k] = t.stream[k] && aligned(out[k], L::width);
    }
    const V scale = V{} + t.scale[r];
    V sum{};
    along<T>(0, t.cols, [&](auto access, int64_t i) {
      for (int k = 0; k < n; ++k) __builtin_prefetch(next[k] + i);
      V v[N], partial[N];
      for (int k = 0; k < n; ++k) v[k] = access.load(in[k] + i);
      const V uniform = kUniform ? access.load(t.uniform + i) : V{} + T(1);
      const V product = partial_products < N == kAnyCount ? 0 : N > (kUniform ? scale * uniform : scale, v, partial, n);
      for (int k = 0; k < n; ++k)
        if (out[k]) access.store(out[k] + i, partial[k], stream[k]);
      if (t.uniform_out) access.store(t.uniform_out + i, madd(scale, product, access.load(t.uniform_out + i)), false);
      if (kSum) sum = kUniform ? madd(product, uniform, sum) : sum + product;
    });
    if (kSum) t.sum[r] += static_cast<double>(L::sum(sum));
  }
}

// One to four varying operands have loops of their own; any other count shares one.
template <class T, class S>
using Inner = void (*)(const Tile<T, S>&);

template <class T, class S>
inline Inner<T, S> dot_for(int n) {
  constexpr Inner<T, S> table[] = {dot<T, S, 0>, dot<T, S, 1>, dot<T, S, 2>, dot<T, S, 3>, dot<T, S, 4>};
  return n <= 4 ? table[n] : dot<T, S, kAnyCount>;
}
template <class T, class S>
inline Inner<T, S> accumulate_for(int n) {
  constexpr Inner<T, S> table[] = {accumulate<T, S, 0>, accumulate<T, S, 1>, accumulate<T, S, 2>, accumulate<T, S, 3>,
                                   accumulate<T, S, 4>};
  return n <= 4 ? table[n] : accumulate<T, S, kAnyCount>;
}
template <class T, class S, bool kUniform, bool kSum>
inline Inner<T, S> differentiate_for(int n) {
  constexpr Inner<T, S> table[] = {differentiate<T, S, 1, kUniform, kSum>, differentiate<T, S, 2, kUniform, kSum>,
                                   differentiate<T, S, 3, kUniform, kSum>, differentiate<T, S, 4, kUniform, kSum>};
  return n <= 4 ? table[n - 1] : differentiate<T, S, kAnyCount, kUniform, kSum>;
}
template <class T, class S>
inline Inner<T, S> differentiate_for(int n, bool uniform, bool sum) {
  return uniform ? (sum ? differentiate_for<T, S, true, true>(n) : differentiate_for<T, S, true, false>(n))
                 : (sum ? differentiate_for<T, S, false, true>(n) : differentiate_for<T, S, false, false>(n));
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
