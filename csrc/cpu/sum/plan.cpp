// From a problem to a plan, and the run of it. Compiled for the baseline: nothing here depends on the instruction set.
//
// The choices, in order: which dim is the vector dim; in which order the rows go; where each derivative goes (plan.h's
// Target); how rows and columns are cut into slots. A derivative whose sums would take too much memory in one pass over the
// rows gets a pass of its own, in which its own dims come first.
#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "../parallel.h"

namespace fusionsum {
namespace {

// Sizes are in entries of operands (rows x cols x operands). A slot is worth a few microseconds at least, and 64 of them
// keep as many cores busy. Between looks for Ctrl-C at most kPauseWork is done, or one slice per thread: a tenth of a second
// with the slowest activation.
constexpr int64_t kSlotWork = 1 << 16, kMaxSlots = 64, kSliceWork = 1 << 20, kPauseWork = 1 << 26;
constexpr int64_t kStreamBytes = int64_t{32} << 20;  // gradients larger than this bypass the caches
constexpr int64_t kMaxSums = int64_t{1} << 19;  // float64 entries of all slots together: 4 MiB

struct Order {
  int vector;           // the vector dim, of the problem's
  int rows[kMaxDims];   // the others, outermost first
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
    to.splat = !has(from, order.vector);
    if (!to.splat) {
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

// Cuts rows and columns into slots and slices, and says of each derivative where it goes.
void cut(Plan& plan) {
  const int64_t work = plan.rows * plan.cols * plan.operands;
  const int64_t wanted = std::clamp<int64_t>(work / kSlotWork, 1, kMaxSlots);
  for (int k = 0; k < plan.operands; ++k) {
    PlanOperand& o = plan.operand[k];
    if (!o.grad) continue;
    o.run = run_of(plan, o);
    o.target = o.run == 1 ? Target::store : o.run > 1 ? Target::run : Target::partial;
  }

  // Few rows: columns are cut too. A derivative of one value per row is then summed over slots.
  const auto unit = [&] {  // rows that one slot must hold together
    int64_t rows = 1;
    for (int k = 0; k < plan.operands; ++k)
      if (plan.operand[k].target == Target::run) rows = std::max(rows, plan.operand[k].run);
    return rows;
  };
  const int64_t col_blocks = divide_up(plan.cols, kBlock);
  plan.col_slots = 1;
  int64_t row_slots = std::min(wanted, plan.rows / unit());
  if (row_slots < std::min<int64_t>(wanted, 16) && col_blocks > 1) plan.col_slots = std::min(col_blocks, divide_up(wanted, row_slots));
  plan.cols_per_slot = divide_up(col_blocks, plan.col_slots) * kBlock;
  plan.col_slots = divide_up(plan.cols, plan.cols_per_slot);
  const bool long_row = plan.cols_per_slot * plan.operands > kPauseWork;
  plan.cols_per_slice = long_row ? std::max<int64_t>(1, kSliceWork / plan.operands / kBlock) * kBlock : plan.cols_per_slot;
  plan.col_slices = divide_up(plan.cols_per_slot, plan.cols_per_slice);
  for (int k = 0; k < plan.operands; ++k) {
    PlanOperand& o = plan.operand[k];
    if (o.grad && o.splat && (plan.col_slots > 1 || long_row)) o.target = Target::partial;
  }

  // Still too few: the longest runs are summed over slots as well.
  const int64_t row_work = plan.cols_per_slice * plan.operands, slice_rows = std::max<int64_t>(1, kSliceWork / row_work);
  while (unit() > 1 && plan.rows / unit() * plan.col_slots < std::min<int64_t>(wanted, 16)) {
    const int64_t longest = unit();
    for (int k = 0; k < plan.operands; ++k)
      if (plan.operand[k].target == Target::run && plan.operand[k].run == longest) plan.operand[k].target = Target::partial;
  }
  const int64_t units = plan.rows / unit();
  int64_t per_slot = divide_up(units, std::max<int64_t>(1, std::min(divide_up(wanted, plan.col_slots), units))) * unit();
  if (per_slot > kGroup && unit() == 1) per_slot = divide_up(per_slot, kGroup) * kGroup;
  plan.rows_per_slot = per_slot;
  plan.row_slots = divide_up(plan.rows, per_slot);

  int64_t whole = 1;  // rows that one slice must hold together; the sums of longer runs last from slice to slice
  for (int k = 0; k < plan.operands; ++k) {
    PlanOperand& o = plan.operand[k];
    const int inner = plan.row_dims - 1;
    if (o.target == Target::run) {
      // A short run is summed and written at once; longer ones go through float64 sums.
      const bool at_once = !o.splat && !o.mask && o.run == plan.row_size[inner] && o.run <= kSummed;
      o.sums_size = at_once ? 0 : o.splat ? 1 : plan.cols_per_slot;
      if (at_once) whole = std::max(whole, o.run);
    } else if (o.target == Target::partial) {
      int64_t stride = o.splat ? 1 : plan.cols;
      for (int d = inner; d >= 0; --d) {
        o.partial_row[d] = o.has_row[d] ? stride : 0;
        if (o.has_row[d]) stride *= plan.row_size[d];
      }
      o.sums_size = stride;
    }
  }
  plan.rows_per_slice = divide_up(std::min(per_slot, slice_rows), whole) * whole;
  plan.slices = divide_up(per_slot, plan.rows_per_slice) * plan.col_slices;
}

int64_t slots_with_sums(const Plan& plan, const PlanOperand& o) {
  const bool per_slot = o.target == Target::run || o.splat;
  return plan.row_slots * (per_slot ? plan.col_slots : 1);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Call {
  const Plan* plan;
  const Isa* isa;
  bool wide;
  int64_t slice, first_slot, parts;
  int operand;
};

bool carry_out(Plan& plan, bool wide, const Isa& isa, bool (*interrupted)()) {
  int64_t entries = 0;
  for (int k = 0; k < plan.operands; ++k) entries += plan.operand[k].sums_size * slots_with_sums(plan, plan.operand[k]);
  std::unique_ptr<double, Free> sums(entries ? static_cast<double*>(std::malloc(entries * sizeof(double))) : nullptr);
  if (entries && !sums) throw std::bad_alloc();
  double* next = sums.get();
  for (int k = 0; k < plan.operands; ++k) {
    PlanOperand& o = plan.operand[k];
    if (!o.sums_size) continue;
    o.sums = next;
    next += o.sums_size * slots_with_sums(plan, o);
  }

  Call call{&plan, &isa, wide, 0, 0, 1, 0};
  const int64_t slots = plan.row_slots * plan.col_slots;
  const int64_t slice_work = plan.rows_per_slice * plan.cols_per_slice * plan.operands;
  const int64_t at_once = std::max<int64_t>(get_num_threads(), kPauseWork / slice_work);
  for (call.slice = 0; call.slice < plan.slices; ++call.slice) {
    for (call.first_slot = 0; call.first_slot < slots; call.first_slot += at_once) {
      if ((call.slice || call.first_slot) && interrupted()) return false;
      parallel_for(
          std::min(at_once, slots - call.first_slot),
          [](int64_t i, void* c) {
            const Call& call = *static_cast<Call*>(c);
            call.isa->run_slot[call.wide](*call.plan, call.first_slot + i, call.slice);
          },
          &call);
    }
  }
  for (call.operand = 0; call.operand < plan.operands; ++call.operand) {
    const PlanOperand& o = plan.operand[call.operand];
    if (o.target != Target::partial) continue;
    call.parts = std::clamp<int64_t>(o.sums_size * slots_with_sums(plan, o) / kSlotWork, 1, kMaxSlots);
    parallel_for(
        call.parts,
        [](int64_t part, void* c) {
          const Call& call = *static_cast<Call*>(c);
          call.isa->combine[call.wide](*call.plan, call.operand, part, call.parts);
        },
        &call);
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

bool run(const Problem& problem, const Isa& isa, bool (*interrupted)()) {
  Problem todo = problem;
  const int vector = vector_dim(todo);
  Plan plan;
  int64_t stored = 0;
  for (int k = 0; k < problem.operands; ++k)
    if (problem.operand[k].grad) stored += extent(problem, problem.operand[k]);
  plan.stream = stored * (problem.wide ? 8 : 4) > kStreamBytes;

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
      entries += o.sums_size * slots_with_sums(plan, o);
      const bool own_pass = first && todo.operand[k].dims == first->dims;
      if (entries > kMaxSums && !own_pass && row_extent(plan, o) > 1) {
        entries -= o.sums_size * slots_with_sums(plan, o);
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
    if (any && !carry_out(plan, problem.wide, isa, interrupted)) return false;
    if (!waiting) return true;
    // The next pass: what waited, led by the last of it.
    for (int k = 0; k < todo.operands; ++k)
      if (!(waiting >> k & 1)) todo.operand[k].grad = nullptr;
    first = &todo.operand[deferred];
  }
}

}  // namespace fusionsum
