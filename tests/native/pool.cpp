// The pool of csrc/cpu/parallel.cpp put to what a process does to it: pool SCENE, one of those at the end.
//
// Exit code 0 says that all was right. The scenes "race" and "leak" do wrong themselves, for a test that sanitizers see
// it.
#include <sys/wait.h>

#include <atomic>
#include <thread>

#include "scene.h"

namespace native {
namespace {

// parallel_for with any callable.
template <class Body>
void in_parallel(int64_t count, const Body& body) {
  parallel_for(
      count, [](int64_t i, void* context) { (*static_cast<const Body*>(context))(i); }, const_cast<Body*>(&body));
}

void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// From within a body: all of it is done, by the body's own thread.
void nested_call(std::atomic<int64_t>& done) {
  const auto here = std::this_thread::get_id();
  in_parallel(16, [&](int64_t i) {
    require(std::this_thread::get_id() == here, "a nested call left its thread");
    in_parallel(3, [&](int64_t j) { done += 3 * i + j; });
  });
}
constexpr int64_t kNested = 48 * 47 / 2;

void nested() {
  for (int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    for (int64_t count : {2, 100, 1}) {
      std::atomic<int64_t> done{0};
      in_parallel(count, [&](int64_t) { nested_call(done); });
      require(done == count * kNested, "nested calls did not do it all");
    }
  }
}

// A second caller works alone, and is within a body too: its nested call must not take the pool when that becomes free.
void nested_in_second_caller() {
  set_num_threads(2);
  std::atomic<int> stage{0};
  const auto wait_for = [&](int wanted) {
    while (stage < wanted) std::this_thread::yield();
  };
  std::thread first([&] {
    in_parallel(2, [&](int64_t) {
      if (stage == 0) stage = 1;
      wait_for(2);
    });
    stage = 3;
  });
  wait_for(1);
  std::atomic<int64_t> done{0};
  in_parallel(2, [&](int64_t i) {
    if (i == 0) stage = 2;
    wait_for(3);
    nested_call(done);
  });
  first.join();
  require(done == 2 * kNested, "nested calls did not do it all");
}

// What stands for torch's symbols has two threads and would nest.
void nested_in_torch() {
  static std::atomic<int> calls{0};
  using Range = void (*)(int64_t, int64_t, void*);
  const auto torch = +[](int64_t begin, int64_t end, int64_t, Range body, void* context) -> int32_t {
    ++calls;
    std::thread other(body, begin, (begin + end) / 2, context);
    body((begin + end) / 2, end, context);
    other.join();
    return 0;
  };
  const auto threads = +[](uint32_t* count) -> int32_t {
    *count = 2;
    return 0;
  };
  use_torch_pool(reinterpret_cast<void*>(torch), reinterpret_cast<void*>(threads));
  std::atomic<int64_t> done{0};
  in_parallel(10, [&](int64_t) { nested_call(done); });
  require(done == 10 * kNested, "nested calls did not do it all");
  require(calls == 1, "a nested call went to torch's pool");
}

std::atomic<int64_t> helped{0};  // bodies on another thread than the caller's

// Sums and kernels on memory of one's own, again and again; all results must be the first's.
void call(uint32_t seed, int repeats) {
  std::vector<std::unique_ptr<Memory>> memories;
  std::vector<std::vector<emulator::Bytes>> wanted;
  for (uint32_t k = 0; k < 3; ++k) {
    memories.push_back(std::make_unique<Memory>(outer(DType::f32, 60, 3, 700, k % 2), seed + k));
    wanted.push_back(memories[k]->results(*sets()[(seed + k) % sets().size()]));
    memories[k]->check(*sets()[(seed + k) % sets().size()]);
  }
  for (int repeat = 0; repeat < repeats; ++repeat) {
    std::vector<int64_t> square(1000, -1);
    const auto here = std::this_thread::get_id();
    in_parallel(1000, [&](int64_t i) {
      square[i] = i * i;
      helped += std::this_thread::get_id() != here;
    });
    for (int64_t i = 0; i < 1000; ++i) require(square[i] == i * i, "parallel_for left something out");
    const uint32_t k = repeat % 3;
    require(memories[k]->results(*sets()[(seed + k) % sets().size()]) == wanted[k], "other bits beside other callers");
  }
}

// Several threads call at once, while another sets the number of threads.
void callers() {
  constexpr int kRepeats = 20;
  for (int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    std::vector<std::thread> all;
    for (uint32_t i = 0; i < 3; ++i) all.emplace_back(call, i, kRepeats);
    for (int i = 0; i < 20 * kRepeats; ++i) {
      set_num_threads(1 + (i + threads) % 8);
      require(get_num_threads() > 0, "no threads");
      std::this_thread::yield();
    }
    for (std::thread& one : all) one.join();
  }
  require(helped > 0, "no worker ever helped");
}

// In the child: a pool of its own, and another generation. It ends as programs do, leak check included.
void fork_and_call(int generations) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    call(7, 3);
    if (generations > 1) fork_and_call(generations - 1);
    std::exit(0);
  }
  int status = 0;
  require(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "a child did not end well");
}

// Forks while the pool is busy; the children fork too.
void forks() {
  set_num_threads(3);
  sets();
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) in_parallel(1000, [](int64_t) {});
  });
  for (int i = 0; i < 3; ++i) {
    call(1, 1);
    fork_and_call(2);
  }
  stop = true;
  other.join();
  call(1, 3);
}

void race() {
  set_num_threads(2);
  std::atomic<int> met{0};
  int64_t sum = 0;
  in_parallel(2, [&](int64_t i) {
    ++met;
    while (met < 2) std::this_thread::yield();
    sum += i;
  });
  require(sum <= 1, "a sum that was never written");
}

void leak() {
  set_num_threads(2);
  static std::atomic<char*> lost;
  in_parallel(10, [&](int64_t) { lost = new char[100]; });
  lost = nullptr;
}

constexpr Scene kScenes[] = {{"nested", nested},
                             {"nested in a second caller", nested_in_second_caller},
                             {"nested in torch's pool", nested_in_torch},
                             {"callers", callers},
                             {"forks", forks},
                             {"race", race},
                             {"leak", leak}};

}  // namespace
}  // namespace native

int main(int count, char** arguments) { return native::play("pool", native::kScenes, count, arguments); }
