// The choices, in order: the vector dim; which row dims a pass sums along (the run), so that most derivatives are served at
// once; the kernel; how blocks, groups and lanes share the work.
#include "plan.h"

#include <algorithm>
#include <cstring>

namespace fusionsum {
namespace cuda {
namespace {

// Threads that fill a large GPU, and blocks of them. Fewer blocks than kFewBlocks leave it idle: then sums are split.
constexpr int64_t kEnoughThreads = 1 << 18, kEnoughBlocks = kEnoughThreads / kThreads, kFewBlocks = kEnoughBlocks / 4;
constexpr int64_t kMostBlocks = 1 << 16;
constexpr int64_t kStreamBytes = int64_t{32} << 20;  // gradients larger than this do not stay in the L2 cache
constexpr int kMaxLanesOfRow = 32;                    // one warp, or else the whole block
constexpr int kRowsPerGroup = 8;                      // at least, before a run is split further

uint32_t row_dims(const Problem& p, int vector) { return ((1u << p.ndim) - 1) & ~(1u << vector); }

// The row dims along which the mask varies and the operand does not.
uint32_t masked_dims(const Problem& p, const Operand& o, int vector) {
  uint32_t dims = 0;
  for (int d = 0; o.mask && d < p.ndim; ++d)
    if (d != vector && o.mask_stride[d] != 0 && !has(o, d)) dims |= 1u << d;
  return dims;
}

int64_t size_of(const Problem& p, uint32_t dims) {
  int64_t size = 1;
  for (int d = 0; d < p.ndim; ++d)
    if (dims >> d & 1) size *= p.size[d];
  return size;
}

struct Choice {
  uint32_t run;      // row dims
  bool by_columns;   // which kernel
  Target target[kMaxOperands];
  int64_t served;    // entries of the derivatives it yields
  int64_t traffic;   // entries read, where the run is read row by row
  int alone = -1;    // the operand whose mask varies where it does not: its derivative has a pass of its own
};

// What the target of each derivative asked for would be, with this run and kernel.
Choice weigh(const Problem& p, int vector, uint32_t run, bool by_columns) {
  Choice choice{run, by_columns, {}, 0, 0};
  const uint32_t rows = row_dims(p, vector);
  bool all_taken = false, unit_taken = false;
  for (int k = 0; k < p.operands; ++k) {
    const Operand& o = p.operand[k];
    choice.target[k] = Target::none;
    if (!o.grad) continue;
    const uint32_t missing = rows & ~o.dims;
    const bool splat = !has(o, vector);
    Target target = Target::none;
    if (missing == 0) {
      target = splat && by_columns ? Target::none : Target::each;
    } else if (splat == by_columns) {
      target = Target::none;
    } else if (missing == run) {
      target = Target::unit;
    } else if (missing == rows) {
      target = Target::all;
    }
    if (target == Target::unit || target == Target::all) {
      if (by_columns && masked_dims(p, o, vector)) target = Target::none;
      // One sum over the launch; and of splat operands one sum of any kind, which a thread keeps in a register.
      if (target == Target::all && all_taken) target = Target::none;
      if (splat && (unit_taken || all_taken)) target = Target::none;
    }
    all_taken = all_taken || target == Target::all;
    unit_taken = unit_taken || (splat && target == Target::unit);
    choice.target[k] = target;
    if (target != Target::none) choice.served += extent(p, o);
  }
  for (int k = 0; k < p.operands; ++k)
    if (p.operand[k].data) choice.traffic += size_of(p, (has(p.operand[k], vector) ? 1u << vector : 0) | (rows & ~run) | (run & p.operand[k].dims ? run : 0));
  return choice;
}

Choice choose(const Problem& p, int vector) {
  const uint32_t rows = row_dims(p, vector);
  Choice best{0, false, {}, 0, 0};
  const auto consider = [&](uint32_t run) {
    for (const bool by_columns : {false, true}) {
      if (by_columns && !run) continue;
      const Choice choice = weigh(p, vector, run, by_columns);
      bool sums = false;  // which is what going by columns is for
      for (int k = 0; k < p.operands; ++k) sums = sums || choice.target[k] == Target::unit || choice.target[k] == Target::all;
      if (by_columns && !sums) continue;
      if (choice.served > best.served || (choice.served == best.served && choice.traffic < best.traffic)) best = choice;
    }
  };
  for (int d = 0; d < p.ndim; ++d)
    if (d != vector) consider(1u << d);
  consider(0);
  for (int k = 0; k < p.operands; ++k) consider(rows & ~p.operand[k].dims);
  if (best.served) return best;
  for (int k = 0; k < p.operands; ++k) {  // what is left has a mask that varies where its operand does not
    if (!p.operand[k].grad) continue;
    Problem one = p;
    for (int j = 0; j < p.operands; ++j)
      if (j != k) one.operand[j].grad = nullptr;
    one.operand[k].mask = nullptr;
    best = weigh(one, vector, rows & ~p.operand[k].dims, true);
    best.alone = k;
    return best;
  }
  return best;
}

PassOperand operand_of(const Operand& o, int vector) {
  PassOperand to{};
  to.data = o.data;
  to.mask = o.mask;
  to.dtype = o.dtype;
  to.activation = o.activation;
  if (has(o, vector)) {
    to.col = o.stride[vector];
    to.mask_col = o.mask ? o.mask_stride[vector] : 0;
    to.grad_col = o.grad_stride[vector];
  }
  return to;
}

bool aligned(const void* data, DType dtype, const int64_t* stride, int dims, int64_t col) {
  const int64_t width = 16 / item_size(dtype);
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && (!data || col == 1);
  for (int d = 0; d < dims; ++d) fits = fits && stride[d] % width == 0;
  return fits;
}

// Row dims in order, those of the unit before those of the run; neighbours that every operand walks as one are merged.
bool set_rows(const Problem& p, int vector, uint32_t run, const int* from, Pass& pass) {
  int dims = 0;
  for (const bool of_run : {false, true}) {
    const int first = dims;
    for (int d = 0; d < p.ndim; ++d) {
      if (d == vector || static_cast<bool>(run >> d & 1) != of_run) continue;
      const auto strides = [&](int k, int64_t* data, int64_t* mask, int64_t* grad) {
        const Operand& o = p.operand[from[k]];
        *data = has(o, d) && pass.operand[k].data ? o.stride[d] : 0;
        *mask = pass.operand[k].mask ? o.mask_stride[d] : 0;
        *grad = has(o, d) && pass.operand[k].grad ? o.grad_stride[d] : 0;
      };
      bool merge = dims > first;
      int64_t data, mask, grad;
      for (int k = 0; merge && k < pass.operands; ++k) {
        if (from[k] < 0) continue;
        const PassOperand& o = pass.operand[k];
        strides(k, &data, &mask, &grad);
        merge = o.row[dims - 1] == data * p.size[d] && o.mask_row[dims - 1] == mask * p.size[d] && o.grad_row[dims - 1] == grad * p.size[d];
      }
      if (!merge && dims == kRowDims) return false;
      const int to = merge ? dims - 1 : dims++;
      pass.size[to] = merge ? pass.size[to] * p.size[d] : p.size[d];
      for (int k = 0; k < pass.operands; ++k) {
        if (from[k] < 0) continue;
        PassOperand& o = pass.operand[k];
        strides(k, &o.row[to], &o.mask_row[to], &o.grad_row[to]);
      }
    }
    (of_run ? pass.run_dims : pass.unit_dims) = dims - first;
  }
  pass.units = pass.run = 1;
  for (int d = 0; d < dims; ++d) {
    pass.inverse_size[d] = 1.0 / static_cast<double>(pass.size[d]);
    (d < pass.unit_dims ? pass.units : pass.run) *= pass.size[d];
  }
  return true;
}

int log2_at_least(int64_t n) {
  int log2 = 0;
  while ((int64_t{1} << log2) < n) ++log2;
  return log2;
}

struct Instance {
  const Kernels* kernels;
  int count;
  bool grad, extra;
};

// The kernels of the varying operands' dtype, where they and their derivatives can be accessed 16 bytes at a time.
Instance instance_of(const Pass& pass, bool is_wide) {
  Instance to{nullptr, std::min(pass.varying, kCounts) - 1, false, false};
  bool same = true, packed = true;
  for (int k = 0; k < pass.varying; ++k) {
    const PassOperand& o = pass.operand[k];
    same = same && o.dtype == pass.operand[0].dtype;
    packed = packed && o.packed && (!o.mask || o.mask_col == 0);
    to.grad = to.grad || o.target == Target::each;
  }
  for (int k = 0; k < pass.operands; ++k) {
    const PassOperand& o = pass.operand[k];
    to.extra = to.extra || o.activation != Activation::none || o.mask || (k < pass.varying && !o.data);
  }
  const Kernels* const by_dtype[] = {&kernels_f64, &kernels_f32, &kernels_bf16, &kernels_f16};  // as enum DType
  to.kernels = by_dtype[static_cast<int>(pass.operand[0].dtype)];
  const bool as_stored = is_wide == (pass.operand[0].dtype == DType::f64);
  if (!same || !packed || !as_stored || pass.cols % to.kernels->width || pass.varying >= kCounts) {
    to = {is_wide ? &kernels_any64 : &kernels_any32, kCounts - 1, true, true};
  }
  return to;
}

// How the work is shared out: lanes along the columns, groups along the run, slots along the units, and what is left to blocks.
void share(Pass& pass, const Instance& instance, bool by_columns, bool sums_run, Launch& launch) {
  const int64_t packets = divide_up(pass.cols, instance.kernels->width);
  int64_t lanes, tiles;
  if (by_columns) {
    lanes = int64_t{1} << std::min(log2_at_least(packets), log2_at_least(kThreads));
    tiles = divide_up(packets, lanes);
    pass.packets_per_tile = static_cast<int>(lanes);
  } else {
    const bool few = pass.units * pass.run * kMaxLanesOfRow < kEnoughThreads / 4;
    lanes = packets >= kThreads * (few ? 1 : 8) ? kThreads : std::min<int64_t>(kMaxLanesOfRow, int64_t{1} << log2_at_least(packets));
    tiles = 1;
  }
  int64_t groups = 1;
  const int64_t most_groups = kThreads / lanes;
  if (by_columns) {
    while (groups < most_groups && pass.units * lanes * tiles * groups < kEnoughThreads && pass.run >= groups * kRowsPerGroup) groups *= 2;
  } else {
    groups = std::min(most_groups, int64_t{1} << log2_at_least(pass.run));
  }
  int64_t unit_blocks = divide_up(pass.units, most_groups / groups), splits = 1;
  if (by_columns || sums_run) {
    if (unit_blocks * tiles < kFewBlocks) splits = std::clamp<int64_t>(pass.run / (groups * kRowsPerGroup), 1, kEnoughBlocks / (unit_blocks * tiles));
    unit_blocks = std::min(unit_blocks, std::max<int64_t>(1, 2 * kEnoughBlocks / tiles));
  } else {
    unit_blocks = std::min(unit_blocks, kMostBlocks);
    splits = std::clamp<int64_t>(pass.run / (groups * kRowsPerGroup), 1, kMostBlocks / unit_blocks);
  }
  pass.rows_per_split = divide_up(pass.run, splits);
  pass.splits = static_cast<int>(divide_up(pass.run, pass.rows_per_split));
  const int64_t parts = unit_blocks * pass.splits;
  if (!by_columns) {
    if (parts < kFewBlocks) tiles = std::min(divide_up(kEnoughBlocks, parts), divide_up(packets, lanes * kRowsPerGroup));
    pass.packets_per_tile = static_cast<int>(divide_up(packets, tiles));
    tiles = divide_up(packets, pass.packets_per_tile);
  }
  pass.lanes_log2 = log2_at_least(lanes);
  pass.groups_log2 = log2_at_least(groups);
  pass.parts = static_cast<int>(parts);
  pass.tiles = static_cast<int>(tiles);
  launch.blocks = parts * tiles;
}

// Sums that blocks share go through the workspace: their sizes there, and the second stage.
void share_sums(Launch& launch, int64_t& workspace) {
  Pass& pass = launch.pass;
  const int64_t slots = kThreads >> (pass.lanes_log2 + pass.groups_log2);
  for (int k = pass.varying; k < pass.operands; ++k) {
    PassOperand& o = pass.operand[k];
    const bool splat = k >= pass.varying + pass.shared;
    int64_t parts = 1, entries = splat ? 1 : pass.cols;
    int dims = 0;
    Combine combine{};
    const auto dim = [&](int64_t size, int64_t stride) {
      combine.size[dims] = size;
      combine.inverse_size[dims] = 1.0 / static_cast<double>(size);
      combine.stride[dims++] = stride;
    };
    switch (o.target) {
      case Target::none:
        continue;
      case Target::each:
        entries = pass.units * pass.run;
        parts = pass.tiles;
        for (int d = 0; d < pass.unit_dims + pass.run_dims; ++d) dim(pass.size[d], o.grad_row[d]);
        break;
      case Target::unit:
        entries *= pass.units;
        parts = pass.splits * (splat ? pass.tiles : 1);
        for (int d = 0; d < pass.unit_dims; ++d) dim(pass.size[d], o.grad_row[d]);
        break;
      case Target::all:
        parts = splat ? launch.blocks : pass.parts * slots;
        break;
    }
    if (parts == 1 && o.target != Target::all) continue;
    if (!splat) dim(pass.cols, o.grad_col);
    combine.sums = reinterpret_cast<const double*>(workspace);  // an offset yet
    combine.parts = parts;
    combine.entries = entries;
    combine.dims = dims;
    combine.grad = o.grad;
    combine.dtype = o.dtype;
    launch.combine[launch.combines++] = combine;
    workspace += parts * entries * static_cast<int64_t>(sizeof(double));
  }
}

const char* make_launch(const Problem& p, int vector, const Choice& choice, Launch& launch, int64_t& workspace) {
  Pass& pass = launch.pass;
  std::memset(&launch, 0, sizeof launch);
  int from[kPassOperands];
  const auto put = [&](int k, const PassOperand& o) {
    from[pass.operands] = k;
    pass.operand[pass.operands++] = o;
  };
  PassOperand constant{};
  constant.dtype = p.wide ? DType::f64 : DType::f32;
  enum Kind { varying, shared, splat };
  for (const Kind kind : {varying, shared, splat}) {
    for (int k = 0; k < p.operands; ++k) {
      const Operand& o = p.operand[k];
      const bool is_alone = k == choice.alone;
      const bool varies = (o.dims & choice.run) || (!is_alone && (masked_dims(p, o, vector) & choice.run));
      const Kind is = !has(o, vector) ? splat : choice.run == 0 || varies ? varying : shared;
      if (is == kind) {
        PassOperand to = operand_of(o, vector);
        if (is_alone) to.mask = nullptr;
        to.absent_is_one = p.absent == 1;
        to.target = choice.target[k];
        to.grad = to.target == Target::none ? nullptr : o.grad;
        put(k, to);
      }
      if (!is_alone) continue;
      // Its mask by itself: the constant 1 where it is present, 0 elsewhere, which leaves those rows out of the sum.
      const bool along_columns = o.mask_stride[vector] != 0;
      if (kind != (along_columns ? varying : splat)) continue;
      PassOperand mask = constant;
      mask.mask = o.mask;
      mask.mask_col = along_columns ? o.mask_stride[vector] : 0;
      put(k, mask);
    }
    if (kind == varying) {
      if (pass.operands == 0) put(-1, constant);  // the kernels want one
      pass.varying = pass.operands;
    }
    if (kind == shared) pass.shared = pass.operands - pass.varying;
  }
  pass.cols = p.size[vector];
  if (!set_rows(p, vector, choice.run, from, pass)) return "more than 10 dims that cannot be walked as one, which the CUDA kernels do not take";
  const int dims = pass.unit_dims + pass.run_dims;
  bool sums_run = false;
  for (int k = 0; k < pass.operands; ++k) {
    PassOperand& o = pass.operand[k];
    o.packed = aligned(o.data, o.dtype, o.row, dims, o.col) && aligned(o.grad, o.dtype, o.grad_row, dims, o.grad_col);
    sums_run = sums_run || o.target == Target::unit || o.target == Target::all;
  }
  const Instance instance = instance_of(pass, p.wide);
  share(pass, instance, choice.by_columns, sums_run, launch);
  share_sums(launch, workspace);
  const auto& table = choice.by_columns ? instance.kernels->columns : instance.kernels->rows;
  launch.by_columns = choice.by_columns;
  launch.kernel = table[instance.count][instance.grad][instance.extra];
  return nullptr;
}

}  // namespace

const char* make_plan(const Problem& problem, Plan& plan) {
  Problem todo = problem;
  const int vector = vector_dim(todo);
  plan.launches = 0;
  plan.workspace_bytes = 0;
  int64_t stored = 0;
  for (int k = 0; k < todo.operands; ++k)
    if (todo.operand[k].grad) stored += extent(todo, todo.operand[k]) * item_size(todo.operand[k].dtype);
  for (;;) {
    bool left = false;
    for (int k = 0; k < todo.operands; ++k) left = left || todo.operand[k].grad;
    if (!left) return nullptr;
    const Choice choice = choose(todo, vector);
    Launch& launch = plan.launch[plan.launches++];
    int64_t workspace = 0;
    if (const char* error = make_launch(todo, vector, choice, launch, workspace)) return error;
    launch.pass.stream = stored > kStreamBytes;
    plan.workspace_bytes = std::max(plan.workspace_bytes, workspace);
    for (int k = 0; k < todo.operands; ++k)
      if (choice.target[k] != Target::none) todo.operand[k].grad = nullptr;
  }
}

void place_sums(Launch& launch, void* workspace) {
  const auto place = [&](auto offset) {
    return reinterpret_cast<double*>(static_cast<char*>(workspace) + reinterpret_cast<uintptr_t>(offset));
  };
  for (int c = 0; c < launch.combines; ++c) {
    Combine& combine = launch.combine[c];
    for (int k = 0; k < launch.pass.operands; ++k)
      if (launch.pass.operand[k].grad == combine.grad) launch.pass.operand[k].sums = place(combine.sums);
    combine.sums = place(combine.sums);
  }
}

}  // namespace cuda
}  // namespace fusionsum
