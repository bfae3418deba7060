// A pass: what one launch reads and writes. Plain data, filled in by plan.cpp, carried out by kernel.cuh.
//
// The loop space is units x run x cols. `cols` is the vector dim, `run` the row dims along which a pass sums, `units` the other
// row dims. Operands come in the order
//     varying: a row of values for every unit and row of the run
//     shared:  a row of values for every unit, the same for the whole run
//     splat:   one value for all columns
// Two kernels serve two kinds of sum. `rows`: lanes of a row group walk along the columns; sums over columns end in splat
// operands. `columns`: a thread keeps its columns and walks along the run; sums over the run end in shared operands. Both store
// derivatives of varying operands on the way. A sum that more than one block has a share in goes to float64 partial sums, and
// `combine` adds these in order.
#pragma once
#include "../../space.h"

namespace fusionsum {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kRowDims = 10;                       // after merging; the parameters of a launch must fit 4 KB
constexpr int kPassOperands = kMaxOperands + 2;    // and a mask by itself, and the constant 1

enum class Target : uint8_t {
  none,
  each,  // the operand has all row dims: stored where it is computed
  unit,  // it lacks the dims of the run: one sum per unit
  all,   // it lacks all row dims: one sum per launch. At most one of these in a pass
};

struct PassOperand {
  const void* data;     // null: the constant 1
  const uint8_t* mask;  // null: present everywhere
  void* grad;
  double* sums;  // partial sums [part][entry], where blocks share; null: store the sum itself
  int64_t col, mask_col, grad_col;
  int64_t row[kRowDims], mask_row[kRowDims], grad_row[kRowDims];  // the dims of the unit, then those of the run
  DType dtype;
  Activation activation;
  Target target;
  bool packed;     // 16-byte accesses are aligned, for data and grad
  bool absent_is_one;
};

struct Pass {
  int unit_dims, run_dims;
  int64_t size[kRowDims];
  double inverse_size[kRowDims];
  int64_t units, run, cols;
  int varying, shared, operands;
  bool stream;  // gradients outgrow the L2 cache: store past it
  // A block is slots (units) x groups (rows of the run) x lanes (columns); the first two are powers of two.
  int lanes_log2, groups_log2;
  int parts;                       // blocks that share the rows, each for a tile of the columns: block = tile * parts + part
  int splits;                      // of the run among them
  int64_t rows_per_split;
  int tiles, packets_per_tile;
  PassOperand operand[kPassOperands];
};
static_assert(sizeof(Pass) <= 4096, "the parameters of a launch");

// grad[entry] = sum over the parts of sums[part][entry], in a fixed order.
constexpr int kCombined = 8;  // neighbouring entries in one block
struct Combine {
  const double* sums;
  int64_t parts, entries;
  int dims;
  int64_t size[kRowDims + 1], stride[kRowDims + 1];
  double inverse_size[kRowDims + 1];
  void* grad;
  DType dtype;
};

using PassKernel = void(const Pass);

// The kernels for one way to store varying operands.
constexpr int kCounts = 5;  // of varying operands: 1, 2, 3, 4, any
struct Kernels {
  // [varying operands - 1, or the last][derivatives of varying operands][activations, masks, constants]; null where
  // plan.cpp's instance_of never looks
  PassKernel *rows[kCounts][2][2], *columns[kCounts][2][2];
  int width;  // columns in a packet
};
extern const Kernels kernels_f64, kernels_f32, kernels_bf16, kernels_f16, kernels_any32, kernels_any64;

}  // namespace cuda
}  // namespace fusionsum
