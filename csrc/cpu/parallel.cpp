// Threads. libtorch's pool is used through its exported C symbol, so that one pool serves both and
// torch.set_num_threads is honoured; else a lazy pool of our own: workers are started by the first call that needs them
// and sleep between calls.
//
// After fork() a child has neither pool's threads: our pool is abandoned (leaked: its locks may be held by threads that
// no longer exist) and made anew, and torch's, which hangs in a child of a threaded parent, is not used again.
#include "parallel.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fusionsum {
namespace {

// Whether this thread is within a body, of whichever pool: a nested call then runs serially. If it did not, the thread
// that holds turn_ would try to lock it again, which the standard leaves undefined.
thread_local bool inside = false;

// Threads take ranges, not single indices: what a thread read in one call, the next call finds in that core's cache.
struct Job {
  int64_t count;
  void (*body)(int64_t, void*);
  void* context;
  int64_t ranges = 1;
  std::atomic<int64_t> next{0};

  void work(int64_t begin, int64_t end) {
    const bool nested = inside;
    inside = true;
    for (int64_t i = begin; i < end; ++i) body(i, context);
    inside = nested;
  }
  void work() {
    for (int64_t r; (r = next.fetch_add(1, std::memory_order_relaxed)) < ranges;)
      work(r * count / ranges, (r + 1) * count / ranges);
  }
};

class Pool {
 public:
  // Runs the job on up to `threads` threads, the caller's included. One job at a time: a second caller works alone.
  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {
      job.work();
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const int wanted = static_cast<int>(std::min<int64_t>(threads, job.count)) - 1;
      while (workers_ < wanted && start()) ++workers_;
      job.ranges = wanted + 1;
      job_ = &job;
      invited_ = std::min(wanted, workers_);
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    invited_ = 0;  // whoever has not begun need not
    idle_.wait(lock, [&] { return working_ == 0; });
    job_ = nullptr;
  }

 private:
  bool start() {
    try {
      std::thread([this] { serve(); }).detach();
      return true;
    } catch (const std::exception&) {
      return false;  // no more threads to be had, or no memory for one: fewer do the same work
    }
  }

  void serve() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen && (invited_ > 0 || job_ == nullptr); });
      seen = generation_;
      if (invited_ == 0 || job_ == nullptr) continue;
      --invited_;
      ++working_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--working_ == 0) idle_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  int workers_ = 0, invited_ = 0, working_ = 0;
  uint64_t generation_ = 0;
};

using TorchParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
using TorchNumThreads = int32_t (*)(uint32_t*);

std::atomic<TorchParallelFor> torch_parallel_for{nullptr};
std::atomic<TorchNumThreads> torch_num_threads{nullptr};
std::atomic<int> own_threads{0};  // 0: not asked for yet
std::atomic<Pool*> pool{nullptr};

// Only the flags and the pointer: nothing that may be locked is touched.
void after_fork_in_child() {
  if (uses_torch_pool()) own_threads.store(get_num_threads());
  torch_parallel_for.store(nullptr);
  pool.store(nullptr);
}
void mind_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
  static_cast<void>(registered);
}

Pool& own_pool() {
  mind_forks();
  Pool* current = pool.load();
  if (!current) {
    Pool* fresh = new Pool;  // never deleted: its workers outlive every call
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

int from_environment() {
  for (const char* name : {"FUSIONSUM_NUM_THREADS", "OMP_NUM_THREADS"}) {
    const char* text = std::getenv(name);
    const int count = text ? std::atoi(text) : 0;
    if (count > 0) return count;
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

void parallel_for(int64_t count, void (*body)(int64_t, void*), void* context) {
  Job job{count, body, context};
  const TorchParallelFor torch = torch_parallel_for.load();
  if (count <= 1 || inside) {
    job.work();
  } else if (torch) {
    torch(0, count, 1, [](int64_t begin, int64_t end, void* j) { static_cast<Job*>(j)->work(begin, end); }, &job);
  } else if (const int threads = get_num_threads(); threads > 1) {
    own_pool().run(job, threads);
  } else {
    job.work();
  }
}

void use_torch_pool(void* parallel, void* num_threads) {
  mind_forks();
  torch_num_threads.store(reinterpret_cast<TorchNumThreads>(num_threads));
  torch_parallel_for.store(reinterpret_cast<TorchParallelFor>(parallel));
}
bool uses_torch_pool() { return torch_parallel_for.load() != nullptr; }

void set_num_threads(int count) { own_threads.store(count); }

int get_num_threads() {
  uint32_t count = 0;
  const TorchNumThreads torch = torch_num_threads.load();
  if (uses_torch_pool() && torch && torch(&count) == 0) return static_cast<int>(count);
  int own = own_threads.load();
  if (own == 0) {
    own = from_environment();
    own_threads.store(own);
  }
  return own;
}

}  // namespace fusionsum
