// CUDA's execution model on one OS thread.
//
// Every CUDA thread is a fiber; blocks run one after another; barriers and warp collectives are where fibers give way.
// Which thread and which block goes first is a schedule: forward, reverse, or random by seed. Misuse ends the launch,
// which returns an error whose text names file, line, kernel, block and thread; nothing hangs or aborts, endless loops
// excepted.
//
// Under AddressSanitizer shared arrays have their exact size between redzones. Under ThreadSanitizer each fiber is a
// thread of its own, ordered by __syncthreads and __syncwarp alone: shuffles order no memory, blocks of one launch are
// not ordered, and launches are.
//
// What lives elsewhere: CUDA's names for what is here (emulator.h).
#pragma once
#if !defined(__x86_64__) || !defined(__GNUC__) || !defined(__ELF__)
#error "the emulator switches fibers in x86-64 assembly for ELF systems; elsewhere the kernels need nvcc"
#endif
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "errors.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
// The emulator's own code: its bookkeeping would be races, and the fiber that never returns would leave its stack
// poisoned.
#define EMULATOR_OWN __attribute__((no_sanitize("thread", "address")))

// ---- CUDA's types, of which launches are made -----------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaError_t {
#define ENUMERATOR(name, number, text) name = number,
  CUDA_ERRORS(ENUMERATOR)
#undef ENUMERATOR
};

// ---- one launch -----------------------------------------------------------------------------------------------------

namespace emulator {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kSharedLimit = 48 << 10, kParameterLimit = 4096;  // of every toolchain and architecture we build for
#if defined(__SANITIZE_THREAD__)
constexpr size_t kStack = 32 << 10;  // allocated anew for every thread
// A fiber with a reused number is the same thread to ThreadSanitizer, which would miss races between its blocks: no
// fiber serves twice in a launch, unless that has more of them than this; the runtime has room for 8128.
constexpr size_t kMostFibers = 6000;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr uint64_t kStackEnd = 0x5ac3e1d2b4f60789;  // lies below each stack, until it overflows

struct Site {
  const char* file;
  int line;

  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  EMULATOR_OWN bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || !__builtin_strcmp(file, other.file));
  }
  std::string text() const {
    const char* const slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

enum class State : uint8_t { ready, at_barrier, in_collective, exited };
enum class Collective : uint8_t { syncwarp, shfl, shfl_xor, shfl_down, ballot };

struct Thread {
  State state;
  uint3 index;    // threadIdx
  unsigned rank;  // in the block
  Site site;      // where it waits
  // In a collective: what it gives, whose it takes, and what it took.
  Collective collective;
  unsigned mask, source;
  uint64_t given, taken;
  unsigned warp_syncs;
  void* stack_pointer;
  char* stack;
  void* fake_stack;  // AddressSanitizer's
  void* fiber;       // ThreadSanitizer's
};

struct SharedArray {
  const void* key;
  void* data;
};

struct Block {
  uint3 index;
  unsigned live, waiting, barriers;
  Site barrier;  // where the first waits
  std::vector<SharedArray> shared;
  size_t shared_bytes;
  // Addresses that stand for orders of memory: of the block's barriers, then of each warp's, the odd and the even ones
  // apart, since who has passed one barrier may reach the next before others have left.
  char order[2 + 2 * kMostThreads / kWarp];
};

struct Launch {
  const void* kernel;
  dim3 grid, block;
  const void* parameters;
  size_t bytes;
  void (*call)(const Launch&);
  void* stream;
  size_t shared_bytes;  // of the array whose size the launch says
};

struct Schedule {
  enum { forward, reverse, random } order = forward;
  uint64_t seed = 0;

  // "forward", "reverse" or "random:<seed>"; false if it is none of them.
  bool parse(const std::string& text) {
    if (text == "forward" || text == "reverse") {
      order = text == "forward" ? forward : reverse;
      return true;
    }
    if (text.rfind("random:", 0) != 0 || text.find_first_not_of("0123456789", 7) != std::string::npos ||
        text.size() == 7) {
      return false;
    }
    order = random;
    seed = std::strtoull(text.c_str() + 7, nullptr, 10);
    return true;
  }
};

// One launch at a time, whichever OS thread it comes from.
struct Machine {
  std::mutex mutex;
  Schedule schedule;
  uint64_t random_state = 0;
  const Launch* launch = nullptr;
  unsigned threads = 0;
  Block* block = nullptr;
  Thread* current = nullptr;
  Thread thread[kMostThreads] = {};
  void* scheduler_stack = nullptr;
  const char* complaint = nullptr;  // of `current`; the scheduler makes it a report
  Site complaint_site{};
  std::string failure;  // of the last launch that failed
  cudaError_t failed_with = cudaSuccess;
  std::vector<std::string> reports;
  void (*observe)(const Launch&) = nullptr;  // the recorder's
  int64_t launches_to_failure = -1;          // how many still succeed before one fails; negative: all
  uint64_t last_blocks = ~uint64_t{0};       // how many of each grid run, its last; the others are left out
  // The sanitizers' view of the scheduler.
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  void* scheduler_fiber = nullptr;
  std::vector<void*> fibers;
  size_t fibers_used = 0;                   // in this launch
  char launch_begins = 0, launch_ends = 0;  // addresses that stand for the orders of memory

  Machine() {
    const char* const text = std::getenv("FUSIONSUM_EMULATOR_SCHEDULE");
    if (text && !schedule.parse(text)) {
      std::fprintf(stderr, "FUSIONSUM_EMULATOR_SCHEDULE=%s: expected forward, reverse or random:<seed>\n", text);
      std::exit(2);
    }
  }
};
inline Machine machine;
inline thread_local cudaError_t last_error = cudaSuccess;  // CUDA's

// ThreadSanitizer sees nothing of what is read, written or allocated meanwhile. Fibers must not give way within.
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  EMULATOR_OWN Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  EMULATOR_OWN ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
  ~Unseen() {}
#endif
};

EMULATOR_OWN inline void release([[maybe_unused]] char* order) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(order);
#endif
}
EMULATOR_OWN inline void acquire([[maybe_unused]] char* order) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(order);
#endif
}

// ---- fibers ---------------------------------------------------------------------------------------------------------

// Saves the registers that a callee must keep and the stack pointer; continues where another stack was left.
extern "C" void emulator_switch(void** save, void* to);
__asm__(R"(
  .pushsection .text.emulator_switch, "axG", @progbits, emulator_switch, comdat
  .weak emulator_switch
  .hidden emulator_switch
  .type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulator_switch, . - emulator_switch
  .popsection
)");

EMULATOR_OWN inline void to_scheduler([[maybe_unused]] bool for_good = false) {
  Thread* const thread = machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &thread->fake_stack, machine.scheduler_bottom,
                                 machine.scheduler_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  emulator_switch(&thread->stack_pointer, machine.scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread->fake_stack, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
}

EMULATOR_OWN inline void to_thread(Thread* thread) {
  machine.current = thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, thread->stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(thread->fiber, __tsan_switch_to_fiber_no_sync);
#endif
  emulator_switch(&machine.scheduler_stack, thread->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Ends the launch: the scheduler drops all fibers.
[[noreturn]] EMULATOR_OWN inline void fail(const char* what, Site site) {
  machine.complaint = what;
  machine.complaint_site = site;
  to_scheduler(true);
  __builtin_unreachable();
}

[[noreturn]] EMULATOR_OWN inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
  acquire(&machine.launch_begins);
  machine.launch->call(*machine.launch);
  Thread& me = *machine.current;
  if (machine.block->waiting)
    fail("a thread exits while others of its block wait at __syncthreads", machine.block->barrier);
  const unsigned warp = me.rank / kWarp * kWarp, end = std::min(warp + kWarp, machine.threads);
  for (unsigned rank = warp; rank < end; ++rank) {
    const Thread& other = machine.thread[rank];
    if (other.state == State::in_collective && other.mask >> me.rank % kWarp & 1) {
      fail("a lane exits that is named in the mask of a warp collective others wait at", other.site);
    }
  }
  me.state = State::exited;
  --machine.block->live;
  release(&machine.launch_ends);
  to_scheduler(true);
  __builtin_unreachable();
}

EMULATOR_OWN inline void prepare(Thread& thread, unsigned rank) {
  const dim3& size = machine.launch->block;
  thread.state = State::ready;
  thread.index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
  thread.rank = rank;
  thread.warp_syncs = 0;
#if defined(__SANITIZE_THREAD__)
  // A stack that another block's thread has used would be a race; allocating it, unseen, clears its shadow.
  std::free(thread.stack);
  thread.stack = nullptr;
  const size_t number = machine.fibers_used++ % kMostFibers;
  if (number == machine.fibers.size()) machine.fibers.push_back(__tsan_create_fiber(0));
  thread.fiber = machine.fibers[number];
#endif
  if (!thread.stack && !(thread.stack = static_cast<char*>(std::aligned_alloc(64, kStack)))) throw std::bad_alloc();
  *reinterpret_cast<uint64_t*>(thread.stack) = kStackEnd;
  void** top = reinterpret_cast<void**>(thread.stack + kStack);
  *--top = nullptr;  // where fiber_main would return to; and what aligns its stack
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that emulator_switch pops
  thread.stack_pointer = top;
}

// ---- what a thread can do -------------------------------------------------------------------------------------------

EMULATOR_OWN inline const uint3& thread_index() { return machine.current->index; }
EMULATOR_OWN inline const uint3& block_index() { return machine.block->index; }
EMULATOR_OWN inline const dim3& block_size() { return machine.launch->block; }
EMULATOR_OWN inline const dim3& grid_size() { return machine.launch->grid; }

EMULATOR_OWN inline void barrier(Site site) {
  Block& block = *machine.block;
  Thread& me = *machine.current;
  if (block.live != machine.threads) fail("__syncthreads after a thread of the block has exited", site);
  if (!block.waiting) block.barrier = site;
  if (!(block.barrier == site)) fail("threads of a block wait at different __syncthreads", site);
  char* const order = &block.order[block.barriers % 2];
  release(order);
  me.state = State::at_barrier;
  me.site = site;
  if (++block.waiting < machine.threads) {
    to_scheduler();
  } else {
    for (unsigned rank = 0; rank < machine.threads; ++rank) machine.thread[rank].state = State::ready;
    block.waiting = 0;
    ++block.barriers;
  }
  acquire(order);
}

// Waits for all lanes of the mask to come to the same operation; returns what lane `source` gives or, of a ballot, a
// bit for each lane that gives 1.
EMULATOR_OWN inline uint64_t collective(Collective operation, unsigned mask, uint64_t given, unsigned source,
                                        Site site) {
  Thread& me = *machine.current;
  const unsigned lane = me.rank % kWarp, warp = me.rank - lane;
  if (!(mask >> lane & 1)) fail("the calling lane is not in the mask of its warp collective", site);
  if (!(mask >> source & 1)) fail("a shuffle reads from a lane that is not in its mask", site);
  me.state = State::in_collective;
  me.site = site;
  me.collective = operation;
  me.mask = mask;
  me.source = source;
  me.given = given;
  bool complete = true;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    if (warp + i >= machine.threads) fail("the mask of a warp collective names a lane the block does not have", site);
    const Thread& other = machine.thread[warp + i];
    if (other.state == State::exited) fail("the mask of a warp collective names a lane that has exited", site);
    if (other.state != State::in_collective || other.mask != mask) {
      complete = false;
    } else if (other.collective != operation) {
      fail("lanes of one mask meet in different warp collectives", site);
    }
  }
  if (!complete) {
    to_scheduler();
    return me.taken;
  }
  uint64_t votes = 0;
  for (unsigned i = 0; i < kWarp; ++i)
    if (mask >> i & 1) votes |= (machine.thread[warp + i].given & 1) << i;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    Thread& other = machine.thread[warp + i];
    other.taken = operation == Collective::ballot ? votes : machine.thread[warp + other.source].given;
    other.state = State::ready;
  }
  return me.taken;
}

EMULATOR_OWN inline void warp_barrier(unsigned mask, Site site) {
  Thread& me = *machine.current;
  char* const order = &machine.block->order[2 + me.rank / kWarp * 2 + me.warp_syncs++ % 2];
  release(order);
  collective(Collective::syncwarp, mask, 0, me.rank % kWarp, site);
  acquire(order);
}

template <class T>
EMULATOR_OWN T shuffle(Collective operation, unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = collective(operation, mask, bits, source, site);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

EMULATOR_OWN inline unsigned ballot(unsigned mask, bool vote, Site site) {
  return static_cast<unsigned>(collective(Collective::ballot, mask, vote, machine.current->rank % kWarp, site));
}

template <class T>
EMULATOR_OWN void check_aligned(const T* pointer, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) fail("a misaligned access", site);
}

// The block's array of that key: made by whichever thread comes first, of bytes that read as NaN.
EMULATOR_OWN inline void* shared_array(const void* key, size_t bytes, Site site) {
  Block& block = *machine.block;
  {
    const Unseen unseen;
    for (const SharedArray& array : block.shared)
      if (array.key == key) return array.data;
    block.shared_bytes += bytes;
  }
  if (block.shared_bytes > kSharedLimit) fail("more shared memory than 48 KiB", site);
  const Unseen unseen;
  void* data = nullptr;
  if (posix_memalign(&data, 128, bytes)) std::abort();
  std::memset(data, 0xff, bytes);
  block.shared.push_back({key, data});
  return data;
}

// ---- the scheduler --------------------------------------------------------------------------------------------------

inline uint64_t next_random() {  // xorshift64*
  uint64_t& x = machine.random_state;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return (x * 0x2545f4914f6cdd1d) >> 32;
}

template <class T>
void arrange(std::vector<T>& order) {
  if (machine.schedule.order != Schedule::random) return;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

template <class T>
std::vector<T> numbers(T count) {
  std::vector<T> order(count);
  for (T i = 0; i < count; ++i) order[i] = machine.schedule.order == Schedule::reverse ? count - 1 - i : i;
  return order;
}

// The symbol's name, which is the .entry in nvcc's PTX; it must be visible, or dladdr gives a neighbour's.
inline const char* symbol(const void* kernel) {
  Dl_info info;
  return dladdr(kernel, &info) && info.dli_saddr == kernel ? info.dli_sname : "(a kernel without external linkage)";
}

inline std::string text(const char* what, uint3 index) {
  return std::string(what) + " (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

inline cudaError_t failed(const std::string& what, cudaError_t error) {
  const char* const mangled = symbol(machine.launch->kernel);
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(abi::__cxa_demangle(mangled, nullptr, nullptr, &status),
                                                         std::free);
  machine.failure = what + ", kernel " + (name ? name.get() : mangled);
  machine.reports.push_back(machine.failure);
  return machine.failed_with = last_error = error;
}

// Runs the block's threads to their ends; returns what went wrong, or nothing.
inline std::string run_block(std::vector<unsigned>& order) {
  Block& block = *machine.block;
  while (block.live) {
    bool progress = false;
    arrange(order);
    for (const unsigned rank : order) {
      Thread& thread = machine.thread[rank];
      if (thread.state != State::ready) continue;
      progress = true;
      to_thread(&thread);
      if (*reinterpret_cast<uint64_t*>(thread.stack) != kStackEnd) {
        return "a thread's stack of " + std::to_string(kStack) + " bytes overflowed, " + text("block", block.index);
      }
      if (machine.complaint) {
        return machine.complaint_site.text() + ": " + machine.complaint + ", " + text("block", block.index) + ", " +
               text("thread", thread.index);
      }
    }
    if (progress) continue;
    std::string report = "deadlock, " + text("block", block.index);
    Site last{"", 0};
    for (unsigned rank = 0; rank < machine.threads; ++rank) {  // of neighbours at one place, the first
      const Thread& thread = machine.thread[rank];
      if (thread.state == State::exited || thread.site == last) continue;
      last = thread.site;
      report += "; " + last.text() + ": " + text("thread", thread.index) + " waits " +
                (thread.state == State::at_barrier ? "at __syncthreads" : "in a warp collective");
    }
    return report;
  }
  return "";
}

inline cudaError_t run(const Launch& launch) {
  const Unseen unseen;
  const std::lock_guard<std::mutex> lock(machine.mutex);
  const dim3 &grid = launch.grid, &size = launch.block;
  machine.launch = &launch;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (!launch.kernel) return failed("no such kernel", cudaErrorInvalidDeviceFunction);
  if (!threads || threads > kMostThreads || size.z > 64)
    return failed("a block of an impossible size", cudaErrorInvalidConfiguration);
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) {
    return failed("a grid of an impossible size", cudaErrorInvalidConfiguration);
  }
  if (launch.shared_bytes > kSharedLimit) return failed("shared memory of an impossible size", cudaErrorInvalidValue);
  if (machine.launches_to_failure >= 0 && machine.launches_to_failure-- == 0) {
    return failed("a failure that was asked for", cudaErrorLaunchOutOfResources);
  }
  if (machine.observe) machine.observe(launch);
  machine.threads = static_cast<unsigned>(threads);
  machine.random_state = (machine.schedule.seed + 1) * 0x9e3779b97f4a7c15;
  machine.complaint = nullptr;
  std::vector<unsigned> order = numbers(machine.threads);
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z, left_out = count - std::min(count, machine.last_blocks);
  std::vector<uint64_t> blocks = numbers(count - left_out);
  arrange(blocks);
  std::string failure;
#if defined(__SANITIZE_THREAD__)
  machine.scheduler_fiber = __tsan_get_current_fiber();
#endif
  machine.fibers_used = 0;
  release(&machine.launch_begins);
  for (const uint64_t number : blocks) {
    const std::unique_ptr<Block> block(new Block{});
    const uint64_t place = left_out + number, row = place / grid.x;
    block->index = {static_cast<unsigned>(place % grid.x), static_cast<unsigned>(row % grid.y),
                    static_cast<unsigned>(row / grid.y)};
    block->live = machine.threads;
    block->shared_bytes = launch.shared_bytes;
    machine.block = block.get();
    for (unsigned rank = 0; rank < machine.threads; ++rank) prepare(machine.thread[rank], rank);
    failure = run_block(order);
    for (const SharedArray& array : block->shared) std::free(array.data);
    if (!failure.empty()) break;
  }
  acquire(&machine.launch_ends);
  if (failure.empty()) return cudaSuccess;
  // Fibers that were dropped left their frames' redzones, and calls that never return.
#if defined(__SANITIZE_ADDRESS__)
  for (unsigned rank = 0; rank < machine.threads; ++rank)
    ASAN_UNPOISON_MEMORY_REGION(machine.thread[rank].stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  for (void* const fiber : machine.fibers) __tsan_destroy_fiber(fiber);
  machine.fibers.clear();
#endif
  return failed(failure, cudaErrorLaunchFailure);
}

}  // namespace emulator
