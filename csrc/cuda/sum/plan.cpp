// The choices, in order: the vector dim; which row dims a pass sums along (the run), so that most derivatives are
// served at once; the kernel; how rows and columns are cut into blocks, slots, groups and lanes.
#include "plan.h"

#include <algorithm>
#include <cstring>

namespace fusionsum {
namespace cuda {
namespace {

// Threads that fill a large GPU, and blocks of them. Fewer blocks than kFewBlocks, two on each of an H100's
// multiprocessors, leave it idle: then rows get more lanes, blocks fewer rows, and sums are split.
constexpr int64_t kEnoughThreads = 1 << 18, kEnoughBlocks = kEnoughThreads / kThreads, kFewBlocks = 2 * 132;
constexpr int64_t kMostBlocks = 1 << 16, kMostColumns = 1 << 30;
constexpr int64_t kStreamBytes = int64_t{32} << 20;  // gradients larger than this do not stay in the L2 cache
constexpr int64_t kWarp = 32;                        // lanes of a row, unless rows are few or long
constexpr int64_t kRowsAtOnce = 2;                   // of a group are in flight together
constexpr int64_t kRowsPerGroup = 8;                 // at most where blocks are few

uint32_t row_dims(const Problem& p, int vector) { return ((1u << p.ndim) - 1) & ~(1u << vector); }

// The row dims along which an operand's mask varies and the operand does not.
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
  uint32_t run;     // its row dims, as bits
  bool by_columns;  // the kernel is `columns`, not `rows`
  Reach reach[kMaxOperands];
  int64_t served;   // entries of the derivatives that the pass computes
  int64_t traffic;  // entries that the pass reads
  int alone = -1;   // an operand with masked_dims, whose derivative has this pass to itself
};

// The choice of this run and this kernel: over how many rows it sums each derivative, and what it reads for that.
Choice weigh(const Problem& p, int vector, uint32_t run, bool by_columns) {
  Choice choice{run, by_columns, {}, 0, 0};
  const uint32_t rows = row_dims(p, vector);
  bool all_taken = false, run_taken = false;
  for (int k = 0; k < p.operands; ++k) {
    const Operand& o = p.operand[k];
    choice.reach[k] = Reach::none;
    if (!o.grad) continue;
    const uint32_t missing = rows & ~o.dims;
    const bool splat = !has(o, vector);
    Reach reach = Reach::none;
    if (missing == 0) {
      reach = splat && by_columns ? Reach::none : Reach::row;
    } else if (splat == by_columns) {
      reach = Reach::none;
    } else if (missing == run) {
      reach = Reach::run;
    } else if (missing == rows) {
      reach = Reach::all;
    }
    if (reach == Reach::run || reach == Reach::all) {
      if (by_columns && masked_dims(p, o, vector)) reach = Reach::none;
      // A pass has one sum over all rows at most; and of the sums of splat operands one, which a thread keeps in a
      // register.
      if (reach == Reach::all && all_taken) reach = Reach::none;
      if (splat && (run_taken || all_taken)) reach = Reach::none;
    }
    all_taken = all_taken || reach == Reach::all;
    run_taken = run_taken || (splat && reach == Reach::run);
    choice.reach[k] = reach;
    if (reach != Reach::none) choice.served += extent(p, o);
  }
  for (int k = 0; k < p.operands; ++k)
    if (p.operand[k].data)
      choice.traffic += size_of(
          p, (has(p.operand[k], vector) ? 1u << vector : 0) | (rows & ~run) | (run & p.operand[k].dims ? run : 0));
  return choice;
}

Choice choose(const Problem& p, int vector) {
  const uint32_t rows = row_dims(p, vector);
  Choice best{0, false, {}, 0, 0};
  const auto consider = [&](uint32_t run) {
    for (const bool by_columns : {false, true}) {
      if (by_columns && !run) continue;
      const Choice choice = weigh(p, vector, run, by_columns);
      bool sums = false;  // `columns` is for sums over rows
      for (int k = 0; k < p.operands; ++k)
        sums = sums || choice.reach[k] == Reach::run || choice.reach[k] == Reach::all;
      if (by_columns && !sums) continue;
      if (choice.served > best.served || (choice.served == best.served && choice.traffic < best.traffic)) best = choice;
    }
  };
  for (int d = 0; d < p.ndim; ++d)
    if (d != vector) consider(1u << d);
  consider(0);
  for (int k = 0; k < p.operands; ++k) consider(rows & ~p.operand[k].dims);
  if (best.served) return best;
  for (int k = 0; k < p.operands; ++k) {  // the operands left all have masked_dims
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

// Sets the row dims, those of the unit before those of the run; neighbours that every operand can walk as one dim are
// merged. `from` says which operand of the problem each of the pass's is, -1 for none. False where dims are left over.
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
        merge = o.row[dims - 1] == data * p.size[d] && o.mask_row[dims - 1] == mask * p.size[d] &&
                o.grad_row[dims - 1] == grad * p.size[d];
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
  bool by_columns, loose, grad, extra;

  int width() const { return kernels->width[count][by_columns][extra]; }
};

// The kernels of the varying operands' dtype where these and their derivatives can be accessed 16 bytes at a time, else
// those for loose operands.
Instance instance_of(const Pass& pass, bool by_columns, bool is_wide) {
  Instance to{nullptr, std::min(pass.varying, kCounts) - 1, by_columns, false, false, false};
  bool same = true, packed = true;
  for (int k = 0; k < pass.varying; ++k) {
    const PassOperand& o = pass.operand[k];
    same = same && o.dtype == pass.operand[0].dtype;
    packed = packed && o.packed && (!o.mask || o.mask_col == 0);
    to.grad = to.grad || o.reach == Reach::row;
  }
  for (int k = 0; k < pass.operands; ++k) {
    const PassOperand& o = pass.operand[k];
    to.extra = to.extra || o.activation != Activation::none || o.mask || (k < pass.varying && !o.data);
  }
  const Kernels* const by_dtype[] = {
#define KERNELS(name, ...) &kernels_##name,
      FUSIONSUM_DTYPES(KERNELS)
#undef KERNELS
  };
  to.kernels = by_dtype[static_cast<int>(pass.operand[0].dtype)];
  const bool as_stored = is_wide == (pass.operand[0].dtype == DType::f64);
  to.loose = to.count == kCounts - 1 || !same || !packed || !as_stored || pass.cols % to.width();
  if (to.loose) to.kernels = is_wide ? &kernels_loose64 : &kernels_loose32;
  if (to.loose) {  // of which there are fewer kernels (kernel.cuh)
    if (to.extra && is_wide) to.count = kCounts - 1;
    to.extra = to.extra || to.count == kCounts - 1;
    to.grad = to.grad || to.extra || is_wide;
  }
  return to;
}

// From strides in elements, of data and derivative, to strides in bytes.
void to_bytes(PassOperand& o, int dims) {
  const int64_t item = item_size(o.dtype);
  o.col *= item;
  o.grad_col *= item;
  for (int d = 0; d < dims; ++d) {
    o.row[d] *= item;
    o.grad_row[d] *= item;
  }
}

// Cuts columns into lanes, runs into groups, units into slots, and what is left into blocks.
void cut(Pass& pass, const Instance& instance, bool sums_run, Launch& launch) {
  const bool by_columns = instance.by_columns;
  const int64_t width = instance.width(), packets = divide_up(pass.cols, width), rows = pass.units * pass.run;
  const int64_t most_lanes = std::min<int64_t>(kThreads, int64_t{1} << log2_at_least(packets));
  int64_t lanes = std::min<int64_t>(kWarp, most_lanes), tiles = by_columns ? divide_up(packets, lanes) : 1, groups = 1;
  if (by_columns) {
    while (groups < kThreads / lanes && pass.units * lanes * tiles * groups < kEnoughThreads &&
           pass.run >= groups * kRowsAtOnce * 2)
      groups *= 2;
  } else {
    if (packets >= kThreads * kRowsPerGroup) lanes = kThreads;
    while (lanes < most_lanes && rows * lanes < kFewBlocks * kThreads) lanes *= 2;
    groups = std::min(kThreads / lanes, int64_t{1} << log2_at_least(pass.run));
  }
  const bool partial = by_columns || sums_run;  // splits of a run are parts of its sum
  int64_t unit_blocks = divide_up(pass.units, kThreads / (lanes * groups));
  unit_blocks = std::min(unit_blocks, partial ? std::max<int64_t>(1, 2 * kEnoughBlocks / tiles) : kMostBlocks);
  // Rows of a block: as many as leave enough blocks; but a warp is not split, nor what one block soon has summed.
  const int64_t columns_of_blocks = unit_blocks * tiles;
  int64_t split = pass.run * columns_of_blocks / kFewBlocks;
  if (split > groups) split -= split % groups;
  split = std::min(std::max(split, divide_up(partial ? lanes * groups / 4 : kWarp, lanes)), groups * kRowsPerGroup);
  split = std::max(split, divide_up(pass.run * columns_of_blocks, partial ? kEnoughBlocks : kMostBlocks));
  if (partial && (columns_of_blocks >= kFewBlocks || pass.run <= groups * kRowsAtOnce * 2)) split = pass.run;
  pass.rows_per_split = std::min(split, pass.run);
  pass.splits = static_cast<int>(divide_up(pass.run, pass.rows_per_split));
  const int64_t parts = unit_blocks * pass.splits;
  if (by_columns) {
    pass.packets_per_tile = static_cast<int>(lanes);
  } else {
    if (parts < kFewBlocks && packets > lanes * kRowsPerGroup)
      tiles = std::max(std::min(divide_up(kFewBlocks, parts), divide_up(packets, lanes * 2)),
                       std::min(divide_up(kEnoughBlocks, parts), divide_up(packets, lanes * kRowsPerGroup)));
    tiles = std::max(tiles, divide_up(pass.cols, kMostColumns));
    pass.packets_per_tile = static_cast<int>(divide_up(packets, tiles));
    tiles = divide_up(packets, pass.packets_per_tile);
  }
  pass.lanes_log2 = log2_at_least(lanes);
  pass.groups_log2 = log2_at_least(groups);
  pass.parts = static_cast<int>(parts);
  pass.tiles = static_cast<int>(tiles);
  launch.blocks = parts * tiles;
}

// Sums in which several blocks have parts: their places in the workspace, and the `combine` of each.
void plan_combines(Launch& launch, int64_t& workspace) {
  Pass& pass = launch.pass;
  const int64_t slots = kThreads >> (pass.lanes_log2 + pass.groups_log2);
  for (int k = pass.varying; k < pass.operands; ++k) {
    PassOperand& o = pass.operand[k];
    const bool splat = k >= pass.varying + pass.uniform;
    int64_t parts = 1, entries = splat ? 1 : pass.cols;
    int dims = 0;
    Combine combine{};
    const auto dim = [&](int64_t size, int64_t stride) {
      combine.size[dims] = size;
      combine.inverse_size[dims] = 1.0 / static_cast<double>(size);
      combine.stride[dims++] = stride;
    };
    switch (o.reach) {
      case Reach::none:
        continue;
      case Reach::row:
        entries = pass.units * pass.run;
        parts = pass.tiles;
        for (int d = 0; d < pass.unit_dims + pass.run_dims; ++d) dim(pass.size[d], o.grad_row[d]);
        break;
      case Reach::run:
        entries *= pass.units;
        parts = pass.splits * (splat ? pass.tiles : 1);
        for (int d = 0; d < pass.unit_dims; ++d) dim(pass.size[d], o.grad_row[d]);
        break;
      case Reach::all:
        parts = splat ? launch.blocks : pass.parts * slots;
        break;
    }
    if (parts == 1 && o.reach != Reach::all) continue;
    if (!splat) dim(pass.cols, o.grad_col);
    combine.sums = reinterpret_cast<const double*>(workspace);  // an offset, until place_sums
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
  enum Kind { varying, uniform, splat };
  for (const Kind kind : {varying, uniform, splat}) {
    for (int k = 0; k < p.operands; ++k) {
      const Operand& o = p.operand[k];
      const bool is_alone = k == choice.alone;
      const bool varies = (o.dims & choice.run) || (!is_alone && (masked_dims(p, o, vector) & choice.run));
      const Kind is = !has(o, vector) ? splat : choice.run == 0 || varies ? varying : uniform;
      if (is == kind) {
        PassOperand to = operand_of(o, vector);
        if (is_alone) to.mask = nullptr;
        to.absent_is_one = p.absent == 1;
        to.reach = choice.reach[k];
        to.grad = to.reach == Reach::none ? nullptr : o.grad;
        put(k, to);
      }
      if (!is_alone) continue;
      // The mask of the operand that is alone is an operand by itself, 1 where present and 0 elsewhere: it leaves the
      // absent rows out of the sum.
      const bool along_columns = o.mask_stride[vector] != 0;
      if (kind != (along_columns ? varying : splat)) continue;
      PassOperand mask = constant;
      mask.mask = o.mask;
      mask.mask_col = along_columns ? o.mask_stride[vector] : 0;
      put(k, mask);
    }
    if (kind == varying) {
      if (pass.operands == 0) put(-1, constant);  // the kernels want a varying operand
      pass.varying = pass.operands;
    }
    if (kind == uniform) pass.uniform = pass.operands - pass.varying;
  }
  pass.cols = p.size[vector];
  if (!set_rows(p, vector, choice.run, from, pass))
    return "more than 10 dims that cannot be walked as one, which the CUDA kernels do not take";
  const int dims = pass.unit_dims + pass.run_dims;
  bool sums_run = false;
  for (int k = 0; k < pass.operands; ++k) {
    PassOperand& o = pass.operand[k];
    o.packed = aligned(o.data, o.dtype, o.row, dims, o.col) && aligned(o.grad, o.dtype, o.grad_row, dims, o.grad_col);
    sums_run = sums_run || o.reach == Reach::run || o.reach == Reach::all;
  }
  const Instance instance = instance_of(pass, choice.by_columns, p.wide);
  for (int k = 0; instance.loose && k < pass.varying; ++k) to_bytes(pass.operand[k], dims);
  cut(pass, instance, sums_run, launch);
  plan_combines(launch, workspace);
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
      if (choice.reach[k] != Reach::none) todo.operand[k].grad = nullptr;
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
