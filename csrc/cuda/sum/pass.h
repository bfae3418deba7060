// A pass: what one launch reads and writes. Plain data, filled in by plan.cpp, executed by kernel.cuh and combine.cu.
//
// The loop space is units x run x cols. `cols` is the vector dim; the other dims are row dims. A run is neighbouring
// rows along which derivatives are summed, and a unit is all that the rows of one run have in common: the remaining row
// dims. Operands come in the order
//     varying: a row of values for every unit and row of the run
//     uniform: a row of values for every unit, the same for all rows of the run
//     splat:   one value for all columns
// The vector form, f and g (B, n, O) and weights (n, 1) with output (B, O), forward: O is the vector dim, a run is the
// n terms, a unit is one of B; f and g are varying, the output is uniform and the weights are splat.
//
// Two kernels serve two kinds of sum. `rows`: lanes walk along the columns of a row; sums over columns end in splat
// operands. `columns`: a thread keeps its columns and walks along the run; sums over the run end in uniform operands.
// Both store derivatives of varying operands on the way. A sum in which several blocks have a part is written as
// float64 partial sums, which `combine` adds in order.
#pragma once
#include "../../space.h"

namespace fusionsum {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kRowDims = 10;                     // after merging; the parameters of a launch must fit 4 KB
constexpr int kPassOperands = kMaxOperands + 2;  // and a mask by itself, and the constant 1

// Over how many rows a pass sums the derivative of an operand.
enum class Reach : uint8_t {
  none,  // the pass does not compute it
  row,   // the operand has all row dims: each row's is stored where it is computed
  run,   // the operand lacks the dims of the run: one sum for each unit
  all,   // the operand lacks all row dims: one sum for the launch. At most one of these in a pass
};

struct PassOperand {
  const void* data;     // null: the constant 1
  const uint8_t* mask;  // null: present everywhere
  void* grad;
  double* sums;  // partial sums [part][entry], where several blocks have parts; null: store the sum itself
  int64_t col, mask_col, grad_col;  // strides in elements; of varying operands of the loose kernels in bytes
  int64_t row[kRowDims], mask_row[kRowDims], grad_row[kRowDims];  // the dims of the unit, then those of the run
  DType dtype;
  Activation activation;
  Reach reach;
  bool packed;  // 16-byte accesses are aligned, for data and grad
  bool absent_is_one;
};

struct Pass {
  int unit_dims, run_dims;
  int64_t size[kRowDims];
  double inverse_size[kRowDims];
  int64_t units, run, cols;
  int varying, uniform, operands;
  bool stream;  // gradients outgrow the L2 cache: store past it
  // A block is slots (of a unit each) x groups (of rows of the run) x lanes (of columns); each count is a power of two.
  int lanes_log2, groups_log2;
  // The grid is parts (of rows) x tiles (of columns): block = part * tiles + tile, so that the blocks of a row run
  // together. A part has some of the units, and one of the splits of their runs.
  int parts, splits;
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

// The kernels for one way in which varying operands are stored: packed, of one dtype each; or loose, of any.
constexpr int kCounts = 5;  // of varying operands: 1, 2, 3, 4, any
struct Kernels {
  // [varying operands - 1, or the last][derivatives of varying operands][activations, masks, constants]; null where
  // instance_of (plan.cpp) never looks
  PassKernel *rows[kCounts][2][2], *columns[kCounts][2][2];
  int width[kCounts][2][2];  // columns in a packet, [varying operands - 1][`columns`, not `rows`][activations ...]
};
#define DECLARE(name, ...) extern const Kernels kernels_##name;  // kernel_<name>.cu
FUSIONSUM_DTYPES(DECLARE)
#undef DECLARE
extern const Kernels kernels_loose32, kernels_loose64;

}  // namespace cuda
}  // namespace fusionsum
