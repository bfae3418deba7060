// A plan: one problem (sum.h) brought into the order in which the kernels run through it.
//
// One dim is the vector dim, of `cols` entries. All the others are flattened, in order, into `rows`. Rows are cut into
// row_slots, columns into col_slots; a slot (row, col) is one task, and its size depends on the problem alone, never on the
// number of threads, so neither do the results. A long task runs in `slices`, between which Ctrl-C is looked for.
//
// What lives here: the plan and the function that makes and runs it (plan.cpp). What lives elsewhere: the loops that carry it
// out (cpu/kernel.inl).
#pragma once
#include "../../space.h"

namespace fusionsum {

// Where the derivative of an operand goes.
enum class Target : uint8_t {
  none,     // not asked for
  store,    // the operand has every row dim: each row is written once
  run,      // it lacks the innermost row dims: `run` consecutive rows sum to one, within one task
  partial,  // any other broadcast: each slot sums in float64 into an array of its own; `combine` adds these up in order
};

struct PlanOperand {
  const void* data;
  const uint8_t* mask;
  void* grad;
  DType dtype;
  Activation activation;
  Target target;
  bool splat;             // no extent along the vector dim: one value per row
  int64_t col, mask_col;  // strides along the vector dim, in elements
  int64_t grad_col;
  int64_t row[kMaxDims], mask_row[kMaxDims], grad_row[kMaxDims];
  int64_t partial_row[kMaxDims];
  bool has_row[kMaxDims];  // the operand has an extent along this row dim
  int64_t run;             // Target::run: how many rows sum to one
  double* sums;            // Target::run over more than kSummed rows, and Target::partial: float64 sums of each slot
  int64_t sums_size;       // ... and how many a slot has
};

struct Plan {
  int row_dims, operands;
  int64_t row_size[kMaxDims];
  int64_t rows, cols;
  int64_t row_slots, col_slots, rows_per_slot, cols_per_slot;
  int64_t rows_per_slice, cols_per_slice, col_slices, slices;  // of one slot, column slices innermost
  bool stream;    // gradients outgrow the caches: store past them
  double absent;
  PlanOperand operand[kMaxOperands];
};

constexpr int64_t kGroup = 64;    // rows at a time
constexpr int64_t kBlock = 1024;  // columns at a time: a block of every operand stays in the first-level cache

// One instruction set: its name and its loops, for float32 [0] and float64 [1] accumulation.
struct Isa {
  const char* name;
  void (*run_slot[2])(const Plan&, int64_t slot, int64_t slice);
  void (*combine[2])(const Plan&, int operand, int64_t part, int64_t parts);
};

// Carries a problem out. `interrupted` is called between slices; when it returns true the rest is left undone, and so it
// returns false. Throws std::bad_alloc where there is no memory for the sums.
bool run(const Problem& problem, const Isa& isa, bool (*interrupted)());

}  // namespace fusionsum
