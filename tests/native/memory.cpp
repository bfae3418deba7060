// Calls that get no memory, and calls on little stack: memory SCENE, one of those at the end.
//
// Exit code 0 says that all was right.
#include <pthread.h>
#include <sys/wait.h>

#include <new>

#include "allocator.cpp"
#include "scene.h"

namespace native {
namespace {

void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// The first problems that random bytes make, and two that need sums in several passes.
std::vector<std::unique_ptr<Memory>> some_problems() {
  std::vector<std::unique_ptr<Memory>> all;
  for (uint32_t seed = 0; seed < 200; ++seed) {
    uint8_t bytes[128];
    for (size_t i = 0; i < sizeof bytes; ++i) bytes[i] = static_cast<uint8_t>(seed * 2654435761u * (i + 1) >> 13);
    Bytes from(bytes, sizeof bytes);
    all.push_back(std::make_unique<Memory>(draw(from), seed));
  }
  for (DType dtype : {DType::f32, DType::f64})
    all.push_back(std::make_unique<Memory>(outer(dtype, 40, 60, 257, true), 1));
  return all;
}

// Whether a call ends in std::bad_alloc.
bool runs_out(Memory& memory, const Isa& isa) {
  try {
    carry_out(memory.problem(), isa);
    return false;
  } catch (const std::bad_alloc&) {
    return true;
  }
}

// Fails each allocation in turn, alone and with all after it: the call throws std::bad_alloc and leaves nothing behind,
// or does with less. Returns how many there are.
int64_t fail_each(Memory& memory, const Isa& isa, const std::vector<emulator::Bytes>& wanted) {
  for (const bool and_later : {false, true}) {
    for (int64_t k = 0;; ++k) {
      const int64_t before = allocator_alive();
      allocator_arm(k, and_later, 0);
      const bool thrown = runs_out(memory, isa);
      const int64_t asked = allocator_disarm();
      require(allocator_alive() == before, "memory was left behind");
      if (!thrown) memory.check(isa);
      require(memory.results(isa) == wanted, "the call after a failed one is wrong");
      if (asked > k) continue;
      require(!thrown, "std::bad_alloc where nothing failed");
      if (and_later) return asked;
      break;
    }
  }
  return 0;
}

void allocations() {
  set_num_threads(1);
  int64_t total = 0;
  const auto problems = some_problems();
  for (size_t i = 0; i < problems.size(); ++i) {
    const Isa& isa = *sets()[i % sets().size()];
    const auto wanted = problems[i]->results(isa);
    total += fail_each(*problems[i], isa, wanted);
  }
  require(total > 30, "too few allocations for a test");
}

// The first call of a process with threads: each k in a child, whose pool is new. Fewer threads must do as well.
void first_threads() {
  set_num_threads(4);
  Memory memory(outer(DType::f32, 40, 60, 257, true), 1);
  const Isa& isa = *sets()[0];
  const auto wanted = [&] {
    set_num_threads(1);
    auto found = memory.results(isa);
    set_num_threads(4);
    return found;
  }();
  int64_t right = 0;
  for (int64_t k = 0;; ++k) {
    for (const bool and_later : {false, true}) {
      const pid_t child = fork();
      if (child == 0) {
        alarm(60);
        allocator_arm(k, and_later, 0);
        const bool thrown = runs_out(memory, isa);
        const bool reached = allocator_disarm() > k;
        if (!thrown) memory.check(isa);
        for (int i = 0; i < 3; ++i) require(memory.results(isa) == wanted, "the call after a failed one is wrong");
        const int64_t before = allocator_alive();
        carry_out(memory.problem(), isa);
        require(allocator_alive() == before, "calls leave memory behind");
        std::_Exit(!reached ? 1 : thrown ? 2 : 3);
      }
      int status = 0;
      require(waitpid(child, &status, 0) == child && WIFEXITED(status), "a child did not end well");
      if (WEXITSTATUS(status) == 1) {
        require(k > 8 && right > 0, "too few allocations for a test");  // the sums, the pool, two for each thread
        return;
      }
      right += WEXITSTATUS(status) == 3;
    }
  }
}

// The caller's thread and the workers' have 64 KiB each; musl's have 128.
void small_stacks() {
  pthread_attr_t attributes;
  require(!pthread_attr_init(&attributes) && !pthread_attr_setstacksize(&attributes, 64 << 10) &&
              !pthread_setattr_default_np(&attributes),
          "no such threads");
  for (const bool backward : {false, true}) {
    Memory memory(outer(DType::f64, 4096, 1, 600, backward), 1);
    const auto call = +[](void* m) -> void* {
      for (const Isa* isa : sets()) {
        carry_out(static_cast<Memory*>(m)->problem(), *isa);
        static_cast<Memory*>(m)->check(*isa);
      }
      return nullptr;
    };
    for (int threads : {1, 3}) {
      set_num_threads(threads);
      pthread_t thread;
      require(!pthread_create(&thread, &attributes, call, &memory) && !pthread_join(thread, nullptr), "no thread");
    }
  }
}

constexpr Scene kScenes[] = {
    {"allocations", allocations}, {"first threads", first_threads}, {"small stacks", small_stacks}};

}  // namespace
}  // namespace native

int main(int count, char** arguments) { return native::play("memory", native::kScenes, count, arguments); }
