// Replays cases (case.h) under sanitizers: driver [--schedule NAME]... CASE...
//
// Each array is a heap block of exactly its span, aligned as it was when recorded, and each gradient starts as anything
// but what is expected. Prints a line per case and schedule; exits with 1 if any bit differs or the emulator reports an
// error. The sanitizers end the program by themselves.
#include <cstdio>
#include <cstring>

#include "case.h"
#include "cuda/cuda.h"
#include "cuda/gpu.h"

namespace emulator {
namespace {

constexpr uintptr_t kAlignment = 64;

struct Block {
  char *base, *begin;

  Block(size_t bytes, uintptr_t shift) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, shift + bytes)) throw std::bad_alloc();
    base = static_cast<char*>(memory);
    begin = base + shift;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(base, shift / 8 * 8);
#endif
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { std::free(base); }
};

// The same of a step of scores, all of whose arrays may be read.
std::string replay(const StepCase& c) {
  Chunk chunk = c.chunk;
  const std::vector<StepArray> arrays = arrays_of(c.chunk);
  std::vector<std::unique_ptr<Block>> blocks;
  for (size_t i = 0; i < arrays.size(); ++i) {
    blocks.emplace_back(
        new Block(c.before[i].size(), reinterpret_cast<uintptr_t>(arrays[i].begin(c.chunk)) % kAlignment));
    std::copy(c.before[i].begin(), c.before[i].end(), blocks[i]->begin);
    arrays[i].point_to(chunk, blocks[i]->begin);
  }
  const fusionsum::CudaLibrary& library = *fusionsum_cuda();
  const auto bytes = static_cast<size_t>(library.step_workspace(&chunk));
  Block workspace(bytes, 0);
  std::memset(workspace.begin, 0xff, bytes);
  if (const char* error = library.step(&chunk, 0, nullptr, workspace.begin)) return error;
  for (size_t i = 0; i < arrays.size(); ++i)
    if (std::memcmp(blocks[i]->begin, c.after[i].data(), c.after[i].size()))
      return "array " + std::to_string(i) + " of the step differs";
  return "";
}

// What went wrong, or nothing.
std::string replay(const Case& c) {
  Problem problem = c.problem;
  const std::vector<Array> arrays = arrays_of(c.problem);
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Bytes> expected = c.before;  // between a gradient's entries nothing may change
  for (size_t i = 0; i < arrays.size(); ++i) {
    const Array& array = arrays[i];
    const Span span = array.span(c.problem);
    const int64_t origin = static_cast<char*>(array.pointer(c.problem)) - span.begin;
    blocks.emplace_back(new Block(expected[i].size(), reinterpret_cast<uintptr_t>(span.begin) % kAlignment));
    char* const begin = blocks.back()->begin;
    std::copy(expected[i].begin(), expected[i].end(), begin);
    if (array.role == Role::grad && span.bytes) {
      array.for_each_entry(c.problem, [&](int64_t offset) {
        for (int64_t at = origin + offset; at < origin + offset + array.item; ++at) {
          expected[i][at] = c.after[i][at];
          begin[at] = static_cast<char>(~expected[i][at]);
        }
      });
    }
    array.point_to(problem, begin + origin);
  }
  const fusionsum::CudaLibrary& library = *fusionsum_cuda();
  Block plan(static_cast<size_t>(library.plan_bytes), 0);
  int64_t bytes = 0;
  if (const char* error = library.plan(&problem, plan.begin, &bytes)) return error;
  Block workspace(static_cast<size_t>(bytes), 0);
  std::memset(workspace.begin, 0xff, static_cast<size_t>(bytes));
  if (const char* error = library.execute(plan.begin, 0, nullptr, workspace.begin)) return error;
  for (size_t i = 0; i < arrays.size(); ++i) {
    for (size_t at = 0; at < expected[i].size(); ++at) {
      if (blocks[i]->begin[at] == expected[i][at]) continue;
      static const char* const kRoles[] = {"data", "mask", "gradient"};
      return std::string(kRoles[static_cast<int>(arrays[i].role)]) + " of operand " +
             std::to_string(arrays[i].operand) + " differs at byte " + std::to_string(at) + " of " +
             std::to_string(expected[i].size());
    }
  }
  return "";
}

}  // namespace
}  // namespace emulator

int main(int count, char** arguments) {
  std::vector<std::string> schedules, paths;
  for (int i = 1; i < count; ++i) {
    if (std::string(arguments[i]) == "--schedule" && i + 1 < count) {
      schedules.push_back(arguments[++i]);
    } else {
      paths.push_back(arguments[i]);
    }
  }
  bool all_well = !paths.empty();
  for (const std::string& path : paths) {
    emulator::Case of_sum{};
    emulator::StepCase of_step{};
    const bool is_step = emulator::read_case(path, of_step);
    if (!is_step && !emulator::read_case(path, of_sum)) throw std::runtime_error(path + " is not a case");
    for (const std::string& schedule : schedules) {
      if (!emulator::machine.schedule.parse(schedule)) throw std::invalid_argument(schedule + " is not a schedule");
      std::printf("%s %s ", path.c_str(), schedule.c_str());
      std::fflush(stdout);  // a sanitizer may end the program
      const std::string error = is_step ? emulator::replay(of_step) : emulator::replay(of_sum);
      std::printf("%s\n", error.empty() ? "ok" : error.c_str());
      all_well = all_well && error.empty();
    }
  }
  return all_well && !schedules.empty() ? 0 : 1;
}
