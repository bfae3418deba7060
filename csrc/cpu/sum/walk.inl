// The walk through a task of a plan (plan.h), once, over the vocabulary of an instruction set: a task's rows are cut
// into groups and blocks, operands brought in, an inner loop run over each tile (tile.inl), derivatives taken out or
// summed; then the tasks' sums are added up. All memory is the thread's scratch memory, laid out by the plan; frames
// stay below a few KB.
#include "tile.inl"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
inline T* piece(char* scratch, int64_t place) {
  return static_cast<T*>(static_cast<void*>(scratch + place));
}

template <class T>
inline void store_derivative(const PlanOperand& o, int64_t at, int64_t stride, const T* from, int64_t cols,
                             bool stream) {
  with_dtype(o.dtype, o.grad, [&](auto* p) { store_row(unconst(p) + at, stride, from, cols, stream); });
}

// Writes a row of finished sums as the derivative of operand o: phi' applied, rounded to the operand's dtype. `at` and
// `grad_at` are the operand's offsets of that row. The zero sum of a masked operand stays zero: its data may be NaN.
template <class T, class S>
inline void finish(const Plan& p, const PlanOperand& o, char* scratch, int64_t at, int64_t grad_at, int64_t col,
                   const S* sums, int64_t cols) {
  T* const row = piece<T>(scratch, p.scratch.finished);
  for (int64_t i = 0; i < cols; ++i) row[i] = static_cast<T>(sums[i]);
  if (o.activation != Activation::none) {
    T *const z = piece<T>(scratch, p.scratch.data), *const slope = piece<T>(scratch, p.scratch.slope);
    with_dtype(o.dtype, o.data, [&](auto data) { load_row(z, data + at + col * o.col, o.col, cols); });
    activate(o.activation, z, z, slope, cols);
    for (int64_t i = 0; i < cols; ++i) row[i] = o.mask && row[i] == 0 ? T(0) : row[i] * slope[i];
  }
  store_derivative(o, grad_at + col * o.grad_col, o.grad_col, row, cols, false);
}

template <class T>
class Walker {
 public:
  Walker(const Plan& plan, int64_t task, int64_t slice, char* scratch)
      : p(plan),
        scratch(scratch),
        row_task(task / plan.col_tasks),
        col_task(task % plan.col_tasks),
        slice(slice),
        inner(plan.row_dims - 1) {
    const int64_t task_end = smaller(p.cols, (col_task + 1) * p.cols_per_task);
    task_col = col_task * p.cols_per_task;
    first_col = task_col + slice % p.col_slices * p.cols_per_slice;
    last_col = smaller(task_end, first_col + p.cols_per_slice);
    sum = at<double>(p.scratch.sum);
    scale = at<T>(p.scratch.scale);
  }

  void walk() {
    if (slice < p.col_slices) clear_partials();
    const int64_t start = row_task * p.rows_per_task, stop = smaller(p.rows, start + p.rows_per_task);
    int64_t row = start + slice / p.col_slices * p.rows_per_slice;
    const int64_t last = smaller(stop, row + p.rows_per_slice);
    if (row >= last || first_col >= last_col) return;
    for (int v = 0; v < p.varyings; ++v)
      if (!varying(v).data) fill(at<T>(p.scratch.ones), T(1), smaller(kBlock, p.cols));
    seek(row);
    while (row < last) {
      const int64_t rows = smaller(smaller(kGroup, last - row), p.row_size[inner] - index[inner]);
      const int64_t runs = p.spans_runs ? smaller((last - row) / rows, p.row_size[inner - 1] - index[inner - 1]) : 1;
      group(row, rows, runs);
      row += rows * runs;
      advance(rows, runs);
    }
  }

 private:
  template <class S>
  S* at(int64_t place) const {
    return piece<S>(scratch, place);
  }
  const PlanOperand& varying(int v) const { return p.operand[p.varying[v]]; }
  const PlanOperand& uniform(int i) const { return p.operand[p.uniform[i]]; }
  const PlanOperand& splat(int s) const { return p.operand[p.splat[s]]; }

  // Offsets of the current row, in elements, kept up to date as the row moves.
  void seek(int64_t row) {
    for (int d = inner; d >= 0; --d) {
      index[d] = row % p.row_size[d];
      row /= p.row_size[d];
    }
    for (int k = 0; k < p.operands; ++k) {
      data_at[k] = mask_at[k] = grad_at[k] = partial_at[k] = 0;
      for (int d = 0; d < p.row_dims; ++d) shift(k, d, index[d]);
    }
  }
  void shift(int k, int d, int64_t by) {
    const PlanOperand& o = p.operand[k];
    data_at[k] += by * o.row[d];
    mask_at[k] += by * o.mask_row[d];
    grad_at[k] += by * o.grad_row[d];
    partial_at[k] += by * o.partial_row[d];
  }
  void advance(int64_t rows, int64_t runs) {
    for (int d = inner; d >= 0; --d) {
      const int64_t by = d == inner ? rows : d == inner - 1 ? runs : 1;
      index[d] += by;
      const bool carry = index[d] == p.row_size[d] && d > 0;
      for (int k = 0; k < p.operands; ++k) shift(k, d, carry ? by - index[d] : by);
      if (!carry) return;
      index[d] = 0;
      product_col = -1;
    }
  }

  double* sums_of(const PlanOperand& o) const {
    const bool per_task = o.target == Target::run || o.kind == Kind::splat;
    return o.sums + (per_task ? row_task * p.col_tasks + col_task : row_task) * o.sums_size;
  }
  void clear_partials() {
    for (int k = 0; k < p.operands; ++k) {
      const PlanOperand& o = p.operand[k];
      if (o.target != Target::partial) continue;
      double* sums = sums_of(o);
      if (o.kind == Kind::splat) {
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

  // Rows of operand k from the group's row `from` on, converted and activated, into `to`, row after row; with their
  // slopes where dy is given. What is absent is not read.
  void load(int k, int64_t from, int64_t rows, int64_t col, int64_t cols, T* to, T* dy,
            const T* beside = nullptr) const {
    const PlanOperand& o = p.operand[k];
    const int64_t first = data_at[k] + from * o.row[inner] + col * o.col;
    const int64_t ahead = rows * o.row[inner];                 // the tile after this one
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
        } else {  // the inner loop reads the row `absent` in place of an absent row; zeros keep the activation quiet
                  // here
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

  void group(int64_t row, int64_t rows, int64_t runs) {
    for (int64_t r = 0; r < rows; ++r) scale[r] = 1;
    for (int s = 0; s < p.splats; ++s) {
      const PlanOperand& o = splat(s);
      T* const value = at<T>(o.value);
      if (o.data) {
        load_splat(p.splat[s], rows, value, o.activation != Activation::none ? at<T>(o.slope) : nullptr);
      } else {
        fill(value, T(1), rows);
      }
      for (int64_t r = 0; r < rows; ++r) scale[r] *= value[r];
    }
    for (int64_t r = 0; p.sums_cols && r < rows; ++r) sum[r] = 0;
    for (int k = 0; k < p.operands; ++k) {
      const PlanOperand& o = p.operand[k];
      if (o.target == Target::run && o.sums && row % o.run == 0)
        fill(sums_of(o) + (o.kind == Kind::splat ? 0 : first_col - task_col), 0.0,
             o.kind == Kind::splat ? 1 : last_col - first_col);
    }
    for (int64_t col = first_col; col < last_col; col += kBlock)
      block(rows, runs, col, smaller(kBlock, last_col - col));
    for (int s = 0; p.sums_cols && s < p.splats; ++s) splat_derivative(s, rows);
    for (int k = 0; k < p.operands; ++k) {
      const PlanOperand& o = p.operand[k];
      if (o.target != Target::run || !o.sums || (row + rows) % o.run) continue;
      const bool is_splat = o.kind == Kind::splat;
      const int64_t cols = is_splat ? 1 : last_col - first_col, base = is_splat ? 0 : first_col;
      const double* const sums = sums_of(o) + (is_splat ? 0 : first_col - task_col);
      for (int64_t i = 0; i < cols; i += kBlock)
        finish<T>(p, o, scratch, data_at[k], grad_at[k], base + i, sums + i, smaller(kBlock, cols - i));
    }
  }

  // One value per row: the group's rows are the columns of the one row that is loaded.
  void load_splat(int k, int64_t rows, T* to, T* dy) const {
    const PlanOperand& o = p.operand[k];
    with_dtype(o.dtype, o.data, [&](auto data) {
      if (!o.mask) {
        load_row(to, data + data_at[k], o.row[inner], rows);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          to[r] = 0;
          if (present(k, r, 0)) load_row(to + r, data + data_at[k] + r * o.row[inner], 1, 1);
        }
      }
    });
    activate(o.activation, to, to, dy, rows);
    for (int64_t r = 0; o.mask && r < rows; ++r)
      if (!present(k, r, 0)) to[r] = static_cast<T>(p.absent);
  }

  void splat_derivative(int s, int64_t rows) {
    const int k = p.splat[s];
    const PlanOperand& o = p.operand[k];
    if (o.target == Target::none) return;
    T derivative[kGroup];
    for (int64_t r = 0; r < rows; ++r) derivative[r] = static_cast<T>(sum[r]);
    for (int other = 0; other < p.splats; ++other) {
      const T* const value = at<T>(splat(other).value);
      for (int64_t r = 0; other != s && r < rows; ++r) derivative[r] *= value[r];
    }
    if (o.target == Target::store) {
      for (int64_t r = 0; r < rows; ++r) {
        if (o.activation != Activation::none) derivative[r] *= at<T>(o.slope)[r];
        if (!present(k, r, 0)) derivative[r] = 0;
      }
      store_derivative(o, grad_at[k], o.grad_row[inner], derivative, rows, false);
    } else {
      double* sums = sums_of(o) + (o.target == Target::partial ? partial_at[k] : 0);
      for (int64_t r = 0; r < rows; ++r)
        if (present(k, r, 0)) sums[r * o.partial_row[inner]] += derivative[r];
    }
  }

  void block(int64_t rows, int64_t runs, int64_t col, int64_t cols) {
    if constexpr (kDType<T> == DType::f32) {
      if (p.stored == DType::bf16) return block<Bf16>(rows, runs, col, cols);
      if (p.stored == DType::f16) return block<F16>(rows, runs, col, cols);
    }
    block<T>(rows, runs, col, cols);
  }

  // The tiles of a group of rows and a block of columns. S is what the varying operands are stored in; those that are
  // not plain rows of S are brought into rows of T, and then S is T.
  template <class S>
  void block(int64_t rows, int64_t runs, int64_t col, int64_t cols) {
    Tile<T, S> t;
    begin(t, col, cols);
    if (p.spans_runs) return sum_runs(t, rows, runs, col);
    int64_t step = p.staged ? larger(1, kBlock / cols) : rows;
    if (p.sums_rows) {  // a whole number of steps makes kSummed rows
      step = smaller(step, kSummed);
      while (kSummed % step) --step;
    }
    T* const short_sum = at<T>(p.scratch.short_sum);
    double* const long_sum = at<double>(p.scratch.long_sum);
    for (int64_t from = 0; from < rows; from += step) {
      t.rows = smaller(step, rows - from);
      t.scale = scale + from;
      t.sum = sum + from;
      t.fresh = from % kSummed == 0;
      if (t.fresh && p.sums_rows && p.differentiates) fill(short_sum, T(0), cols);
      bring_in(t, from, col, cols);
      if (p.differentiates) {
        differentiate_for<T, S>(p.varyings, t.uniform, p.sums_cols)(t);
      } else {
        if (p.sums_rows) accumulate_for<T, S>(p.varyings)(t);
        if (p.sums_cols) dot_for<T, S>(p.varyings)(t);
      }
      take_out(t, from, col, cols);
      if (p.sums_rows && rows > kSummed && ((from + t.rows) % kSummed == 0 || from + t.rows == rows)) {
        for (int64_t i = 0; i < cols; ++i)
          long_sum[i] = (from < kSummed ? 0 : long_sum[i]) + static_cast<double>(short_sum[i]);
      }
      for (int v = 0; v < p.varyings; ++v) {
        if (varying(v).in_place) t.in[v] += t.rows * t.in_step[v];
        if (varying(v).grad_in_place) t.out[v] += t.rows * t.out_step[v];
      }
    }
    if (p.sums_rows) {
      for (int64_t i = 0; rows > kSummed && i < cols; ++i) short_sum[i] = static_cast<T>(long_sum[i]);
      uniform_derivatives(short_sum, col, cols);
    }
  }
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  // Runs of `rows` rows, one after another, without what a group costs: each is a tile, and is written at once.
  template <class S>
  void sum_runs(Tile<T, S>& t, int64_t rows, int64_t runs, int64_t col) {
    const int k = p.uniform[0], outer = inner - 1;
    const PlanOperand& o = p.operand[k];
    const auto accumulate = accumulate_for<T, S>(p.varyings);
    t.rows = rows;
    t.scale = scale;
    t.fresh = true;
    for (int64_t run = 0; run < runs; ++run) {
      accumulate(t);
      finish<T>(p, o, scratch, data_at[k] + run * o.row[outer], grad_at[k] + run * o.grad_row[outer], col,
                t.uniform_out, t.cols);
      for (int v = 0; v < p.varyings; ++v)
        if (t.in_memory[v]) t.in[v] += varying(v).row[outer];
    }
  }

  // Rows of T as rows of S, which are the same where this is called.
  template <class S, class R>
  static S* as(R* row) {
    return const_cast<S*>(static_cast<const S*>(static_cast<const void*>(row)));
  }

  // What stays the same from tile to tile of a block.
  template <class S>
  void begin(Tile<T, S>& t, int64_t col, int64_t cols) {
    if (p.masked) {
      fill(at<T>(p.scratch.zeros), T(0), cols);
      S value;
      narrow(static_cast<T>(p.absent), &value);
      fill(at<S>(p.scratch.absent), value, cols);
    }
    t.cols = cols;
    t.operands = p.varyings;
    t.masked = p.masked;
    t.uniform = multiply_uniform(col, cols);
    t.uniform_out = p.sums_rows ? at<T>(p.scratch.short_sum) : nullptr;
    for (int v = 0; v < p.varyings; ++v) {
      const int k = p.varying[v];
      const PlanOperand& o = p.operand[k];
      const bool leads = o.mask && !o.mask_col;  // to rows elsewhere, where the operand is absent
      t.in_step[v] = !o.data || o.repeated ? 0 : o.in_place ? o.row[inner] : cols;
      t.out_step[v] = o.grad_in_place ? o.grad_row[inner] : cols;
      t.in[v] = !o.data      ? as<S>(at<T>(p.scratch.ones))
                : o.in_place ? static_cast<const S*>(o.data) + data_at[k] + col
                             : as<S>(at<T>(o.value));
      t.out[v] = o.target == Target::none ? nullptr
                 : o.grad_in_place        ? static_cast<S*>(o.grad) + grad_at[k] + col
                                          : as<S>(at<T>(o.derivative));
      t.stream[v] = p.stream && o.grad_in_place;
      t.in_memory[v] = o.data && o.in_place;
      t.in_rows[v] = leads ? at<const S*>(p.scratch.in_rows) + v * kGroup : nullptr;
      t.out_rows[v] = leads ? at<S*>(p.scratch.out_rows) + v * kGroup : nullptr;
      if (o.repeated) load(k, 0, 1, col, cols, at<T>(o.value), slopes(o));
    }
  }

  // The rows of one tile.
  template <class S>
  void bring_in(const Tile<T, S>& t, int64_t from, int64_t col, int64_t cols) {
    const T* beside = nullptr;  // rows read in place, which memory is asked for while other rows are activated
    for (int v = 0; p.staged && v < p.varyings; ++v)
      if (varying(v).in_place && t.in_step[v] == cols) beside = as<const T>(t.in[v]);
    for (int v = 0; v < p.varyings; ++v) {
      const PlanOperand& o = varying(v);
      if (!o.in_place && !o.repeated) load(p.varying[v], from, t.rows, col, cols, at<T>(o.value), slopes(o), beside);
      // The absent rows of a masked operand are read from a constant row, and their derivatives written where nobody
      // looks.
      for (int64_t r = 0; t.in_rows[v] && r < t.rows; ++r) {
        const bool here = present(p.varying[v], from + r, 0);
        at<const S*>(p.scratch.in_rows)[v * kGroup + r] = here ? t.in[v] + r * t.in_step[v] : at<S>(p.scratch.absent);
        if (t.out[v])
          at<S*>(p.scratch.out_rows)[v * kGroup + r] = here ? t.out[v] + r * t.out_step[v] : at<S>(p.scratch.trash);
      }
    }
  }

  template <class S>
  void take_out(const Tile<T, S>& t, int64_t from, int64_t col, int64_t cols) {
    for (int v = 0; v < p.varyings; ++v) {
      const PlanOperand& o = varying(v);
      if (o.target == Target::none) continue;
      if (!o.grad_in_place) {
        write(v, from, t.rows, col, cols);
      } else if (o.mask) {
        for (int64_t r = 0; r < t.rows; ++r)
          if (!present(p.varying[v], from + r, 0))
            store_row(t.out[v] + r * t.out_step[v], 1, at<T>(p.scratch.zeros), cols, t.stream[v]);
      }
    }
  }

  // A row of a uniform operand: where it lies, or as it was brought in; null for the constant 1.
  const T* uniform_row(int i, int64_t col) const {
    const PlanOperand& o = uniform(i);
    return !o.data      ? nullptr
           : o.in_place ? static_cast<const T*>(o.data) + data_at[p.uniform[i]] + col
                        : at<T>(o.value);
  }

  // The product of the uniform operands; null where there is none but the constant 1. It stays from group to group as
  // long as only the innermost row dim advances, and from block to block where there is one.
  const T* multiply_uniform(int64_t col, int64_t cols) {
    if (product_col == col) return product;
    product_col = col;
    product = nullptr;
    for (int i = 0; i < p.uniforms; ++i) {
      const PlanOperand& o = uniform(i);
      if (!o.data) continue;
      if (!o.in_place) load(p.uniform[i], 0, 1, col, cols, at<T>(o.value), nullptr);
      const T* const row = uniform_row(i, col);
      if (product) {
        T* const to = at<T>(p.scratch.product);
        multiply(to, product, row, cols);
        product = to;
      } else {
        product = row;
      }
    }
    return product;
  }

  // From the derivative of the uniform operands' product to that of each of them.
  void uniform_derivatives(const T* of_product, int64_t col, int64_t cols) {
    for (int i = 0; i < p.uniforms; ++i) {
      const int k = p.uniform[i];
      const PlanOperand& o = p.operand[k];
      if (o.target == Target::none) continue;
      const T* from = of_product;
      T* const own = at<T>(p.scratch.own);
      for (int other = 0; other < p.uniforms; ++other) {
        const T* const row = uniform_row(other, col);
        if (other == i || !row) continue;
        multiply(own, from, row, cols);
        from = own;
      }
      if (o.sums) {
        add(o, k, 0, col, from, cols);
      } else {
        finish<T>(p, o, scratch, data_at[k], grad_at[k], col, from, cols);
      }
    }
  }

  T* slopes(const PlanOperand& o) const {
    return o.target == Target::store && o.activation != Activation::none ? at<T>(o.slope) : nullptr;
  }

  // Adds a row of derivatives, of the group's row `r`, to the task's float64 sums.
  void add(const PlanOperand& o, int k, int64_t r, int64_t col, const T* from, int64_t cols) {
    double* sums =
        sums_of(o) + (o.target == Target::run ? col - task_col : partial_at[k] + r * o.partial_row[inner] + col);
    for (int64_t i = 0; i < cols; ++i) sums[i] += static_cast<double>(from[i]);
  }

  // Derivatives that the inner loop left in scratch memory: slopes and masks applied, then stored or added up.
  void write(int v, int64_t from, int64_t rows, int64_t col, int64_t cols) {
    const int k = p.varying[v];
    const PlanOperand& o = p.operand[k];
    for (int64_t r = 0; r < rows; ++r) {
      T* row = at<T>(o.derivative) + r * cols;
      if (const T* dy = slopes(o)) {
        if (!o.repeated) dy += r * cols;
        for (int64_t i = 0; i < cols; ++i) row[i] *= dy[i];
      }
      if (o.mask && !o.mask_col) {
        if (!present(k, from + r, 0)) fill(row, T(0), cols);
      } else if (o.mask) {
        for (int64_t i = 0; i < cols; ++i)
          if (!present(k, from + r, col + i)) row[i] = 0;
      }
      if (o.target == Target::store) {
        store_derivative(o, grad_at[k] + (from + r) * o.grad_row[inner] + col * o.grad_col, o.grad_col, row, cols,
                         p.stream);
      } else {
        add(o, k, from + r, col, row, cols);
      }
    }
  }

  const Plan& p;
  char* const scratch;
  const int64_t row_task, col_task, slice;
  const int inner;  // the innermost row dim
  int64_t task_col, first_col, last_col;
  double* sum;
  T* scale;
  const T* product = nullptr;  // of the uniform operands' columns from product_col on
  int64_t product_col = -1;    // -1: to be multiplied anew
  int64_t index[kMaxDims], data_at[kMaxOperands], mask_at[kMaxOperands], grad_at[kMaxOperands],
      partial_at[kMaxOperands];
};

template <class T>
void walk(const Plan& plan, int64_t task, int64_t slice, char* scratch) {
  Walker<T>(plan, task, slice, scratch).walk();
}

// ---- the sum of the tasks
// ------------------------------------------------------------------------------------------------

// Part `part` of `parts` of the derivative of one operand: its tasks' sums added in order.
template <class T>
void combine(const Plan& p, int operand, int64_t part, int64_t parts, char* scratch) {
  const PlanOperand& o = p.operand[operand];
  const int64_t cols = o.kind == Kind::splat ? 1 : p.cols, blocks = (cols + kBlock - 1) / kBlock,
                items = o.sums_size / cols * blocks;
  const int64_t tasks = o.kind == Kind::splat ? p.row_tasks * p.col_tasks : p.row_tasks;
  double* const total = piece<double>(scratch, p.scratch.total);
  for (int64_t item = part * items / parts; item < (part + 1) * items / parts; ++item) {
    int64_t row = item / blocks, at = 0, grad_at = 0;
    const double* sums = o.sums + row * cols + item % blocks * kBlock;
    for (int d = p.row_dims - 1; d >= 0; --d) {
      if (!o.has_row[d]) continue;
      at += row % p.row_size[d] * o.row[d];
      grad_at += row % p.row_size[d] * o.grad_row[d];
      row /= p.row_size[d];
    }
    const int64_t col = item % blocks * kBlock, count = smaller(kBlock, cols - col);
    fill(total, 0.0, count);
    for (int64_t task = 0; task < tasks; ++task)
      for (int64_t i = 0; i < count; ++i) total[i] += sums[task * o.sums_size + i];
    finish<T>(p, o, scratch, at, grad_at, col, total, count);
  }
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
