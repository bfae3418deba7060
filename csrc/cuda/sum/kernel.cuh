// The kernels `rows` and `columns`, which execute a pass (pass.h says what they compute).
// kernel_<dtype>.cu and kernel_loose<bits>.cu instantiate them; `combine`, which adds their partial sums, is in
// combine.cu.
//
// Shape letters: N varying operands, W columns in a packet, U rows at a time. kGrad: some varying operand wants its
// derivative. kExtra: some operand has an activation, a mask or no data; kernels without are a third of the size and of
// the registers.
#pragma once
#include "../threads.cuh"
#include "packet.cuh"

namespace fusionsum {
namespace cuda {

constexpr int kAnyCount = kPassOperands;  // N, where the pass says how many there are; the others count as 1
constexpr int kMaxTerms = 32;             // summed in the working precision, before sums are added in float64

// ---- where things are -----------------------------------------------------------------------------------------------

// Offsets into an operand's arrays, in elements.
struct Place {
  int64_t data, mask, grad;
};

// index / size, for an index of 0 <= index < 2^52 and inverse = 1 / size: the estimate is off by one at most. An
// integer division is a function call in PTX, for which registers are spilled.
FUSIONSUM_INLINE int64_t quotient(int64_t index, int64_t size, double inverse) {
  const int64_t estimate = static_cast<int64_t>(static_cast<double>(index) * inverse), rest = index - estimate * size;
  return estimate + (rest >= size) - (rest < 0);
}

// Adds to the places of N operands, from `first_operand` on, their offsets at an index into `count` flattened row dims,
// of which `first` is the outermost.
template <int N>
FUSIONSUM_INLINE void locate(const Pass& p, int operands, int first_operand, int first, int count, int64_t index,
                             Place (&at)[N]) {
  GPU_LOOP
  for (int d = first + count - 1; d >= first; --d) {
    int64_t digit = index;
    if (d > first) {
      index = quotient(index, p.size[d], p.inverse_size[d]);
      digit -= index * p.size[d];
    }
    FUSIONSUM_UNROLL(16)
    for (int k = 0; k < N; ++k) {
      if (k >= operands) break;
      const PassOperand& o = p.operand[first_operand + k];
      at[k].data += digit * o.row[d];
      at[k].mask += digit * o.mask_row[d];
      at[k].grad += digit * o.grad_row[d];
    }
  }
}
FUSIONSUM_INLINE Place in_unit(const Pass& p, int k, int64_t unit) {
  Place at[1] = {{0, 0, 0}};
  locate<1>(p, 1, k, 0, p.unit_dims, unit, at);
  return at[0];
}
FUSIONSUM_INLINE Place in_row(const Pass& p, int k, int64_t unit, int64_t row) {
  Place at[1] = {in_unit(p, k, unit)};
  locate<1>(p, 1, k, p.unit_dims, p.run_dims, row, at);
  return at[0];
}

// A thread's lane, group and slot in its block, and the block's tile and part of the grid.
struct Thread {
  int lane, group, slot, lanes, groups, slots;
  int part, tile, split;
  int64_t begin, end;             // the rows of a run that are the block's
  int64_t first_unit, unit_step;  // the unit of slot 0, first and from one to the next

  FUSIONSUM_INLINE explicit Thread(const Pass& p) {
    const int index = static_cast<int>(threadIdx.x), per_slot = p.lanes_log2 + p.groups_log2;
    lanes = 1 << p.lanes_log2;
    groups = 1 << p.groups_log2;
    slots = kThreads >> per_slot;
    lane = index & (lanes - 1);
    group = (index >> p.lanes_log2) & (groups - 1);
    slot = index >> per_slot;
    part = static_cast<int>(blockIdx.x) / p.tiles;
    tile = static_cast<int>(blockIdx.x) - part * p.tiles;
    split = part % p.splits;
    begin = split * p.rows_per_split;
    end = begin + p.rows_per_split < p.run ? begin + p.rows_per_split : p.run;
    first_unit = static_cast<int64_t>(part / p.splits) * slots;
    unit_step = static_cast<int64_t>(p.parts / p.splits) * slots;
  }
};

// ---- values ---------------------------------------------------------------------------------------------------------

// Takes the first of W values out, moves the others down and puts `last` behind them. A loop that is not unrolled walks
// through an array so: an array in registers cannot be indexed at run time.
template <int W, class T>
FUSIONSUM_INLINE T rotate(T (&x)[W], T last) {
  const T first = x[0];
  FUSIONSUM_UNROLL(8)
  for (int i = 0; i + 1 < W; ++i) x[i] = x[i + 1];
  x[W - 1] = last;
  return first;
}

template <class T>
FUSIONSUM_INLINE Value<T> activated(Activation activation, T x) {
  switch (activation) {
#define CASE(name)       \
  case Activation::name: \
    return name##_value(x);
    FUSIONSUM_ACTIVATIONS(CASE)
#undef CASE
    default:
      return {x, T(1)};
  }
}

// An operand's factor y in the product, the derivative dy of y by the operand's value, and whether the operand is
// present: where it is absent its data are not read.
template <class T>
struct Entry {
  T y, dy;
  bool present;

  FUSIONSUM_INLINE double derivative(double partial) const { return present ? partial * dy : 0.0; }
};
template <class T, bool kExtra>
FUSIONSUM_INLINE Entry<T> entry(const PassOperand& o, int64_t at, int64_t mask_at) {
  if (kExtra && o.mask && !o.mask[mask_at]) return {o.absent_is_one ? T(1) : T(0), T(0), false};
  if (!o.data) return {T(1), T(1), true};
  const T x = load_value<T>(o, at);
  const Value<T> value = kExtra ? activated(o.activation, x) : Value<T>{x, T(1)};
  return {value.y, value.dy, true};
}

template <class T, bool kExtra>
FUSIONSUM_INLINE Entry<T> splat_entry(const Pass& p, int k, int64_t unit, int64_t row) {
  const Place at = in_row(p, k, unit, row);
  return entry<T, kExtra>(p.operand[k], at.data, at.mask);
}

// The product of the splat operands at a row, without operand `skip`.
template <class T, bool kExtra>
FUSIONSUM_INLINE T splat_product(const Pass& p, int64_t unit, int64_t row, int skip) {
  T product = T(1);
  GPU_LOOP
  for (int k = p.varying + p.uniform; k < p.operands; ++k)
    if (k != skip && (p.operand[k].data || p.operand[k].mask))
      product = product * splat_entry<T, kExtra>(p, k, unit, row).y;
  return product;
}

// scale[u] = the product of all splat operands at row + u * step, or 1 from `end` on.
template <int U, bool kExtra, class T>
FUSIONSUM_INLINE void scale_rows(const Pass& p, int64_t unit, int64_t row, int step, int64_t end, T (&scale)[U]) {
  GPU_LOOP
  for (int u = 0; u < U; ++u, row += step)
    rotate<U>(scale, row < end ? splat_product<T, kExtra>(p, unit, row, -1) : T(1));
}

// x[i] = x[i] * (the value of o at column i), for an operand without mask and activation: by 16-byte accesses where o
// is packed and the columns are neighbours.
template <class T, int W, bool kLoose>
FUSIONSUM_INLINE void multiply_by(const PassOperand& o, Place at, const Columns<W, kLoose>& c, T (&x)[W]) {
  with_dtype(o.dtype, o.data, [&](const auto* p) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    constexpr int kWidth = Storage<S>::width;
    if constexpr (!kLoose && W % kWidth == 0) {
      if (o.packed) {
        FUSIONSUM_UNROLL(8)
        for (int i = 0; i < W; i += kWidth) {
          const auto packet = Storage<S>::load(o, at.data + c.first + i);
          FUSIONSUM_UNROLL(8)
          for (int j = 0; j < kWidth; ++j) x[i + j] = x[i + j] * static_cast<T>(packet.get(j));
        }
        return;
      }
    }
    const auto* const first = p + at.data + c.first * o.col;
    const int64_t step = c.stride(o.col);
    FUSIONSUM_UNROLL(8)
    for (int i = 0; i < W; ++i) x[i] = c.has(i) ? x[i] * static_cast<T>(wide(fetch(first + i * step))) : T(0);
  });
}

// x[i] = x[i] * (the factor of o at column i), for any operand.
template <class T, bool kExtra, int W, bool kLoose>
FUSIONSUM_INLINE void times(const PassOperand& o, Place at, const Columns<W, kLoose>& c, T (&x)[W]) {
  if (kExtra && (o.mask || o.activation != Activation::none)) {
    GPU_LOOP
    for (int i = 0; i < W; ++i) {
      const int64_t col = c.first + i * c.step;
      rotate<W>(x, c.has(i) ? x[0] * entry<T, kExtra>(o, at.data + col * o.col, at.mask + col * o.mask_col).y : T(0));
    }
  } else {
    multiply_by<T>(o, at, c, x);
  }
}
// x[i] = the product of the uniform operands at column i, without operand `skip`; 0 beyond the last column.
template <class T, bool kExtra, int W, bool kLoose>
FUSIONSUM_INLINE void uniform_product(const Pass& p, int64_t unit, const Columns<W, kLoose>& c, int skip, T (&x)[W]) {
  FUSIONSUM_UNROLL(8)
  for (int i = 0; i < W; ++i) x[i] = T(c.has(i));
  GPU_LOOP
  for (int k = p.varying; k < p.varying + p.uniform; ++k)
    if (k != skip && p.operand[k].data) times<T, kExtra>(p.operand[k], in_unit(p, k, unit), c, x);
}

// ---- one row of the varying operands --------------------------------------------------------------------------------

template <class S, int N, bool kGrad, bool kExtra>
struct Row {
  using Store = Storage<S>;
  using T = typename Store::T;
  using Packet = typename Store::Packet;
  static constexpr int W = Store::width;
  using Cols = Columns<W, Store::loose>;

  Place at[N];
  bool present[N];  // for the whole row; `multiply` reads a mask that varies along the columns (loose operands only)
  Activation activation[N];  // none where the operand is absent
  bool here;                 // false: this row lies past the end, and nothing of it is read or written
  Packet packet[N];

  FUSIONSUM_INLINE static int count(const Pass& p) { return N < kAnyCount ? N : p.varying; }

  // Moves a place along the columns.
  FUSIONSUM_INLINE static void move(const PassOperand& o, int64_t cols, Place& at) {
    at.data += cols * o.col;
    at.grad += cols * o.grad_col;
    at.mask += cols * o.mask_col;
  }
  // A lane's first column.
  FUSIONSUM_INLINE static int first(int lane) { return Store::loose ? lane : lane * W; }

  // `base` holds the operands' places at the unit. From N = 4 on they would not fit the registers, and each row finds
  // them again.
  static constexpr bool kBased = N < 4;
  FUSIONSUM_INLINE void locate(const Pass& p, const Place (&base)[N], int64_t unit, int64_t row, bool is_here) {
    here = is_here;
    FUSIONSUM_UNROLL(16)
    for (int k = 0; k < N; ++k) at[k] = kBased ? base[k] : Place{0, 0, 0};
    if (!kBased && here) cuda::locate<N>(p, count(p), 0, 0, p.unit_dims, unit, at);
    if (here) cuda::locate<N>(p, count(p), 0, p.unit_dims, p.run_dims, row, at);
    FUSIONSUM_UNROLL(16)
    for (int k = 0; k < N; ++k) {
      const PassOperand& o = p.operand[k];
      present[k] = here && k < count(p);
      if (kExtra && present[k] && o.mask && o.mask_col == 0) present[k] = o.mask[at[k].mask];
      activation[k] = present[k] ? o.activation : Activation::none;
    }
  }

  // Loads U rows, so that their loads are in flight together.
  template <int U>
  FUSIONSUM_INLINE static void load(const Pass& p, const Cols& c, Row (&row)[U]) {
    if constexpr (Store::loose) {
      FUSIONSUM_UNROLL(16)
      for (int k = 0; k < N; ++k)
        if (reads(p, k)) Store::load(p.operand[k], c, present_packets(row, k));
    }
    FUSIONSUM_UNROLL(4)
    for (int u = 0; u < U; ++u) {
      if (!row[u].here) continue;
      FUSIONSUM_UNROLL(16)
      for (int k = 0; k < N; ++k) {
        const PassOperand& o = p.operand[k];
        if (!row[u].present[k] || !reads(p, k)) {  // absent, it counts as 1 or 0; beyond the count, as 1
          row[u].packet[k] = Store::all(k < count(p) && !row[u].present[k] && !o.absent_is_one ? T(0) : T(1));
        } else if constexpr (!Store::loose) {
          row[u].packet[k] = Store::load(o, row[u].at[k].data + c.first);
        }
      }
    }
  }
  // Makes numbers of what was loaded.
  template <int U>
  FUSIONSUM_INLINE static void widen(const Pass& p, Row (&row)[U]) {
    if constexpr (Store::loose) {
      FUSIONSUM_UNROLL(16)
      for (int k = 0; k < N; ++k)
        if (reads(p, k)) Store::widen(p.operand[k], present_packets(row, k));
    }
  }
  FUSIONSUM_INLINE static bool reads(const Pass& p, int k) { return k < count(p) && (!kExtra || p.operand[k].data); }
  // Calls use(packet, place) for each row in which operand k is present.
  template <int U>
  FUSIONSUM_INLINE static auto present_packets(Row (&row)[U], int k) {
    return [&row, k](auto use) {
      FUSIONSUM_UNROLL(4)
      for (int u = 0; u < U; ++u)
        if (row[u].present[k]) use(row[u].packet[k], row[u].at[k].data);
    };
  }

  // Returns the product of the row's factors at column `which`, of which x holds the values. With kGrad,
  // partial[k] = c * (the product of the other factors) * (the derivative of factor k by its value).
  FUSIONSUM_INLINE T multiply(const Pass& p, const Cols& cols, int which, T c, T (&x)[N], T (&partial)[N]) const {
    T slope[N];
    bool is_present[N];
    FUSIONSUM_UNROLL(16)
    for (int k = 0; k < N; ++k) {
      is_present[k] = present[k];
      if (!kExtra) continue;
      const PassOperand& o = p.operand[k];
      const Value<T> value = activated(activation[k], x[k]);
      x[k] = value.y;
      slope[k] = value.dy;
      if (Store::loose && present[k] && o.mask && o.mask_col && cols.has(which)) {
        is_present[k] = o.mask[at[k].mask + (cols.first + which * cols.step) * o.mask_col];
        if (!is_present[k]) x[k] = o.absent_is_one ? T(1) : T(0);
      }
    }
    if constexpr (kGrad) {
      const T product = partial_products<N>(c, x, partial, N);
      if (kExtra) {
        FUSIONSUM_UNROLL(16)
        for (int k = 0; k < N; ++k) partial[k] = is_present[k] ? partial[k] * slope[k] : T(0);
      }
      return product;
    } else {
      T product = x[0];
      FUSIONSUM_UNROLL(16)
      for (int k = 1; k < N; ++k) product = product * x[k];
      return product;
    }
  }

  // For each of the W columns calls use(i, product, uniform[i]), where `product` is that of the row's factors, and
  // stores the derivatives of varying operands, which are multiplied by uniform[i] and `scale`. `i` is the column's
  // number without kExtra, where the loop is unrolled. With kExtra it is not, i is always 0, and arrays are rotated
  // from column to column instead: `use` has to rotate an array of W values that it reads or writes by i.
  template <class Use>
  FUSIONSUM_INLINE void differentiate(const Pass& p, const Cols& cols, T (&uniform)[W], T scale, Use use) {
    Packet out[N];
    const auto one = [&](int i, int which, auto take, auto put, T c) {
      T x[N], partial[N];
      FUSIONSUM_UNROLL(16)
      for (int k = 0; k < N; ++k) x[k] = take(packet[k], i);
      const T product = multiply(p, cols, which, kGrad ? c * scale : T(1), x, partial);
      if (kGrad) {
        FUSIONSUM_UNROLL(16)
        for (int k = 0; k < N; ++k) put(out[k], i, partial[k]);
      }
      use(i, product, c);
    };
    if (kExtra) {
      if (kGrad) {
        FUSIONSUM_UNROLL(16)
        for (int k = 0; k < N; ++k) out[k] = Packet{};
      }
      GPU_UNROLL(W <= 4 ? W : 1)
      for (int i = 0; i < W; ++i) {
        const T c = rotate<W>(uniform, uniform[0]);
        one(0, i, [](Packet& from, int) { return from.take(); }, [](Packet& to, int, T value) { to.push(value); }, c);
      }
    } else {
      FUSIONSUM_UNROLL(8)
      for (int i = 0; i < W; ++i)
        one(
            i, i, [](Packet& from, int j) { return from.get(j); }, [](Packet& to, int j, T value) { to.set(j, value); },
            uniform[i]);
    }
    if constexpr (kGrad) {
      FUSIONSUM_UNROLL(16)
      for (int k = 0; k < N; ++k) {
        const PassOperand& o = p.operand[k];
        if (k >= count(p) || o.reach != Reach::row) continue;
        if constexpr (Store::loose) {
          Store::store(o, at[k].grad, cols, out[k]);
        } else {
          Store::store(o, at[k].grad + cols.first, out[k], p.stream);
        }
      }
    }
  }
};

// Blocks of a multiprocessor, at least: with 255 or 128 registers a thread.
template <class S, int N, bool kExtra>
constexpr int kBlocks = N + kExtra + Storage<S>::loose > 4 ? 1 : 2;

// ---- sums over the columns ------------------------------------------------------------------------------------------

// U, the rows whose loads are in flight together: up to eight loads of 16 bytes a thread, within 128 registers.
template <class S, int N, bool kGrad, bool kExtra>
constexpr int kRowsAtOnce = N > 4 || (kGrad && kExtra) || (Storage<S>::loose && Storage<S>::width > 4) ? 1
                            : kGrad || kExtra ? (N <= 2 ? 2 : 1)
                                              : (N <= 2 ? 4 : 2);

template <class S, int N, bool kGrad, bool kExtra>
__global__ void __launch_bounds__(kThreads, kBlocks<S, N, kExtra>) rows(const __grid_constant__ Pass p) {
  using R = Row<S, N, kGrad, kExtra>;
  using T = typename R::T;
  constexpr int W = R::W, U = kRowsAtOnce<S, N, kGrad, kExtra>;
  GPU_SHARED(double, buffer, kThreads / 32);
  const Thread t(p);
  const int64_t first_col = static_cast<int64_t>(t.tile) * p.packets_per_tile * W, cols_left = p.cols - first_col;
  const int most_cols = p.packets_per_tile * W, cols = cols_left < most_cols ? static_cast<int>(cols_left) : most_cols;
  int summed = -1;    // the splat operand whose derivative is summed over rows too
  bool each = false;  // some splat operand has a derivative for each row
  GPU_LOOP
  for (int k = p.varying + p.uniform; k < p.operands; ++k) {
    if (p.operand[k].reach == Reach::row) each = true;
    if (p.operand[k].reach == Reach::run || p.operand[k].reach == Reach::all) summed = k;
  }
  double total = 0;
  for (int64_t unit0 = t.first_unit; unit0 < p.units; unit0 += t.unit_step) {
    const int64_t unit = unit0 + t.slot;
    const bool unit_here = unit < p.units;
    Place base[N] = {};
    if (R::kBased && unit_here) locate<N>(p, R::count(p), 0, 0, p.unit_dims, unit, base);
    for (int64_t row0 = t.begin; row0 < t.end; row0 += U * t.groups) {
      R row[U];
      T scale[U];
      double sum[U];
      FUSIONSUM_UNROLL(4)
      for (int u = 0; u < U; ++u) {
        const int64_t r = row0 + u * t.groups + t.group;
        row[u].locate(p, base, unit, r, unit_here && r < t.end);
        scale[u] = 1;
        sum[u] = 0;
      }
      if (kGrad) scale_rows<U, kExtra>(p, unit, row0 + t.group, t.groups, unit_here ? t.end : 0, scale);
      for (int col = R::first(t.lane); row[0].here && col < cols;) {
        T s[U] = {};
        GPU_LOOP
        for (int terms = 0; terms < kMaxTerms && col < cols; terms += W, col += W * t.lanes) {
          const typename R::Cols c(first_col + col, p.lanes_log2, cols - col);
          R::load(p, c, row);
          T uniform[W];
          uniform_product<T, kExtra>(p, unit, c, -1, uniform);
          R::widen(p, row);
          FUSIONSUM_UNROLL(4)
          for (int u = 0; u < U; ++u) {
            if (row[u].here)
              row[u].differentiate(p, c, uniform, scale[u],
                                   [&](int, T product, T factor) { s[u] = madd(product, factor, s[u]); });
          }
        }
        FUSIONSUM_UNROLL(4)
        for (int u = 0; u < U; ++u) sum[u] += static_cast<double>(s[u]);
      }
      GPU_LOOP
      for (int u = 0; u < U && row0 + u * t.groups < t.end; ++u) {
        const int64_t r = row0 + u * t.groups + t.group;
        const bool here = unit_here && r < t.end;
        const double own_sum = rotate<U>(sum, sum[0]);
        if (summed >= 0 && here) {
          const Entry<T> own = splat_entry<T, kExtra>(p, summed, unit, r);
          total += own.derivative(own_sum * splat_product<T, kExtra>(p, unit, r, summed));
        }
        if (!each) continue;
        const double whole = segment_sum(own_sum, p.lanes_log2, buffer);
        if (!here || t.lane != 0) continue;
        GPU_LOOP
        for (int k = p.varying + p.uniform; k < p.operands; ++k) {
          const PassOperand& o = p.operand[k];
          if (o.reach != Reach::row) continue;
          const Place at = in_row(p, k, unit, r);
          const double value =
              entry<T, kExtra>(o, at.data, at.mask).derivative(whole * splat_product<T, kExtra>(p, unit, r, k));
          if (o.sums) {
            o.sums[(t.tile * p.units + unit) * p.run + r] = value;
          } else {
            store_value(o.dtype, o.grad, at.grad, value);
          }
        }
      }
    }
    if (summed >= 0 && p.operand[summed].reach == Reach::run) {
      const PassOperand& o = p.operand[summed];
      const double whole = segment_sum(total, p.lanes_log2 + p.groups_log2, buffer);
      total = 0;
      if (unit_here && t.lane == 0 && t.group == 0) {
        if (o.sums) {
          o.sums[(t.split * p.tiles + t.tile) * p.units + unit] = whole;
        } else {
          store_value(o.dtype, o.grad, in_unit(p, summed, unit).grad, whole);
        }
      }
    }
  }
  if (summed >= 0 && p.operand[summed].reach == Reach::all) {
    const double whole = segment_sum(total, 8, buffer);
    if (threadIdx.x == 0) p.operand[summed].sums[t.part * p.tiles + t.tile] = whole;
  }
}
static_assert(kThreads == 1 << 8, "the whole block is a segment");

// ---- sums over the run ----------------------------------------------------------------------------------------------

template <class S, int N, bool kGrad, bool kExtra>
__global__ void __launch_bounds__(kThreads, kBlocks<S, N, kExtra>) columns(const __grid_constant__ Pass p) {
  using R = Row<S, N, kGrad, kExtra>;
  using T = typename R::T;
  constexpr int W = R::W, U = kRowsAtOnce<S, N, true, kExtra>;
  // Of each thread's columns: in registers they would take 2 W of them.
  GPU_SHARED(double, sums, (W * kThreads));
  const Thread t(p);
  const int64_t col = static_cast<int64_t>(t.tile) * W * t.lanes + R::first(t.lane);
  const typename R::Cols cols(col, p.lanes_log2, p.cols - col);
  double* const own = sums + threadIdx.x;
  for (int64_t unit0 = t.first_unit; unit0 < p.units; unit0 += t.unit_step) {
    const int64_t unit = unit0 + t.slot;
    const bool here = unit < p.units && col < p.cols;
    FUSIONSUM_UNROLL(8)
    for (int i = 0; i < W; ++i) own[i * kThreads] = 0;
    if (here) {
      Place base[N] = {};
      if (R::kBased) locate<N>(p, R::count(p), 0, 0, p.unit_dims, unit, base);
      constexpr bool kMoved = R::kBased && Storage<S>::loose;  // by the columns' offsets, once for all rows
      FUSIONSUM_UNROLL(4)
      for (int k = 0; k < (kMoved ? N : 0); ++k) R::move(p.operand[k], col, base[k]);
      const typename R::Cols from_base(kMoved ? 0 : col, p.lanes_log2, p.cols - col);
      T uniform[W] = {}, level[W] = {};
      if (kGrad) uniform_product<T, kExtra>(p, unit, cols, -1, uniform);
      int terms = 0;
      GPU_LOOP
      for (int64_t row0 = t.begin + t.group; row0 < t.end; row0 += U * t.groups) {
        R row[U];
        T scale[U];
        FUSIONSUM_UNROLL(4)
        for (int u = 0; u < U; ++u) {
          const int64_t r = row0 + u * t.groups;
          row[u].locate(p, base, unit, r, r < t.end);
          scale[u] = 1;
        }
        R::load(p, from_base, row);
        scale_rows<U, kExtra>(p, unit, row0, t.groups, t.end, scale);
        R::widen(p, row);
        FUSIONSUM_UNROLL(4)
        for (int u = 0; u < U; ++u) {
          if (!row[u].here) continue;
          row[u].differentiate(p, from_base, uniform, scale[u], [&](int i, T product, T) {
            if (kExtra) {
              rotate<W>(level, madd(product, scale[u], level[0]));
            } else {
              level[i] = madd(product, scale[u], level[i]);
            }
          });
        }
        if ((terms += U) < kSummed && row0 + U * t.groups < t.end) continue;
        FUSIONSUM_UNROLL(8)
        for (int i = 0; i < W; ++i) {
          own[i * kThreads] += static_cast<double>(level[i]);
          level[i] = 0;
        }
        terms = 0;
      }
    }
    strided_sum<W>(sums, t.lanes, t.groups, t.group);
    if (t.group != 0 || col >= p.cols) continue;
    GPU_LOOP
    for (int k = p.varying; k < p.varying + p.uniform; ++k) {
      const PassOperand& o = p.operand[k];
      const bool all = o.reach == Reach::all, first = all && unit0 == t.first_unit;
      if (o.reach == Reach::none || (!here && !first)) continue;
      T others[W] = {};
      if (here) uniform_product<T, kExtra>(p, unit, cols, k, others);
      const Place at = here ? in_unit(p, k, unit) : Place{0, 0, 0};
      GPU_LOOP
      for (int i = 0; i < W && cols.has(i); ++i) {
        const int64_t place = col + i * cols.step;
        Entry<T> entry_here{T(1), T(1), here};
        if (kExtra && here) entry_here = entry<T, true>(o, at.data + place * o.col, at.mask + place * o.mask_col);
        const double value = entry_here.derivative(own[i * kThreads] * rotate<W>(others, others[0]));
        if (all) {
          double* const to = &o.sums[(static_cast<int64_t>(t.part) * t.slots + t.slot) * p.cols + place];
          *to = first ? value : *to + value;
        } else if (o.sums) {
          o.sums[(t.split * p.units + unit) * p.cols + place] = value;
        } else {
          store_value(o.dtype, o.grad, at.grad + place * o.grad_col, value);
        }
      }
    }
  }
}

// ---- the tables -----------------------------------------------------------------------------------------------------

template <class S, int N, bool kGrad, bool kExtra, class SOfColumns = S>
constexpr void add(Kernels& table, int count) {
  table.rows[count][kGrad][kExtra] = rows<S, N, kGrad, kExtra>;
  table.columns[count][kGrad][kExtra] = columns<SOfColumns, N, kGrad, kExtra>;
  table.width[count][false][kExtra] = Storage<S>::width;
  table.width[count][true][kExtra] = Storage<SOfColumns>::width;
}
template <class S, int N>
constexpr void add_packed(Kernels& table) {
  add<S, N, false, false>(table, N - 1);
  add<S, N, false, true>(table, N - 1);
  add<S, N, true, false>(table, N - 1);
  add<S, N, true, true>(table, N - 1);
}
template <class S>
constexpr Kernels packed_kernels() {
  Kernels table{};
  add_packed<S, 1>(table);
  add_packed<S, 2>(table);
  add_packed<S, 3>(table);
  add_packed<S, 4>(table);
  return table;
}

// To keep them few, loose operands with activations have derivatives, those of float64 too, and float64 with
// activations goes to the kernel for any number. Finding a row costs `columns` more than a packet, so that its packets
// are wider where registers allow it.
template <class T, int N>
constexpr void add_loose(Kernels& table) {
  using S = Loose<T, 16 / sizeof(T)>;
  if constexpr (sizeof(T) == 4) {
    using Wide = Loose<T, N <= 2 ? 8 : 4>;
    add<S, N, false, false, Wide>(table, N - 1);
    add<S, N, true, false, Wide>(table, N - 1);
    add<S, N, true, true>(table, N - 1);
  } else {
    add<S, N, true, false>(table, N - 1);
  }
}
template <class T>
constexpr Kernels loose_kernels() {
  Kernels table{};
  add_loose<T, 1>(table);
  add_loose<T, 2>(table);
  add_loose<T, 3>(table);
  add_loose<T, 4>(table);
  add<Loose<T, 1>, kAnyCount, true, true>(table, kCounts - 1);
  return table;
}

}  // namespace cuda
}  // namespace fusionsum
