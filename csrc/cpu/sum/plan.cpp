// From a problem to plans, and their execution. Compiled for the baseline: nothing here depends on the instruction set.
//
// The choices, in order: which dim is the vector dim; in which order the rows go; where each derivative goes (plan.h's
// Target); how rows and columns are cut into tasks; how each operand is read. A derivative whose sums would take too
// much memory in one pass over the rows gets a pass of its own, in which its own dims come first.
#include "plan.h"

#include <algorithm>

namespace fusionsum {
namespace {

// Costs are in entries of operands (rows x cols x operands). A task is worth a few microseconds at least, and 64 of
// them keep as many cores busy.
constexpr int64_t kTaskCost = 1 << 16, kMaxTasks = 64, kSliceCost = 1 << 20;
// Gradients larger than this bypass the caches, but where the system has yet to clear their pages: cleared, these are
// in the caches. (Stored past them they take 1.3 to 1.4 times as long on pages of 4 KB, up to 1.1 times on huge ones.)
constexpr int64_t kStreamBytes = int64_t{32} << 20;
constexpr int64_t kMaxSums = int64_t{1} << 19;  // float64 entries of all tasks together: 4 MiB

struct Order {
  int vector;          // the vector dim, of the problem's
  int rows[kMaxDims];  // the others, outermost first
  int count;
};

// May the row dims `outer` and `inner` be walked as one? Only if every stride of every operand agrees.
bool mergeable(const PlanOperand& o, int outer, int inner, int64_t inner_size) {
  return o.has_row[outer] == o.has_row[inner] && o.row[outer] == o.row[inner] * inner_size &&
         o.mask_row[outer] == o.mask_row[inner] * inner_size && o.grad_row[outer] == o.grad_row[inner] * inner_size;
}

void set_strides(const Problem& problem, const Order& order, Plan& plan) {
  plan.operands = problem.operands;
  plan.absent = problem.absent;
  plan.cols = problem.size[order.vector];
  for (int k = 0; k < problem.operands; ++k) {
    const Operand& from = problem.operand[k];
    PlanOperand& to = plan.operand[k];
    to = PlanOperand{};
    to.data = from.data;
    to.mask = from.mask;
    to.grad = from.grad;
    to.dtype = from.dtype;
    to.activation = from.activation;
    to.kind = has(from, order.vector) ? Kind::varying : Kind::splat;  // whether a varying one is uniform: `classify`
    if (to.kind != Kind::splat) {
      to.col = from.stride[order.vector];
      to.mask_col = from.mask_stride[order.vector];
      to.grad_col = from.grad_stride[order.vector];
    }
  }
  int n = 0;
  const auto set_row = [&](int row, int d, int64_t size) {
    plan.row_size[row] = size;
    for (int k = 0; k < problem.operands; ++k) {
      const Operand& from = problem.operand[k];
      PlanOperand& to = plan.operand[k];
      to.has_row[row] = d >= 0 && has(from, d);
      to.row[row] = d < 0 ? 0 : from.stride[d];
      to.mask_row[row] = d < 0 ? 0 : from.mask_stride[d];
      to.grad_row[row] = d < 0 ? 0 : from.grad_stride[d];
    }
  };
  for (int i = 0; i < order.count; ++i) {
    const int d = order.rows[i];
    set_row(n, d, problem.size[d]);
    bool merge = n > 0;
    for (int k = 0; merge && k < problem.operands; ++k) merge = mergeable(plan.operand[k], n - 1, n, plan.row_size[n]);
    if (merge) {
      set_row(n - 1, d, plan.row_size[n - 1] * problem.size[d]);
    } else {
      ++n;
    }
  }
  if (n == 0) set_row(n++, -1, 1);
  plan.row_dims = n;
  plan.rows = 1;
  for (int i = 0; i < n; ++i) plan.rows *= plan.row_size[i];
}

// How many innermost rows the operand lacks, where it has all dims outside them; 0 where its own dims lie inside.
int64_t run_of(const Plan& plan, const PlanOperand& o) {
  int64_t run = 1;
  int d = plan.row_dims - 1;
  for (; d >= 0 && !o.has_row[d]; --d) run *= plan.row_size[d];
  for (; d >= 0; --d)
    if (!o.has_row[d] && plan.row_size[d] > 1) return 0;
  return run;
}

int64_t row_extent(const Plan& plan, const PlanOperand& o) {
  int64_t n = 1;
  for (int d = 0; d < plan.row_dims; ++d)
    if (o.has_row[d]) n *= plan.row_size[d];
  return n;
}

// Cuts rows and columns into tasks and slices, and says of each derivative where it goes.
void cut(Plan& plan) {
  const int64_t cost = plan.rows * plan.cols * plan.operands;
  const int64_t wanted = std::clamp<int64_t>(cost / kTaskCost, 1, kMaxTasks);
  for (int k = 0; k < plan.operands; ++k) {
    PlanOperand& o = plan.operand[k];
    if (!o.grad) continue;
    o.run = run_of(plan, o);
    o.target = o.run == 1 ? Target::store : o.run > 1 ? Target::run : Target::partial;
  }

  // Few rows: columns are cut too. A derivative of one value per row is then summed over tasks.
  const auto unit = [&] {  // rows that one task must hold together
    int64_t rows = 1;
    for (int k = 0; k < plan.operands; ++k)
      if (plan.operand[k].target == Target::run) rows = std::max(rows, plan.operand[k].run);
    return rows;
  };
  const int64_t col_blocks = divide_up(plan.cols, kBlock);
  plan.col_tasks = 1;
  int64_t row_tasks = std::min(wanted, plan.rows / unit());
  if (row_tasks < std::min<int64_t>(wanted, 16) && col_blocks > 1)
    plan.col_tasks = std::min(col_blocks, divide_up(wanted, row_tasks));
  plan.cols_per_task = divide_up(col_blocks, plan.col_tasks) * kBlock;
  plan.col_tasks = divide_up(plan.cols, plan.cols_per_task);
  const bool long_row = plan.cols_per_task * plan.operands > kPauseCost;
  plan.cols_per_slice =
      long_row ? std::max<int64_t>(1, kSliceCost / plan.operands / kBlock) * kBlock : plan.cols_per_task;
  plan.col_slices = divide_up(plan.cols_per_task, plan.cols_per_slice);
  for (int k = 0; k < plan.operands; ++k) {
    PlanOperand& o = plan.operand[k];
    if (o.grad && o.kind == Kind::splat && (plan.col_tasks > 1 || long_row)) o.target = Target::partial;
  }

  // Still too few: the longest runs are summed over tasks as well.
  const int64_t row_cost = plan.cols_per_slice * plan.operands,
                slice_rows = std::max<int64_t>(1, kSliceCost / row_cost);
  while (unit() > 1 && plan.rows / unit() * plan.col_tasks < std::min<int64_t>(wanted, 16)) {
    const int64_t longest = unit();
    for (int k = 0; k < plan.operands; ++k)
      if (plan.operand[k].target == Target::run && plan.operand[k].run == longest)
        plan.operand[k].target = Target::partial;
  }
  const int64_t units = plan.rows / unit();
  int64_t per_task =
      divide_up(units, std::max<int64_t>(1, std::min(divide_up(wanted, plan.col_tasks), units))) * unit();
  if (per_task > kGroup && unit() == 1) per_task = divide_up(per_task, kGroup) * kGroup;
  plan.rows_per_task = per_task;
  plan.row_tasks = divide_up(plan.rows, per_task);

  // Rows that one slice must hold together: a short run. The float64 sums of a longer run outlast the slice.
  int64_t whole = 1;
  for (int k = 0; k < plan.operands; ++k) {
    PlanOperand& o = plan.operand[k];
    const int inner = plan.row_dims - 1;
    if (o.target == Target::run) {
      // A short run is summed and written at once; longer ones go through float64 sums.
      const bool at_once = o.kind != Kind::splat && !o.mask && o.run == plan.row_size[inner] && o.run <= kSummed;
      o.sums_size = at_once ? 0 : o.kind == Kind::splat ? 1 : plan.cols_per_task;
      if (at_once) whole = std::max(whole, o.run);
    } else if (o.target == Target::partial) {
      int64_t stride = o.kind == Kind::splat ? 1 : plan.cols;
      for (int d = inner; d >= 0; --d) {
        o.partial_row[d] = o.has_row[d] ? stride : 0;
        if (o.has_row[d]) stride *= plan.row_size[d];
      }
      o.sums_size = stride;
    }
  }
  plan.rows_per_slice = divide_up(std::min(per_task, slice_rows), whole) * whole;
  plan.slices = divide_up(per_task, plan.rows_per_slice) * plan.col_slices;
}

int64_t tasks_with_sums(const Plan& plan, const PlanOperand& o) {
  const bool per_task = o.target == Target::run || o.kind == Kind::splat;
  return plan.row_tasks * (per_task ? plan.col_tasks : 1);
}

// The forward pass where outputs are contiguous: short runs, each written at once, and splats that all runs share.
bool spans_runs(const Plan& plan) {
  const int outer = plan.row_dims - 2;
  if (outer < 0 || plan.differentiates || plan.sums_cols || plan.masked || plan.uniforms != 1) return false;
  const PlanOperand& summed = plan.operand[plan.uniform[0]];
  bool spans = summed.target == Target::run && summed.sums_size == 0;
  for (int s = 0; s < plan.splats; ++s) {
    const PlanOperand& o = plan.operand[plan.splat[s]];
    spans = spans && o.row[outer] == 0 && o.mask_row[outer] == 0;
  }
  for (int v = 0; v < plan.varyings; ++v) spans = spans && plan.operand[plan.varying[v]].in_place;
  return spans;
}

// Says how each operand is read, and in which order of kinds.
void classify(Plan& plan) {
  const int inner = plan.row_dims - 1;
  const DType working = plan.wide ? DType::f64 : DType::f32;
  plan.splats = plan.uniforms = plan.varyings = 0;
  plan.masked = plan.staged = plan.differentiates = plan.sums_rows = plan.sums_cols = false;
  for (int k = 0; k < plan.operands; ++k) {
    PlanOperand& o = plan.operand[k];
    const bool wanted = o.target != Target::none;
    if (o.kind == Kind::splat) {
      plan.splat[plan.splats++] = static_cast<int8_t>(k);
      plan.sums_cols = plan.sums_cols || wanted;
    } else if (o.row[inner] == 0 && !o.mask && o.target != Target::store && (!wanted || !o.has_row[inner])) {
      o.kind = Kind::uniform;
      o.in_place = o.dtype == working && o.col == 1 && o.activation == Activation::none;
      plan.uniform[plan.uniforms++] = static_cast<int8_t>(k);
      plan.sums_rows = plan.sums_rows || wanted;
    } else {
      plan.varying[plan.varyings++] = static_cast<int8_t>(k);
      plan.differentiates = plan.differentiates || wanted;
      plan.masked = plan.masked || o.mask;
    }
  }
  // The inner loops convert 16-bit rows on the way where all varying operands are plain rows of one 16-bit type.
  plan.stored = working;
  bool alike = plan.varyings > 0 && !plan.wide;
  for (int v = 0; v < plan.varyings; ++v) {
    const PlanOperand& o = plan.operand[plan.varying[v]];
    const bool plain = o.data && o.col == 1 && o.activation == Activation::none && !o.mask_col;
    const bool plain_target = o.target == Target::none || (o.target == Target::store && o.grad_col == 1);
    alike = alike && o.dtype == plan.operand[plan.varying[0]].dtype && o.dtype != DType::f64 && plain && plain_target;
  }
  if (alike) plan.stored = plan.operand[plan.varying[0]].dtype;
  for (int v = 0; v < plan.varyings; ++v) {
    PlanOperand& o = plan.operand[plan.varying[v]];
    const bool plain = o.dtype == plan.stored && o.activation == Activation::none && !o.mask_col;
    o.in_place = !o.data || (plain && o.col == 1);
    o.grad_in_place = plain && o.target == Target::store && o.grad_col == 1;
    o.repeated = !o.in_place && !o.mask && o.row[inner] == 0;
    plan.staged = plan.staged || (o.target != Target::none && !o.grad_in_place) || (!o.in_place && !o.repeated);
  }
  plan.spans_runs = spans_runs(plan);
}

// Gives each piece of a thread's scratch memory its place.
void lay_out(Plan& plan) {
  Scratch& s = plan.scratch;
  s = Scratch{};  // the walk forms pointers to pieces that this plan lacks, too, though it never follows them
  const int64_t item = plan.wide ? 8 : 4, width = std::min(kBlock, plan.cols), tile = std::min(kBlock, kGroup * width);
  int64_t end = 0;
  const auto take = [&](int64_t entries, int64_t size) {
    const int64_t place = end;
    end += in_cache_lines(entries * size);
    return place;
  };
  s.sum = take(kGroup, sizeof(double));
  s.scale = take(kGroup, item);
  bool finishes = plan.sums_rows, constant = false;
  for (int k = 0; k < plan.operands; ++k) {
    PlanOperand& o = plan.operand[k];
    const bool has_slope = o.activation != Activation::none;
    if (o.kind == Kind::splat) {
      o.value = take(kGroup, item);
      if (has_slope) o.slope = take(kGroup, item);
    } else if (o.kind == Kind::uniform) {
      if (o.data && !o.in_place) o.value = take(width, item);
    } else {
      if (!o.in_place) o.value = take(tile, item);
      if (has_slope && o.target == Target::store) o.slope = take(tile, item);
      if (o.target != Target::none && !o.grad_in_place) o.derivative = take(tile, item);
      constant = constant || !o.data;
    }
    finishes = finishes || o.target == Target::run || o.target == Target::partial;
  }
  if (constant) s.ones = take(width, item);
  if (plan.uniforms > 1) s.product = take(width, item);
  if (plan.masked) {
    s.in_rows = take(plan.varyings * kGroup, sizeof(void*));
    s.out_rows = take(plan.varyings * kGroup, sizeof(void*));
    s.absent = take(width, item);
    s.trash = take(width, item);
    s.zeros = take(width, item);
  }
  if (plan.sums_rows) {
    s.short_sum = take(width, item);
    s.long_sum = take(width, sizeof(double));
    s.own = take(width, item);
  }
  if (finishes) {
    s.finished = take(width, item);
    s.data = take(width, item);
    s.slope = take(width, item);
    s.total = take(width, sizeof(double));
  }
  s.bytes = end;
}

struct Pass {
  const Plan* plan;
  const SumKernels* kernels;
  int operand;  // of `combine`
  int64_t parts;
};

int64_t parts_of(const Plan& plan, const PlanOperand& o) {
  return std::clamp<int64_t>(o.sums_size * tasks_with_sums(plan, o) / kTaskCost, 1, kMaxTasks);
}

bool execute_pass(Plan& plan, const SumKernels& kernels, Workspace& workspace, bool (*interrupted)()) {
  const int64_t tasks = plan.row_tasks * plan.col_tasks;
  int threads = threads_for(tasks);
  int64_t sums = 0;
  for (int k = 0; k < plan.operands; ++k) {
    const PlanOperand& o = plan.operand[k];
    sums += o.sums_size * tasks_with_sums(plan, o);
    if (o.target == Target::partial) threads = std::max(threads, threads_for(parts_of(plan, o)));
  }
  const int64_t sums_bytes = in_cache_lines(sums * static_cast<int64_t>(sizeof(double)));
  char* const memory = workspace.reserve(sums_bytes + threads * plan.scratch.bytes);
  double* next = reinterpret_cast<double*>(memory);
  for (int k = 0; k < plan.operands; ++k) {
    PlanOperand& o = plan.operand[k];
    o.sums = o.sums_size ? next : nullptr;
    next += o.sums_size * tasks_with_sums(plan, o);
  }

  Pass pass{&plan, &kernels, 0, 1};
  Work work{tasks,
            plan.slices,
            plan.rows_per_slice * plan.cols_per_slice * plan.operands,
            threads,
            memory + sums_bytes,
            plan.scratch.bytes,
            [](const void* context, int64_t task, int64_t slice, char* scratch) {
              const Pass& pass = *static_cast<const Pass*>(context);
              pass.kernels->walk[pass.plan->wide](*pass.plan, task, slice, scratch);
            },
            &pass};
  if (!carry_out(work, interrupted)) return false;

  work.slices = 1;
  work.slice = [](const void* context, int64_t part, int64_t, char* scratch) {
    const Pass& pass = *static_cast<const Pass*>(context);
    pass.kernels->combine[pass.plan->wide](*pass.plan, pass.operand, part, pass.parts, scratch);
  };
  for (pass.operand = 0; pass.operand < plan.operands; ++pass.operand) {
    const PlanOperand& o = plan.operand[pass.operand];
    if (o.target != Target::partial) continue;
    work.tasks = pass.parts = parts_of(plan, o);
    work.slice_cost = divide_up(o.sums_size * tasks_with_sums(plan, o), pass.parts);
    if (!carry_out(work, interrupted)) return false;
  }
  return true;
}

// The dims of operand `first`, if any, before those it lacks: its derivative is then one run after another.
Order order_of(const Problem& p, int vector, const Operand* first) {
  Order order{vector, {}, 0};
  const auto take = [&](auto wanted) {
    for (int d = 0; d < p.ndim; ++d)
      if (d != vector && wanted(d)) order.rows[order.count++] = d;
  };
  if (first) {
    take([&](int d) { return has(*first, d); });
    take([&](int d) { return !has(*first, d); });
  } else {  // the summed dim innermost: where rows are terms, outputs are runs
    take([&](int d) { return d != p.sum_dim; });
    take([&](int d) { return d == p.sum_dim; });
  }
  return order;
}

}  // namespace

bool execute(const Problem& problem, const SumKernels& kernels, Workspace& workspace, bool (*interrupted)()) {
  Problem todo = problem;
  const int vector = vector_dim(todo);
  Plan plan;
  plan.wide = problem.wide;
  int64_t stored = 0, largest = 0;
  const char* middle = nullptr;  // of the largest
  for (int k = 0; k < problem.operands; ++k) {
    const Operand& o = problem.operand[k];
    const int64_t entries = o.grad ? extent(problem, o) : 0;
    stored += entries;
    if (entries <= largest) continue;
    largest = entries;
    middle = static_cast<const char*>(o.grad) + entries / 2 * item_size(o.dtype);
  }
  plan.stream = stored * (problem.wide ? 8 : 4) > kStreamBytes && is_mapped(middle);

  const Operand* first = nullptr;
  for (;;) {
    set_strides(todo, order_of(todo, vector, first), plan);
    cut(plan);
    // Derivatives whose sums are too large wait for a pass of their own; the one this pass is for stays.
    int deferred = -1;
    uint32_t waiting = 0;
    int64_t entries = 0;
    for (int k = 0; k < plan.operands; ++k) {
      PlanOperand& o = plan.operand[k];
      if (o.target != Target::partial) continue;
      entries += o.sums_size * tasks_with_sums(plan, o);
      const bool own_pass = first && todo.operand[k].dims == first->dims;
      if (entries > kMaxSums && !own_pass && row_extent(plan, o) > 1) {
        entries -= o.sums_size * tasks_with_sums(plan, o);
        waiting |= 1u << k;
        deferred = k;
      }
    }
    for (int k = 0; k < plan.operands; ++k) {
      if (!(waiting >> k & 1)) continue;
      plan.operand[k].target = Target::none;
      plan.operand[k].sums_size = 0;
    }
    bool any = false;
    for (int k = 0; k < plan.operands; ++k) any = any || plan.operand[k].target != Target::none;
    if (any) {
      classify(plan);
      lay_out(plan);
      if (!execute_pass(plan, kernels, workspace, interrupted)) return false;
    }
    if (!waiting) return true;
    // The next pass: what waited, led by the last of it.
    for (int k = 0; k < todo.operands; ++k)
      if (!(waiting >> k & 1)) todo.operand[k].grad = nullptr;
    first = &todo.operand[deferred];
  }
}

}  // namespace fusionsum
