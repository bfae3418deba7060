// The emulated library's fusionsum_cuda: the real one, with what tests want to know written down on the way.
//
// The library's sources are compiled with -Dfusionsum_cuda=fusionsum_cuda_product, so that this file can stand before
// it. What lives here: recording of runs and launches, cases to files, and the C functions that emulation.py calls.
// Recording holds one call of the library at a time; the records last until emulator_record.
#include <deque>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "case.h"
#include "cuda/cuda.h"
#include "cuda/gpu.h"

extern "C" const fusionsum::CudaLibrary* fusionsum_cuda_product();

namespace emulator {
namespace {

// emulation.py mirrors this struct.
struct LaunchRecord {
  const char* kernel;  // mangled
  uint32_t grid[3], block[3];
  const void* parameters;
  int64_t bytes;
  const void* stream;
  int64_t shared_bytes;
  int32_t device;
};

struct Run {
  std::vector<Span> spans;
  std::vector<LaunchRecord> launches;
  std::deque<Bytes> copies;  // of parameters, and of a step's arrays
};

struct Recorder {
  std::mutex mutex;
  bool recording = false;
  std::deque<Run> runs;
  std::string directory;  // for cases; empty: write none
  int64_t cases = 0;
  std::string text;  // what was returned last
} recorder;

void observe(const Launch& launch) {
  Run& run = recorder.runs.back();
  const char* const parameters = static_cast<const char*>(launch.parameters);
  run.copies.emplace_back(parameters, parameters + launch.bytes);
  const dim3 &grid = launch.grid, &block = launch.block;
  run.launches.push_back({symbol(launch.kernel),
                          {grid.x, grid.y, grid.z},
                          {block.x, block.y, block.z},
                          run.copies.back().data(),
                          static_cast<int64_t>(launch.bytes),
                          launch.stream,
                          static_cast<int64_t>(launch.shared_bytes),
                          current_device});
}

// A plan and, before it, what the records need of the problem when it is executed.
struct alignas(16) Planned {
  Problem problem;
  int64_t workspace_bytes;

  void* plan() { return this + 1; }
  const void* plan() const { return this + 1; }
};

const char* plan(const Problem* problem, void* to, int64_t* workspace_bytes) noexcept {
  Planned& planned = *new (to) Planned{*problem, 0};
  const char* const error = fusionsum_cuda_product()->plan(problem, planned.plan(), workspace_bytes);
  planned.workspace_bytes = *workspace_bytes;
  return error;
}

template <class C>
const char* write_next(const C& c) noexcept {
  try {
    write_case(recorder.directory + "/" + std::to_string(recorder.cases++) + ".case", c);
  } catch (const std::exception& exception) {
    recorder.text = exception.what();
    return recorder.text.c_str();
  }
  return nullptr;
}

const char* execute(const void* from, int device, void* stream, void* workspace) noexcept {
  const auto* const product = fusionsum_cuda_product();
  const Planned& planned = *static_cast<const Planned*>(from);
  std::unique_lock<std::mutex> lock(recorder.mutex);
  if (!recorder.recording && recorder.directory.empty()) {
    lock.unlock();
    return product->execute(planned.plan(), device, stream, workspace);
  }
  Case c{planned.problem, {}, {}};
  if (recorder.recording) {
    std::vector<Span>& spans = recorder.runs.emplace_back().spans;
    for (const Array& array : arrays_of(planned.problem)) spans.push_back(array.span(planned.problem));
    if (planned.workspace_bytes)
      spans.push_back({-1, Role::workspace, static_cast<char*>(workspace), planned.workspace_bytes, nullptr, nullptr});
    machine.observe = observe;
  }
  if (!recorder.directory.empty()) c.before = c.images(false);
  const char* const error = product->execute(planned.plan(), device, stream, workspace);
  machine.observe = nullptr;
  if (!error && !recorder.directory.empty()) {
    c.after = c.images(true);
    return write_next(c);
  }
  return error;
}

const char* step(const Chunk* chunk, int device, void* stream, void* workspace) noexcept {
  const auto* const product = fusionsum_cuda_product();
  std::unique_lock<std::mutex> lock(recorder.mutex);
  if (!recorder.recording && recorder.directory.empty()) {
    lock.unlock();
    return product->step(chunk, device, stream, workspace);
  }
  StepCase c{*chunk, StepCase::images(*chunk), {}};
  if (recorder.recording) {
    Run& run = recorder.runs.emplace_back();
    for (const StepArray& array : arrays_of(*chunk)) {
      const auto number = static_cast<int32_t>(run.spans.size());
      const void* const before = run.copies.emplace_back(c.before[static_cast<size_t>(number)]).data();
      run.spans.push_back({number, array.role, array.begin(*chunk), array.bytes, before, nullptr});
    }
    if (const int64_t bytes = product->step_workspace(chunk))
      run.spans.push_back({-1, Role::workspace, static_cast<char*>(workspace), bytes, nullptr, nullptr});
    machine.observe = observe;
  }
  const char* const error = product->step(chunk, device, stream, workspace);
  machine.observe = nullptr;
  c.after = StepCase::images(*chunk);
  if (recorder.recording) {
    Run& run = recorder.runs.back();
    for (size_t i = 0; i < c.after.size(); ++i) run.spans[i].after = run.copies.emplace_back(c.after[i]).data();
  }
  return error || recorder.directory.empty() ? error : write_next(c);
}

}  // namespace
}  // namespace emulator

extern "C" {
using emulator::machine;
using emulator::recorder;

const fusionsum::CudaLibrary* fusionsum_cuda() {
  const fusionsum::CudaLibrary& product = *fusionsum_cuda_product();
  static const fusionsum::CudaLibrary library{
      product.unavailable,    product.plan_bytes + static_cast<int64_t>(sizeof(emulator::Planned)),
      emulator::plan,         emulator::execute,
      product.step_workspace, emulator::step};
  return &library;
}

// False for a name that is no schedule.
bool emulator_schedule(const char* name) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  return machine.schedule.parse(name);
}

// The device that is current for this thread from now on.
void emulator_set_device(int device) { emulator::current_device = device; }

// After how many launches from now on one fails, and runs nothing; negative: none.
void emulator_fail_after(int64_t launches) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.launches_to_failure = launches;
}

// How many blocks of each grid run from now on, the last of it; negative: all.
void emulator_run_last(int64_t blocks) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.last_blocks = static_cast<uint64_t>(blocks);
}

// What a capture of a graph would let this thread do: 0 as long as nobody has asked for more.
int emulator_capture_mode() { return emulator::capture_mode; }

// The reports since the last call, one a line.
const char* emulator_reports() {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  recorder.text.clear();
  for (const std::string& report : machine.reports) recorder.text += report + "\n";
  machine.reports.clear();
  return recorder.text.c_str();
}

// Forgets what was recorded; and whether to record from now on.
void emulator_record(bool on) {
  const std::lock_guard<std::mutex> lock(recorder.mutex);
  recorder.runs.clear();
  recorder.recording = on;
}
int64_t emulator_runs() { return static_cast<int64_t>(recorder.runs.size()); }
const emulator::LaunchRecord* emulator_launches(int64_t run, int64_t* count) {
  const auto& launches = recorder.runs.at(static_cast<size_t>(run)).launches;
  *count = static_cast<int64_t>(launches.size());
  return launches.data();
}
const emulator::Span* emulator_spans(int64_t run, int64_t* count) {
  const auto& spans = recorder.runs.at(static_cast<size_t>(run)).spans;
  *count = static_cast<int64_t>(spans.size());
  return spans.data();
}

// From now on each run that succeeds is written to the directory, as 0.case, 1.case, ...; "" ends that.
void emulator_write_cases(const char* directory) {
  const std::lock_guard<std::mutex> lock(recorder.mutex);
  recorder.directory = directory;
  recorder.cases = 0;
}
}
