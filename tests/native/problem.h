// Problems (csrc/sum.h) of every kind from any bytes, each array in memory that ends at a fence, and the check of their
// results against a plain loop.
//
//     Memory memory(draw(bytes), seed);  // fills the operands
//     memory.check_everything();         // all instruction sets, 1 to 3 threads
//
// What lives elsewhere: which bytes an array has (tests/cuda/case.h), the programs that use this (fuzz.cpp, pool.cpp,
// memory.cpp). The bounds are those of tests/conftest.py.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "case.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/simd/scalar.h"

#if defined(__has_feature)  // clang's way to say it
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes) (static_cast<void>(begin), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes) (static_cast<void>(begin), static_cast<void>(bytes))
#endif

#define DECLARE(name)                         \
  namespace fusionsum {                       \
  namespace name {                            \
  extern const Isa isa __attribute__((weak)); \
  }                                           \
  }
FUSIONSUM_ISAS(DECLARE)
#undef DECLARE

namespace native {

using emulator::Array;
using emulator::arrays_of;
using emulator::Role;
using emulator::Span;
using namespace fusionsum;

// The instruction sets that this machine runs.
inline const std::vector<const Isa*>& sets() {
  static const std::vector<const Isa*> found = [] {
    const Isa* const all[] = {
#define ADDRESS(name) &name::isa,
        FUSIONSUM_ISAS(ADDRESS)
#undef ADDRESS
    };
    std::vector<const Isa*> found;
    for (const auto& [name, runs_here] : isas())
      for (const Isa* isa : all)
        if (isa && runs_here && isa->name == name) found.push_back(isa);
    return found;
  }();
  return found;
}

inline void carry_out(const Problem& problem, const Isa& isa) {
  Workspace workspace;
  execute(problem, *isa.sum, workspace, [] { return false; });
}

// Ends the program, with a line that a fuzzer and a test will show.
[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::abort();
}

// Numbers from bytes; past their end, zeros.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}

  uint32_t below(uint32_t n) {
    uint32_t x = 0;
    for (uint32_t reach = n - 1; reach; reach >>= 8) x = x << 8 | (next_ < end_ ? *next_++ : 0u);
    return x % n;
  }
  bool one_in(uint32_t n) { return below(n) == n - 1; }

 private:
  const uint8_t *next_, *end_;
};

// ---- problems
// --------------------------------------------------------------------------------------------------------------

// Strides of the dims in `dims`, laid out in the given order, the last one innermost.
inline void lay_out(const Problem& p, uint32_t dims, const int* order, int64_t* stride) {
  int64_t step = 1;
  std::fill_n(stride, kMaxDims, 0);
  for (int i = p.ndim - 1; i >= 0; --i) {
    if (!(dims >> order[i] & 1)) continue;
    stride[order[i]] = step;
    step *= p.size[order[i]];
  }
}

// Strides of any order; one dim's steps wider, some dims backwards, and, where `repeats`, some of one entry that stands
// for all.
inline void draw_strides(Bytes& b, const Problem& p, uint32_t dims, bool repeats, int64_t* stride) {
  int order[kMaxDims];
  for (int d = 0; d < p.ndim; ++d) order[d] = d;
  const bool plain = !b.one_in(3);
  for (int d = p.ndim - 1; !plain && d > 0; --d) std::swap(order[d], order[b.below(d + 1)]);
  lay_out(p, dims, order, stride);
  if (plain) return;
  const int wider = static_cast<int>(b.below(p.ndim));
  const int64_t from = stride[wider], factor = 1 + b.below(3);
  for (int d = 0; d < p.ndim; ++d)
    if (from && stride[d] >= from) stride[d] *= factor;
  for (int d = 0; d < p.ndim; ++d) {
    if (b.one_in(4)) stride[d] = -stride[d];
    if (repeats && b.one_in(8)) stride[d] = 0;
  }
}

// Of at most so many entries.
inline Problem draw(Bytes& b, int64_t most = 1 << 19) {
  constexpr int64_t kSizes[] = {1,  2,  3,  4,  5,   7,   8,   9,   13,  15,  16,   17,   19,   31,   32,
                                33, 61, 64, 65, 127, 129, 257, 511, 512, 521, 1023, 1024, 1025, 2049, 16411};
  Problem p{};
  p.ndim = b.one_in(4) ? 1 + static_cast<int>(b.below(kMaxDims - 1)) : 1 + static_cast<int>(b.below(4));
  int64_t room = std::min<int64_t>(most, 1 << (b.one_in(32) ? 19 : b.one_in(8) ? 16 : 12));
  for (int d = 0; d < p.ndim; ++d) {
    p.size[d] = std::min(kSizes[b.below(std::size(kSizes))], room);
    room /= p.size[d];
  }
  p.sum_dim = static_cast<int>(b.below(p.ndim + 1)) - 1;
  p.operands = 2 + static_cast<int>(b.one_in(4) ? b.below(kMaxOperands - 1) : b.below(4));
  p.absent = b.below(2);
  const bool mixed = b.one_in(2), activated = b.one_in(2), masked = b.one_in(3);
  const auto any_dtype = [&] { return static_cast<DType>(b.below(static_cast<uint32_t>(DType::f16) + 1)); };
  const DType dtype = any_dtype();
  const uint32_t all = (1u << p.ndim) - 1;
  const auto some_dims = [&] {
    uint32_t dims = all;
    for (int d = 0; d < p.ndim; ++d)
      if (b.one_in(4)) dims &= ~(1u << d);
    return dims;
  };
  const uint32_t direction = b.below(4);  // 0: forward; 1, 2: backward; 3: any
  bool wide = false;
  uint32_t had = 0;  // by a factor or the weights: no other dim is there, since shapes come from broadcasting theirs
  for (int k = 0; k < p.operands; ++k) {
    Operand& o = p.operand[k];
    o.dtype = mixed ? any_dtype() : dtype;
    wide = wide || o.dtype == DType::f64;
    o.dims = k ? some_dims() : p.sum_dim < 0 ? all : all & ~(1u << p.sum_dim);
    if (k) had |= o.dims;
    if (k == p.operands - 1) o.dims |= all & ~had;
    draw_strides(b, p, o.dims, true, o.stride);
    draw_strides(b, p, o.dims, false, o.grad_stride);
    // Addresses are for Memory to set: here they say only that there is one.
    static char some;
    o.data = k || (direction && !(direction == 3 && b.one_in(2))) ? &some : nullptr;
    const bool wanted = direction == 3 ? b.one_in(2) : (k == 0) == (direction == 0) && !(k && b.one_in(3));
    o.grad = wanted ? &some : nullptr;
    if (k == 0) continue;
    if (activated) o.activation = static_cast<Activation>(b.below(static_cast<uint32_t>(Activation::gelu) + 1));
    if (masked && b.one_in(2)) {
      o.mask = reinterpret_cast<const uint8_t*>(&some);
      draw_strides(b, p, some_dims() & (b.one_in(4) ? all : o.dims), true, o.mask_stride);
    }
  }
  p.wide = wide || b.one_in(8);
  return p;
}

// A problem like the candidates of the README: weights (n,), factors (B, 1, n), (B, K, n) and (K, n), activated, the
// second masked along its rows. For the output or for all gradients.
inline Problem outer(DType dtype, int64_t rows, int64_t candidates, int64_t terms, bool backward) {
  constexpr int kOrder[] = {0, 1, 2};
  static char some;
  Problem p{};
  p.ndim = 3;
  p.sum_dim = 2;
  p.wide = dtype == DType::f64;
  p.absent = 1;
  for (int d = 0; d < 3; ++d) p.size[d] = d == 0 ? rows : d == 1 ? candidates : terms;
  for (uint32_t dims : {3u, 4u, 5u, 7u, 6u}) {
    Operand& o = p.operand[p.operands++];
    o.dtype = dtype;
    o.dims = dims;
    o.data = backward || p.operands > 1 ? &some : nullptr;
    o.grad = backward == (p.operands > 1) ? &some : nullptr;
    o.activation = p.operands > 2 ? static_cast<Activation>(p.operands - 1) : Activation::none;
    lay_out(p, dims, kOrder, o.stride);
    lay_out(p, dims, kOrder, o.grad_stride);
  }
  p.operand[3].mask = reinterpret_cast<const uint8_t*>(&some);
  lay_out(p, 3, kOrder, p.operand[3].mask_stride);
  return p;
}

// ---- memory
// ----------------------------------------------------------------------------------------------------------------

constexpr int64_t kGuard = 64;

// Room for one array, between two pages that may not be touched. The array ends at one fence or begins at the other; on
// its other side are guard bytes, poisoned for ASan and 0xFF.
class Fenced {
 public:
  explicit Fenced(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    bytes_ = divide_up(bytes + kGuard, page) * page + 2 * page;
    map_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (map_ == MAP_FAILED) fail("no memory for an array");
    first_ = map_ + page;
    last_ = map_ + bytes_ - page;
    if (mprotect(first_, last_ - first_, PROT_READ | PROT_WRITE)) fail("no memory for an array");
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() {
    ASAN_UNPOISON_MEMORY_REGION(first_, last_ - first_);
    munmap(map_, bytes_);
  }

  void place(int64_t bytes, bool at_end) {
    begin_ = at_end ? last_ - bytes : first_;
    guard_ = at_end ? begin_ - kGuard : begin_ + bytes;
    std::memset(guard_, 0xff, kGuard);
    ASAN_POISON_MEMORY_REGION(guard_, kGuard);
  }
  char* begin() const { return begin_; }
  bool guard_is_whole() const {
    ASAN_UNPOISON_MEMORY_REGION(guard_, kGuard);
    const bool whole = std::count(guard_, guard_ + kGuard, '\xff') == kGuard;
    ASAN_POISON_MEMORY_REGION(guard_, kGuard);
    return whole;
  }

 private:
  char *map_, *first_, *last_, *begin_ = nullptr, *guard_ = nullptr;
  int64_t bytes_;
};

// phi(z) and phi'(z) as mathematics has them.
struct Value {
  double y, dy;
};
inline Value activated(Activation a, double z) {
  const double sigmoid = z < 0 ? std::exp(z) / (1 + std::exp(z)) : 1 / (1 + std::exp(-z));
  switch (a) {
    case Activation::tanh:
      return {std::tanh(z), 1 / (std::cosh(z) * std::cosh(z))};
    case Activation::sigmoid:
      return {sigmoid, sigmoid * (1 - sigmoid)};
    case Activation::relu:
      return {std::max(z, 0.0), z > 0 ? 1.0 : 0.0};
    case Activation::silu:
      return {z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))};
    case Activation::gelu: {
      const double phi = 0.5 * std::erfc(-z * std::sqrt(0.5));
      return {z * phi, phi + z * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1.0))};
    }
    default:
      return {z, 1};
  }
}

inline double widened(DType dtype, const char* at) {
  double x = 0;
  scalar::with_dtype(dtype, at, [&](const auto* p) { x = static_cast<double>(scalar::widen(*p)); });
  return x;
}

// eps and the smallest subnormal, as numpy.finfo has them.
struct Limits {
  double eps, smallest;
};
constexpr Limits limits(DType dtype) {
  constexpr Limits all[] = {{0x1p-52, 0x1p-1074}, {0x1p-23, 0x1p-149}, {0x1p-7, 0x1p-133}, {0x1p-10, 0x1p-24}};
  return all[static_cast<int>(dtype)];
}

// A problem with its arrays. Operands hold numbers that every dtype has exactly; where an operand is absent, and
// between its entries, lies NaN. What the results should be is found at once, by one loop over all entries.
class Memory {
 public:
  Memory(const Problem& problem, uint32_t seed)
      : p(problem), seed_(seed), whole_(seed % 4 == 0), arrays_(arrays_of(p)) {
    for (size_t i = 0; i < arrays_.size(); ++i) {
      const Array& array = arrays_[i];
      const Span span = array.span(p);
      fenced_.push_back(std::make_unique<Fenced>(span.bytes));
      fenced_[i]->place(span.bytes, seed >> i % 32 & 1);
      char* const begin = fenced_[i]->begin();
      std::memset(begin, 0xff, span.bytes);
      origin_.push_back(begin + (static_cast<char*>(array.pointer(p)) - span.begin));
      array.point_to(p, origin_[i]);
      if (array.role == Role::mask)
        array.for_each_entry(p, [&](int64_t offset) { origin_[i][offset] = random(i, offset) % 3 ? 1 : 0; });
    }
    loop();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  const Problem& problem() const { return p; }

  // The gradients as they are in memory, after a run on memory that was all NaN.
  std::vector<emulator::Bytes> results(const Isa& isa) {
    for (size_t i = 0; i < arrays_.size(); ++i) {
      const Span span = arrays_[i].span(p);
      if (arrays_[i].role == Role::grad) std::memset(span.begin, 0xff, span.bytes);
    }
    carry_out(p, isa);
    std::vector<emulator::Bytes> all;
    for (size_t i = 0; i < arrays_.size(); ++i) {
      if (!fenced_[i]->guard_is_whole()) fail(name(i, isa) + ": wrote beside the array\n" + described());
      const Span span = arrays_[i].span(p);
      if (arrays_[i].role == Role::grad) all.emplace_back(span.begin, span.begin + span.bytes);
    }
    return all;
  }

  // What was run last is within the bounds, and between its entries nothing was written.
  void check(const Isa& isa) const {
    for (size_t i = 0; i < arrays_.size(); ++i) {
      if (arrays_[i].role != Role::grad) continue;
      const Operand& o = p.operand[arrays_[i].operand];
      const Sums& sums = sums_[arrays_[i].operand];
      const Span span = arrays_[i].span(p);
      emulator::Bytes rest(span.begin, span.begin + span.bytes);
      int64_t terms = 1, entry = 0;
      for (int d = 0; d < p.ndim; ++d) terms *= has(o, d) ? 1 : p.size[d];
      arrays_[i].for_each_entry(p, [&](int64_t offset) {
        const double want = sums.value[entry], scale = sums.scale[entry];
        const bool exact = exact_ && scale < 0x1p24;
        const double relative = exact ? 0 : (terms + 6.0 * p.operands + 4) * (p.wide ? 0x1p-52 : 0x1p-23);
        const double bound = relative * scale + limits(o.dtype).eps * std::fabs(want) + limits(o.dtype).smallest;
        double got = widened(o.dtype, origin_[i] + offset);
        const double most = o.dtype == DType::f16 ? 65520 : std::numeric_limits<double>::max();  // rounds to infinity
        got = got > most ? most : got < -most ? -most : got;
        if (!(std::fabs(got - std::fmin(std::fmax(want, -most), most)) <= bound))
          fail(name(i, isa) + " entry " + std::to_string(entry) + ": got " + std::to_string(got) + ", want " +
               std::to_string(want) + ", bound " + std::to_string(bound) + "\n" + described());
        const int64_t at = origin_[i] + offset - span.begin;
        std::fill_n(rest.begin() + at, arrays_[i].item, '\xff');
        ++entry;
      });
      if (std::count(rest.begin(), rest.end(), '\xff') != span.bytes)
        fail(name(i, isa) + ": wrote between the entries\n" + described());
    }
  }

  void check_everything() {
    for (const Isa* isa : sets()) {
      std::vector<emulator::Bytes> first;
      for (int threads = 1; threads <= 3; ++threads) {
        set_num_threads(threads);
        const auto found = results(*isa);
        if (threads == 1) check(*isa);
        if (threads == 1) first = found;
        if (found != first) fail("other bits with " + std::to_string(threads) + " threads\n" + described());
      }
    }
  }

  std::string described() const {
    std::string text = "sizes";
    for (int d = 0; d < p.ndim; ++d) text += " " + std::to_string(p.size[d]);
    text +=
        ", sum_dim " + std::to_string(p.sum_dim) + (p.wide ? ", wide" : "") + ", absent " + std::to_string(p.absent);
    for (int k = 0; k < p.operands; ++k) {
      const Operand& o = p.operand[k];
      text += "\noperand " + std::to_string(k) + ": dtype " + std::to_string(static_cast<int>(o.dtype)) +
              ", activation " + std::to_string(static_cast<int>(o.activation)) + ", dims";
      for (int d = 0; d < p.ndim; ++d) text += has(o, d) ? " " + std::to_string(d) : "";
      const auto add = [&](const char* what, const int64_t* stride) {
        text += std::string("; ") + what;
        for (int d = 0; d < p.ndim; ++d) text += " " + std::to_string(stride[d]);
      };
      if (o.data) add("strides", o.stride);
      if (o.mask) add("mask", o.mask_stride);
      if (o.grad) add("gradient", o.grad_stride);
    }
    return text;
  }

 private:
  struct Sums {
    std::vector<double> value, scale;
  };

  uint32_t random(size_t array, int64_t offset) const {
    uint64_t x = seed_ + 0x9e3779b97f4a7c15 * (array + 1) + 0xd1342543de82ef95 * static_cast<uint64_t>(offset);
    x = (x ^ x >> 32) * 0xd6e8feb86659fd93;
    return static_cast<uint32_t>((x ^ x >> 32) >> 8);
  }
  double number(size_t array, int64_t offset) const {
    const uint32_t r = random(array, offset);
    if (whole_) return static_cast<int>(r % 5) - 2;
    return std::ldexp(static_cast<int>(r % 257) - 128, static_cast<int>(r >> 16 & 3) - 8);  // -2 to 2
  }
  std::string name(size_t i, const Isa& isa) const {
    return std::string(isa.name) + ", derivative of operand " + std::to_string(arrays_[i].operand);
  }

  // Visits every entry of the loop space once: fills in the operands, and adds up the derivatives.
  void loop() {
    const int n = p.operands;
    std::vector<int64_t> index(p.ndim, 0);
    std::vector<size_t> data_of(n);
    for (size_t i = 0; i < arrays_.size(); ++i)
      if (arrays_[i].role == Role::data) data_of[arrays_[i].operand] = i;
    exact_ = whole_;
    sums_.resize(n);
    for (int k = 0; k < n; ++k) {
      const Operand& o = p.operand[k];
      exact_ = exact_ && (o.activation == Activation::none || o.activation == Activation::relu);
      if (o.grad) sums_[k].value.resize(extent(p, o)), sums_[k].scale.resize(extent(p, o));
    }
    for (;;) {
      double y[kMaxOperands], dy[kMaxOperands], size[kMaxOperands];
      for (int k = 0; k < n; ++k) {
        const Operand& o = p.operand[k];
        int64_t at = 0, mask_at = 0;
        for (int d = 0; d < p.ndim; ++d) {
          if (has(o, d)) at += index[d] * o.stride[d];
          mask_at += index[d] * o.mask_stride[d];
        }
        y[k] = size[k] = dy[k] = 1;
        if (o.mask && !o.mask[mask_at]) {
          y[k] = size[k] = p.absent;
          dy[k] = 0;
        } else if (o.data) {
          const double z = number(data_of[k], at);
          scalar::with_dtype(o.dtype, o.data, [&](const auto* from) {
            auto stored = *from;
            scalar::narrow(z, &stored);
            std::memcpy(origin_[data_of[k]] + at * item_size(o.dtype), &stored, sizeof stored);
          });
          const Value value = activated(o.activation, z);
          y[k] = value.y;
          dy[k] = value.dy;
          size[k] = o.activation == Activation::sigmoid ? 1 : std::fabs(z);
        }
      }
      for (int k = 0; k < n; ++k) {
        const Operand& o = p.operand[k];
        if (!o.grad) continue;
        int64_t entry = 0;
        for (int d = 0; d < p.ndim; ++d)
          if (has(o, d)) entry = entry * p.size[d] + index[d];
        double value = dy[k], scale = dy[k] == 0 ? 0 : 1;
        for (int j = 0; j < n; ++j) {
          if (j == k) continue;
          value *= y[j];
          scale *= size[j];
        }
        sums_[k].value[entry] += value;
        sums_[k].scale[entry] += scale;
      }
      int d = p.ndim - 1;
      while (d >= 0 && ++index[d] == p.size[d]) index[d--] = 0;
      if (d < 0) return;
    }
  }

  Problem p;
  const uint32_t seed_;
  const bool whole_;                 // operands are small integers ...
  bool exact_;                       // ... and so are the products
  const std::vector<Array> arrays_;  // whose strides are those of p
  std::vector<std::unique_ptr<Fenced>> fenced_;
  std::vector<char*> origin_;  // where the entry of all-zero indices is
  std::vector<Sums> sums_;     // by operand
};

}  // namespace native
