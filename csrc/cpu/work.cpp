// The loop over tasks and slices. Which thread does which task depends on the number of threads; what a task computes
// does not.
#include "work.h"

#include <algorithm>
#include <new>

#include "parallel.h"

namespace fusionsum {
namespace {

// The tasks between two looks for Ctrl-C, as `threads` ranges: each has scratch memory of its own. Ranges, not single
// tasks: a thread finds in its cache what it read in an earlier call.
struct Batch {
  const Work* work;
  int64_t first_task, tasks, slice;
  int threads;
};

void do_range(int64_t thread, void* context) {
  const Batch& batch = *static_cast<const Batch*>(context);
  const Work& work = *batch.work;
  const int64_t begin = batch.first_task + thread * batch.tasks / batch.threads;
  const int64_t end = batch.first_task + (thread + 1) * batch.tasks / batch.threads;
  for (int64_t task = begin; task < end; ++task)
    work.slice(work.context, task, batch.slice, work.scratch + thread * work.scratch_bytes);
}

}  // namespace

char* Workspace::reserve(int64_t bytes) {
  if (bytes > size_) {
    large_.reset();
    size_ = sizeof small_;
    bytes = in_cache_lines(bytes);
    large_.reset(static_cast<char*>(std::aligned_alloc(kCacheLine, static_cast<size_t>(bytes))));
    if (!large_) throw std::bad_alloc();
    size_ = bytes;
  }
  return large_ ? large_.get() : small_;
}

int threads_for(int64_t tasks) {
  return tasks == 1 ? 1 : static_cast<int>(std::min<int64_t>(get_num_threads(), tasks));
}

bool carry_out(const Work& work, bool (*interrupted)()) {
  const int64_t at_once = std::max<int64_t>(work.threads, kPauseCost / work.slice_cost);
  Batch batch{&work, 0, 0, 0, 1};
  for (batch.slice = 0; batch.slice < work.slices; ++batch.slice) {
    for (batch.first_task = 0; batch.first_task < work.tasks; batch.first_task += at_once) {
      if ((batch.slice || batch.first_task) && interrupted()) return false;
      batch.tasks = std::min(at_once, work.tasks - batch.first_task);
      batch.threads = static_cast<int>(std::min<int64_t>(work.threads, batch.tasks));
      parallel_for(batch.threads, do_range, &batch);
    }
  }
  return true;
}

}  // namespace fusionsum
