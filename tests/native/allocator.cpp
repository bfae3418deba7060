// malloc and its kin, and the start of threads, put before those of the C library: they count what is alive, and fail
// when told.
//
// Linked into memory.cpp, and by LD_PRELOAD put before Python's (test_memory.py). Only calls of the thread that asked
// for it fail.
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

extern "C" {

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

#define LOCAL static thread_local __attribute__((tls_model("initial-exec")))  // any other model may itself allocate
LOCAL bool armed = false, onwards = false;
LOCAL size_t at_least = 0;
LOCAL int64_t left = 0, seen = 0;
static std::atomic<int64_t> alive{0};

// From now on the k-th allocation of `bytes` or more by this thread fails, and with `and_later` all that follow.
void allocator_arm(int64_t k, bool and_later, size_t bytes) {
  at_least = bytes;
  left = k;
  seen = 0;
  onwards = and_later;
  armed = true;
}
// Ends that. Returns how many allocations were asked for meanwhile.
int64_t allocator_disarm() {
  armed = false;
  return seen;
}
int64_t allocator_alive() { return alive; }

// call(function, arguments, keywords), armed meanwhile: PyObject_Call, so that nothing of the interpreter around it is
// counted.
void* allocator_call(int64_t k, bool and_later, size_t bytes, void* (*call)(void*, void*, void*), void* function,
                     void* arguments) {
  allocator_arm(k, and_later, bytes);
  void* const result = call(function, arguments, nullptr);
  allocator_disarm();
  return result;
}
int64_t allocator_seen() { return seen; }

static bool fails(size_t size) {
  if (!armed || size < at_least) return false;
  const int64_t index = seen++;
  return index == left || (onwards && index > left);
}
static void* counted(void* p) {
  if (p) alive.fetch_add(1, std::memory_order_relaxed);
  return p;
}
static void* failed() {
  errno = ENOMEM;
  return nullptr;
}

void* malloc(size_t size) noexcept { return fails(size) ? failed() : counted(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) noexcept {
  return fails(count * size) ? failed() : counted(__libc_calloc(count, size));
}
void* realloc(void* p, size_t size) noexcept {
  if (fails(size)) return failed();
  void* const moved = __libc_realloc(p, size);
  if (!p) counted(moved);
  if (p && !size && !moved) alive.fetch_sub(1, std::memory_order_relaxed);
  return moved;
}
void* memalign(size_t alignment, size_t size) noexcept {
  return fails(size) ? failed() : counted(__libc_memalign(alignment, size));
}
void* aligned_alloc(size_t alignment, size_t size) noexcept { return memalign(alignment, size); }
int posix_memalign(void** to, size_t alignment, size_t size) noexcept {
  void* const p = memalign(alignment, size);
  if (!p) return ENOMEM;
  *to = p;
  return 0;
}
void free(void* p) noexcept {
  if (p) alive.fetch_sub(1, std::memory_order_relaxed);
  __libc_free(p);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                   void* argument) noexcept {
  if (fails(SIZE_MAX)) return EAGAIN;
  static const auto real = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  return real(thread, attributes, start, argument);
}
}
