// The walk through a plan (plan.h), once, over the vocabulary of an instruction set: a slot's rows are cut into groups and
// blocks, operands brought in, an inner loop run over each tile (tile.inl), derivatives taken out or summed; then the slots'
// sums are added up.
#include "tile.inl"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;

template <class T>
inline void store_grad(const PlanOperand& o, int64_t at, int64_t stride, const T* from, int64_t cols, bool stream) {
  with_dtype(o.dtype, o.grad, [&](auto* p) { store_row(unconst(p) + at, stride, from, cols, stream); });
}

// Writes a row of finished sums as the derivative of operand o: phi' applied, rounded to the operand's dtype. `at` and
// `grad_at` are the operand's offsets of that row. A masked operand's zero sum stays zero: its data may be NaN.
template <class T, class S>
inline void finish(const PlanOperand& o, int64_t at, int64_t grad_at, int64_t col, const S* sums, int64_t cols) {
  alignas(64) T row[kBlock];
  for (int64_t i = 0; i < cols; ++i) row[i] = static_cast<T>(sums[i]);
  if (o.activation != Activation::none) {
    alignas(64) T z[kBlock] = {}, slope[kBlock];
    with_dtype(o.dtype, o.data, [&](auto p) { load_row(z, p + at + col * o.col, o.col, cols); });
    activate(o.activation, z, z, slope, cols);
    for (int64_t i = 0; i < cols; ++i) row[i] = o.mask && row[i] == 0 ? T(0) : row[i] * slope[i];
  }
  store_grad(o, grad_at + col * o.grad_col, o.grad_col, row, cols, false);
}

template <class T>
class Slot {
 public:
  Slot(const Plan& plan, int64_t slot, int64_t slice)
      : p(plan), row_slot(slot / plan.col_slots), col_slot(slot % plan.col_slots), slice(slice) {
    const int64_t slot_end = smaller(p.cols, (col_slot + 1) * p.cols_per_slot);
    slot_col = col_slot * p.cols_per_slot;
    first_col = slot_col + slice % p.col_slices * p.cols_per_slice;
    last_col = smaller(slot_end, first_col + p.cols_per_slice);
    inner = p.row_dims - 1;
    for (int k = 0; k < p.operands; ++k) {
      const PlanOperand& o = p.operand[k];
      sums_wanted = sums_wanted || (o.splat && o.target != Target::none);
      if (o.splat) {
        splats[splat_count++] = k;
      } else if (o.row[inner] == 0 && !o.mask && o.target != Target::store && (o.target == Target::none || !o.has_row[inner])) {
        shared_wanted = shared_wanted || o.target != Target::none;
        shared[shared_count++] = k;
      } else {
        varying[varying_count++] = k;
      }
    }
    stored = varying_count ? p.operand[varying[0]].dtype : kDType<T>;
    for (int v = 0; v < varying_count; ++v) {
      const PlanOperand& o = p.operand[varying[v]];
      const bool plain = o.data && o.col == 1 && o.activation == Activation::none && !o.mask_col;
      const bool plain_target = o.target == Target::none || (o.target == Target::store && o.grad_col == 1);
      if (o.dtype != stored || !plain || !plain_target) stored = kDType<T>;
    }
    if (stored == DType::f64 || kDType<T> == DType::f64) stored = kDType<T>;
    for (int v = 0; v < varying_count; ++v) {
      const PlanOperand& o = p.operand[varying[v]];
      const bool plain = o.dtype == stored && o.activation == Activation::none && !o.mask_col;
      direct[v] = !o.data || (plain && o.col == 1);
      plain_store[v] = plain && o.target == Target::store && o.grad_col == 1;
      repeated[v] = !direct[v] && !o.mask && o.row[inner] == 0;
      wanted = wanted || o.target != Target::none;
      masked = masked || o.mask;
      staging = staging || (o.target != Target::none && !plain_store[v]) || (!direct[v] && !repeated[v]);
    }
    for (int v = 0; v < varying_count; ++v)
      if (!p.operand[varying[v]].data) fill(ones, T(1), smaller(kBlock, p.cols));
  }

  void run() {
    if (slice < p.col_slices) clear_partials();
    const int64_t start = row_slot * p.rows_per_slot, stop = smaller(p.rows, start + p.rows_per_slot);
    int64_t row = start + slice / p.col_slices * p.rows_per_slice;
    const int64_t last = smaller(stop, row + p.rows_per_slice);
    if (row >= last || first_col >= last_col) return;
    seek(row);
    while (row < last) {
      const int64_t rows = smaller(smaller(kGroup, last - row), p.row_size[inner] - index[inner]);
      group(row, rows);
      row += rows;
      advance(rows);
    }
  }

 private:
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  // Offsets of the current row, in elements, kept up to date as the row moves.
  void seek(int64_t row) {
    for (int d = inner; d >= 0; --d) {
      index[d] = row % p.row_size[d];
      row /= p.row_size[d];
    }
    for (int k = 0; k < p.operands; ++k) {
      at[k] = mask_at[k] = grad_at[k] = partial_at[k] = 0;
      for (int d = 0; d < p.row_dims; ++d) shift(k, d, index[d]);
    }
  }
  void shift(int k, int d, int64_t by) {
    const PlanOperand& o = p.operand[k];
    at[k] += by * o.row[d];
    mask_at[k] += by * o.mask_row[d];
    grad_at[k] += by * o.grad_row[d];
    partial_at[k] += by * o.partial_row[d];
  }
  void advance(int64_t rows) {
    for (int d = inner; d >= 0; --d) {
      const int64_t by = d == inner ? rows : 1;
      index[d] += by;
      const bool carry = index[d] == p.row_size[d] && d > 0;
      for (int k = 0; k < p.operands; ++k) shift(k, d, carry ? by - index[d] : by);
      if (!carry) return;
      index[d] = 0;
    }
  }

  double* sums_of(const PlanOperand& o) const {
    const bool per_slot = o.target == Target::run || o.splat;
    return o.sums + (per_slot ? row_slot * p.col_slots + col_slot : row_slot) * o.sums_size;
  }
  void clear_partials() {
    for (int k = 0; k < p.operands; ++k) {
      const PlanOperand& o = p.operand[k];
      if (o.target != Target::partial) continue;
      double* sums = sums_of(o);
      if (o.splat) {
        if (slice == 0) fill(sums, 0.0, o.sums_size);
      } else {
        for (int64_t row = 0; row < o.sums_size; row += p.cols) fill(sums + row + first_col, 0.0, last_col - first_col);
      }
    }
  }

  bool present(int k, int64_t row, int64_t col) const {
    const PlanOperand& o = p.operand[k];
    return !o.mask || o.mask[mask_at[k] + row * o.mask_row[inner] + col * o.mask_col];
  }

  // Rows of operand k from the group's row `from` on, converted and activated, into `to`, row after row; with their slopes
  // where dy is given. What is absent is not read.
  void load(int k, int64_t from, int64_t rows, int64_t col, int64_t cols, T* to, T* dy, const T* beside = nullptr) const {
    const PlanOperand& o = p.operand[k];
    const int64_t first = at[k] + from * o.row[inner] + col * o.col;
    const int64_t ahead = rows * o.row[inner];  // the tile after this one
    const bool together = o.col == 1 && o.row[inner] == cols;  // the rows are one long row
    if (!o.mask && o.col == 1 && o.dtype == kDType<T>) {
      const T* data = static_cast<const T*>(o.data) + first;
      if (together) {
        activate(o.activation, data, to, dy, rows * cols, ahead, beside);
      } else {
        for (int64_t r = 0; r < rows; ++r)
          activate(o.activation, data + r * o.row[inner], to + r * cols, dy ? dy + r * cols : nullptr, cols, ahead);
      }
      return;
    }
    with_dtype(o.dtype, o.data, [&](auto data) {
      data += first;
      if (!o.mask && together) {
        load_row(to, data, 1, rows * cols, ahead);
        return;
      }
      for (int64_t r = 0; r < rows; ++r, data += o.row[inner]) {
        if (!o.mask_col && present(k, from + r, 0)) {
          load_row(to + r * cols, data, o.col, cols, ahead);
        } else {  // an absent row stays zero: the tables lead past it
          fill(to + r * cols, T(0), cols);
          for (int64_t i = 0; o.mask_col && i < cols; ++i)
            if (present(k, from + r, col + i)) load_row(to + r * cols + i, data + i * o.col, 1, 1);
        }
      }
    });
    activate(o.activation, to, to, dy, rows * cols);
    for (int64_t r = 0; o.mask_col && r < rows; ++r)
      for (int64_t i = 0; i < cols; ++i)
        if (!present(k, from + r, col + i)) to[r * cols + i] = static_cast<T>(p.absent);
  }

  void group(int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) scale[r] = 1;
    for (int s = 0; s < splat_count; ++s) {
      const int k = splats[s];
      const PlanOperand& o = p.operand[k];
      if (o.data) {
        // One value per row: the rows are the columns of a single row to load.
        load_splat(k, rows, splat_value[s], o.activation != Activation::none ? splat_slope[s] : nullptr);
      } else {
        fill(splat_value[s], T(1), rows);
      }
      for (int64_t r = 0; r < rows; ++r) scale[r] *= splat_value[s][r];
    }
    for (int64_t r = 0; sums_wanted && r < rows; ++r) sum[r] = 0;
    for (int k = 0; k < p.operands; ++k) {
      const PlanOperand& o = p.operand[k];
      if (o.target == Target::run && o.sums && row % o.run == 0)
        fill(sums_of(o) + (o.splat ? 0 : first_col - slot_col), 0.0, o.splat ? 1 : last_col - first_col);
    }
    for (int64_t col = first_col; col < last_col; col += kBlock) block(rows, col, smaller(kBlock, last_col - col));
    for (int s = 0; sums_wanted && s < splat_count; ++s) splat_target(s, rows);
    for (int k = 0; k < p.operands; ++k) {
      const PlanOperand& o = p.operand[k];
      if (o.target != Target::run || !o.sums || (row + rows) % o.run) continue;
      const int64_t cols = o.splat ? 1 : last_col - first_col, base = o.splat ? 0 : first_col;
      for (int64_t i = 0; i < cols; i += kBlock)
        finish<T>(o, at[k], grad_at[k], base + i, sums_of(o) + (o.splat ? 0 : first_col - slot_col) + i, smaller(kBlock, cols - i));
    }
  }

  void load_splat(int k, int64_t rows, T* to, T* dy) const {
    const PlanOperand& o = p.operand[k];
    with_dtype(o.dtype, o.data, [&](auto data) {
      if (!o.mask) {
        load_row(to, data + at[k], o.row[inner], rows);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          to[r] = 0;
          if (present(k, r, 0)) load_row(to + r, data + at[k] + r * o.row[inner], 1, 1);
        }
      }
    });
    activate(o.activation, to, to, dy, rows);
    for (int64_t r = 0; o.mask && r < rows; ++r)
      if (!present(k, r, 0)) to[r] = static_cast<T>(p.absent);
  }

  void splat_target(int s, int64_t rows) {
    const int k = splats[s];
    const PlanOperand& o = p.operand[k];
    if (o.target == Target::none) return;
    T grad[kGroup];
    for (int64_t r = 0; r < rows; ++r) grad[r] = static_cast<T>(sum[r]);
    for (int other = 0; other < splat_count; ++other)
      for (int64_t r = 0; other != s && r < rows; ++r) grad[r] *= splat_value[other][r];
    if (o.target == Target::store) {
      for (int64_t r = 0; r < rows; ++r) {
        if (o.activation != Activation::none) grad[r] *= splat_slope[s][r];
        if (!present(k, r, 0)) grad[r] = 0;
      }
      store_grad(o, grad_at[k], o.grad_row[inner], grad, rows, false);
    } else {
      double* sums = sums_of(o) + (o.target == Target::partial ? partial_at[k] : 0);
      for (int64_t r = 0; r < rows; ++r)
        if (present(k, r, 0)) sums[r * o.partial_row[inner]] += grad[r];
    }
  }

  void block(int64_t rows, int64_t col, int64_t cols) {
    if constexpr (kDType<T> == DType::f32) {
      if (stored == DType::bf16) return block<Bf16>(rows, col, cols);
      if (stored == DType::f16) return block<F16>(rows, col, cols);
    }
    block<T>(rows, col, cols);
  }

  // The tiles of a group of rows and a block of columns. S is what the varying operands are stored in; those that are not
  // plain rows of S are brought into rows of T, and then S is T.
  template <class S>
  void block(int64_t rows, int64_t col, int64_t cols) {
    Tile<T, S> t;
    const S* in_rows[kMaxOperands][kGroup];
    S* out_rows[kMaxOperands][kGroup];
    alignas(64) S absent[kBlock], trash[kBlock];
    alignas(64) T zeros[kBlock];
    if (masked) {
      fill(zeros, T(0), cols);
      S value;
      narrow(static_cast<T>(p.absent), &value);
      fill(absent, value, cols);
    }
    t.cols = cols;
    t.operands = varying_count;
    t.masked = masked;
    t.shared = multiply_shared(col, cols);
    t.shared_out = shared_wanted ? level : nullptr;
    for (int v = 0; v < varying_count; ++v) {
      const int k = varying[v];
      const PlanOperand& o = p.operand[k];
      t.in_step[v] = !o.data || repeated[v] ? 0 : direct[v] ? o.row[inner] : cols;
      t.out_step[v] = plain_store[v] ? o.grad_row[inner] : cols;
      t.in[v] = !o.data ? as<S>(ones) : direct[v] ? static_cast<const S*>(o.data) + at[k] + col : as<S>(value[v]);
      t.out[v] = o.target == Target::none ? nullptr : plain_store[v] ? static_cast<S*>(o.grad) + grad_at[k] + col : as<S>(grad[v]);
      t.stream[v] = p.stream && plain_store[v];
      t.in_rows[v] = o.mask && !o.mask_col ? in_rows[v] : nullptr;
      t.out_rows[v] = o.mask && !o.mask_col ? out_rows[v] : nullptr;
      if (repeated[v]) load(k, 0, 1, col, cols, value[v], slope_for(v));
    }
    int64_t step = staging ? larger(1, kBlock / cols) : rows;
    if (shared_wanted) {  // a whole number of steps makes kSummed rows
      step = smaller(step, kSummed);
      while (kSummed % step) --step;
    }
    for (int64_t from = 0; from < rows; from += step) {
      t.rows = smaller(step, rows - from);
      t.scale = scale + from;
      t.sum = sum + from;
      if (from % kSummed == 0 && shared_wanted) fill(level, T(0), cols);
      const T* beside = nullptr;  // rows read in place, to be asked for while others are activated
      for (int v = 0; staging && v < varying_count; ++v)
        if (direct[v] && t.in_step[v] == cols) beside = as<const T>(t.in[v]);
      for (int v = 0; v < varying_count; ++v) {
        if (!direct[v] && !repeated[v]) load(varying[v], from, t.rows, col, cols, value[v], slope_for(v), beside);
        // A masked operand's absent rows are read from a constant row, and their derivatives written where nobody looks.
        for (int64_t r = 0; t.in_rows[v] && r < t.rows; ++r) {
          const bool here = present(varying[v], from + r, 0);
          in_rows[v][r] = here ? t.in[v] + r * t.in_step[v] : absent;
          out_rows[v][r] = here ? t.out[v] + r * t.out_step[v] : trash;
        }
      }
      if (wanted) {
        differentiate_for<T, S>(varying_count, t.shared, sums_wanted)(t);
      } else {
        if (shared_wanted) accumulate_for<T, S>(varying_count)(t);
        if (sums_wanted) dot_for<T, S>(varying_count)(t);
      }
      for (int v = 0; v < varying_count; ++v) {
        const PlanOperand& o = p.operand[varying[v]];
        if (o.target == Target::none) continue;
        if (!plain_store[v]) {
          write(v, from, t.rows, col, cols);
        } else if (o.mask) {
          for (int64_t r = 0; r < t.rows; ++r)
            if (!present(varying[v], from + r, 0)) store_row(t.out[v] + r * t.out_step[v], 1, zeros, cols, t.stream[v]);
        }
      }
      if (shared_wanted && rows > kSummed && ((from + t.rows) % kSummed == 0 || from + t.rows == rows)) {
        for (int64_t i = 0; i < cols; ++i) level_sum[i] = (from < kSummed ? 0 : level_sum[i]) + static_cast<double>(level[i]);
      }
      for (int v = 0; v < varying_count; ++v) {
        if (direct[v]) t.in[v] += t.rows * t.in_step[v];
        if (plain_store[v]) t.out[v] += t.rows * t.out_step[v];
      }
    }
    if (shared_wanted) {
      for (int64_t i = 0; rows > kSummed && i < cols; ++i) level[i] = static_cast<T>(level_sum[i]);
      share_out(col, cols);
    }
  }
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  // Rows of T as rows of S, which are the same where this is called.
  template <class S, class R>
  static S* as(R* row) {
    return const_cast<S*>(static_cast<const S*>(static_cast<const void*>(row)));
  }

  // The product of the operands that all rows share; null where there is none but the constant 1.
  const T* multiply_shared(int64_t col, int64_t cols) {
    const T* product = nullptr;
    for (int s = 0; s < shared_count; ++s) {
      const PlanOperand& o = p.operand[shared[s]];
      if (!o.data) {
        shared_row[s] = nullptr;
        continue;
      }
      T* own = shared_value[s];
      if (o.dtype == kDType<T> && o.col == 1 && o.activation == Activation::none) {
        shared_row[s] = static_cast<const T*>(o.data) + at[shared[s]] + col;
      } else {
        load(shared[s], 0, 1, col, cols, own, nullptr);
        shared_row[s] = own;
      }
      if (product) {
        for (int64_t i = 0; i < cols; ++i) shared_product[i] = product[i] * shared_row[s][i];
        product = shared_product;
      } else {
        product = shared_row[s];
      }
    }
    return product;
  }

  // From the derivative of the shared product to that of each operand in it.
  void share_out(int64_t col, int64_t cols) {
    for (int s = 0; s < shared_count; ++s) {
      const int k = shared[s];
      const PlanOperand& o = p.operand[k];
      if (o.target == Target::none) continue;
      const T* from = level;
      for (int other = 0; other < shared_count; ++other) {
        if (other == s || !shared_row[other]) continue;
        for (int64_t i = 0; i < cols; ++i) shared_grad[i] = from[i] * shared_row[other][i];
        from = shared_grad;
      }
      if (o.sums) {
        add(o, k, 0, col, from, cols);
      } else {
        finish<T>(o, at[k], grad_at[k], col, from, cols);
      }
    }
  }

  T* slope_for(int v) {
    const PlanOperand& o = p.operand[varying[v]];
    return o.target == Target::store && o.activation != Activation::none ? slope[v] : nullptr;
  }

  // Adds a row of derivatives, of the group's row `r`, to the slot's float64 sums.
  void add(const PlanOperand& o, int k, int64_t r, int64_t col, const T* from, int64_t cols) {
    double* sums = sums_of(o) + (o.target == Target::run ? col - slot_col : partial_at[k] + r * o.partial_row[inner] + col);
    for (int64_t i = 0; i < cols; ++i) sums[i] += static_cast<double>(from[i]);
  }

  // Derivatives that the inner loop left in grad[v]: slopes and masks applied, then stored or added up.
  void write(int v, int64_t from, int64_t rows, int64_t col, int64_t cols) {
    const int k = varying[v];
    const PlanOperand& o = p.operand[k];
    for (int64_t r = 0; r < rows; ++r) {
      T* row = grad[v] + r * cols;
      if (const T* dy = slope_for(v)) {
        if (!repeated[v]) dy += r * cols;
        for (int64_t i = 0; i < cols; ++i) row[i] *= dy[i];
      }
      if (o.mask && !o.mask_col) {
        if (!present(k, from + r, 0)) fill(row, T(0), cols);
      } else if (o.mask) {
        for (int64_t i = 0; i < cols; ++i)
          if (!present(k, from + r, col + i)) row[i] = 0;
      }
      if (o.target == Target::store) {
        store_grad(o, grad_at[k] + (from + r) * o.grad_row[inner] + col * o.grad_col, o.grad_col, row, cols, p.stream);
      } else {
        add(o, k, from + r, col, row, cols);
      }
    }
  }

  const Plan& p;
  int64_t row_slot, col_slot, slice, slot_col, first_col, last_col;
  int inner;  // the innermost row dim
  // Operands by how they vary: along the rows only, along the columns only (within a group), along both.
  int splats[kMaxOperands], shared[kMaxOperands], varying[kMaxOperands];
  int splat_count = 0, shared_count = 0, varying_count = 0;
  bool direct[kMaxOperands];       // of the varying: read in place
  bool repeated[kMaxOperands];     // brought in once for all rows
  bool plain_store[kMaxOperands];  // derivative written in place
  DType stored;                    // as what the inner loops read them
  bool staging = false, wanted = false, shared_wanted = false, sums_wanted = false, masked = false;
  int64_t index[kMaxDims], at[kMaxOperands], mask_at[kMaxOperands], grad_at[kMaxOperands], partial_at[kMaxOperands];
  double sum[kGroup];
  T scale[kGroup], splat_value[kMaxOperands][kGroup], splat_slope[kMaxOperands][kGroup];
  const T* shared_row[kMaxOperands];
  alignas(64) double level_sum[kBlock];
  alignas(64) T ones[kBlock], level[kBlock], shared_product[kBlock], shared_grad[kBlock], shared_value[kMaxOperands][kBlock];
  alignas(64) T value[kMaxOperands][kBlock], slope[kMaxOperands][kBlock], grad[kMaxOperands][kBlock];
};

template <class T>
void run_slot(const Plan& plan, int64_t slot, int64_t slice) {
  Slot<T>(plan, slot, slice).run();
}

// ---- the sum of the slots ------------------------------------------------------------------------------------------------

// Part `part` of `parts` of the derivative of one operand: its slots' sums added in order.
template <class T>
void combine(const Plan& p, int operand, int64_t part, int64_t parts) {
  const PlanOperand& o = p.operand[operand];
  const int64_t cols = o.splat ? 1 : p.cols, blocks = (cols + kBlock - 1) / kBlock, items = o.sums_size / cols * blocks;
  const int64_t slots = o.splat ? p.row_slots * p.col_slots : p.row_slots;
  for (int64_t item = part * items / parts; item < (part + 1) * items / parts; ++item) {
    int64_t row = item / blocks, at = 0, grad_at = 0;
    const double* sums = o.sums + row * cols + item % blocks * kBlock;
    for (int d = p.row_dims - 1; d >= 0; --d) {
      if (!o.has_row[d]) continue;
      at += row % p.row_size[d] * o.row[d];
      grad_at += row % p.row_size[d] * o.grad_row[d];
      row /= p.row_size[d];
    }
    const int64_t col = item % blocks * kBlock, count = cols - col < kBlock ? cols - col : kBlock;
    alignas(64) double total[kBlock];
    fill(total, 0.0, count);
    for (int64_t slot = 0; slot < slots; ++slot)
      for (int64_t i = 0; i < count; ++i) total[i] += sums[slot * o.sums_size + i];
    finish<T>(o, at, grad_at, col, total, count);
  }
}

}  // namespace

#define FUSIONSUM_STRING(name) #name
#define FUSIONSUM_NAME(name) FUSIONSUM_STRING(name)
extern const Isa isa = {FUSIONSUM_NAME(FUSIONSUM_ISA), {run_slot<float>, run_slot<double>}, {combine<float>, combine<double>}};

}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
