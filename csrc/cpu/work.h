// How a call's work is shared out: tasks, the slices that long tasks are cut into, and the memory that threads work in.
//
// What lives elsewhere: the threads (parallel.h); which tasks there are, and what is done in them (sum/).
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fusionsum {

constexpr int64_t kCacheLine = 128;  // two, which some processors fetch together

// Memory for one call. Its owner is whoever makes the call: planners say how much they need, kernels never allocate.
class Workspace {
 public:
  // At least so many bytes from a cache line on; what an earlier call of this function returned is lost. Throws
  // std::bad_alloc.
  char* reserve(int64_t bytes);

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  alignas(kCacheLine) char small_[4096];  // enough for small calls, of which an allocation is a tenth
  std::unique_ptr<char, Free> large_;
  int64_t size_ = sizeof small_;
};

constexpr int64_t in_cache_lines(int64_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// Asks for memory in huge pages, where the system leaves that to programs: those that lie whole within the block, so
// that it takes no more than without. Scratch memory is read across thousands of small pages: all pairs of n = 512 take
// 0.9 of the time where pages are looked up twice (a virtual machine on a Xeon). And large results lie on pages that
// the system has yet to clear, 4 KB at a time: two gradients of 128 MiB, forward and backward, take 0.44 of the time.
void ask_for_huge_pages(void* block, int64_t bytes);

// Whether memory is there for the page of an address; true where the system does not say.
bool is_mapped(const void* address);

// Tasks may run in any order and at the same time; the slices of one task run in order.
struct Work {
  int64_t tasks, slices;
  int64_t slice_cost;  // of one slice of one task, in entries of operands
  int threads;         // at most, as `threads_for` says
  char* scratch;       // threads x scratch_bytes
  int64_t scratch_bytes;
  void (*slice)(const void* context, int64_t task, int64_t slice, char* scratch);  // must not throw
  const void* context;
};

// Done by the calling thread between two looks for Ctrl-C: a tenth of a second with the slowest activation.
constexpr int64_t kPauseCost = 1 << 26;

int threads_for(int64_t tasks);

// `interrupted` is asked between slices, by the calling thread; when it returns true the rest is left undone, and so it
// returns false.
bool carry_out(const Work& work, bool (*interrupted)());

}  // namespace fusionsum
