// A plan: one problem (sum.h) brought into the order in which the kernels walk through it. The words it uses are in
// space.h.
//
// What lives here: the plan; plan.cpp makes it. What lives elsewhere: when and on which thread its tasks run (work.h);
// the walk through a task (walk.inl).
#pragma once
#include "../../space.h"
#include "../work.h"

namespace fusionsum {

// Where the derivative of an operand goes.
enum class Target : uint8_t {
  none,     // not asked for
  store,    // the operand has every row dim: each row is written once
  run,      // the operand lacks the innermost row dims: the rows of a run sum to one, within one task
  partial,  // any other broadcast: each task sums in float64 into an array of its own; `combine` adds these up in order
};

// How an operand varies within a group of rows.
enum class Kind : uint8_t {
  splat,    // one value per row, the same for all columns
  uniform,  // a row of values, the same for all rows of the group
  varying,  // a row of values for each row
};

struct PlanOperand {
  const void* data;
  const uint8_t* mask;
  void* grad;
  DType dtype;
  Activation activation;
  Target target;
  Kind kind;
  bool in_place;                    // rows are read where they lie, without conversion
  bool repeated;                    // varying, not in place, and yet the same for all rows of a group: brought in once
  bool grad_in_place;               // rows of the derivative are written where they belong, without conversion
  int64_t col, mask_col, grad_col;  // strides along the vector dim, in elements
  int64_t row[kMaxDims], mask_row[kMaxDims], grad_row[kMaxDims];
  int64_t partial_row[kMaxDims];
  bool has_row[kMaxDims];  // the operand has an extent along this row dim
  int64_t run;             // Target::run: how many rows sum to one
  double* sums;            // Target::run over more than kSummed rows, and Target::partial: float64 sums of each task
  int64_t sums_size;       // ... and how many a task has
  int64_t value, slope, derivative;  // places in the scratch memory, of rows brought in, their slopes, derivatives
};

// Where in a thread's scratch memory, in bytes: what is not one operand's own. T: the working precision.
struct Scratch {
  int64_t sum;                         // double, per row of a group: sums over the columns
  int64_t scale;                       // T, per row of a group: the product of the splat operands
  int64_t in_rows, out_rows;           // pointers, per varying operand and row: where masks lead
  int64_t absent, zeros, trash, ones;  // T, per column: what masked and constant operands are read from and written to
  int64_t product, short_sum, long_sum, own;  // T (long_sum: double), per column: of uniform operands
  int64_t finished, data, slope, total;       // T (total: double), per column: sums on their way to a derivative
  int64_t bytes;
};

struct Plan {
  int row_dims, operands;
  int64_t row_size[kMaxDims];
  int64_t rows, cols;
  int64_t row_tasks, col_tasks, rows_per_task, cols_per_task;
  int64_t rows_per_slice, cols_per_slice, col_slices, slices;  // of one task, column slices innermost
  bool wide;                                                   // T is float64, else float32
  bool stream;                                                 // gradients outgrow the caches: store past them
  double absent;
  DType stored;         // of the rows that the inner loops read: T's, or a 16-bit type that is converted on the way
  bool masked;          // some varying operand has a mask: its rows may lie anywhere
  bool staged;          // some varying operand's rows or derivatives pass through scratch memory
  bool differentiates;  // some varying operand, some uniform operand, some splat operand wants its derivative
  bool sums_rows, sums_cols;
  bool spans_runs;  // a group may hold several runs, from one of which to the next only rows in place and the sums move
  int splats, uniforms, varyings;
  int8_t splat[kMaxOperands], uniform[kMaxOperands], varying[kMaxOperands];  // the operands of each kind
  Scratch scratch;
  PlanOperand operand[kMaxOperands];
};

constexpr int64_t kGroup = 64;    // rows at a time
constexpr int64_t kBlock = 1024;  // columns at a time: a block of every operand stays in the first-level cache

// The loops of one instruction set, for float32 [0] and float64 [1] accumulation.
struct SumKernels {
  void (*walk[2])(const Plan&, int64_t task, int64_t slice, char* scratch);
  void (*combine[2])(const Plan&, int operand, int64_t part, int64_t parts, char* scratch);
};

// Carries a problem out, in memory that the workspace lends. `interrupted` is asked between slices; when it returns
// true the rest is left undone, and so it returns false. Throws std::bad_alloc.
bool execute(const Problem& problem, const SumKernels& kernels, Workspace& workspace, bool (*interrupted)());

}  // namespace fusionsum
