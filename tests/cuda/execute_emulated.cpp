// What the tests of the CUDA kernels link in the place of csrc/bindings/execute.cpp: arrays, which are the CPU's, go to
// the CUDA library that use_cuda was given, an emulation (emulation.py). The module that this makes has no kernels of
// the CPU.
#include <stdexcept>
#include <vector>

#include "bindings/execute.h"
#include "cuda/cuda.h"

namespace fusionsum {

namespace {
const CudaLibrary* library = nullptr;
}

void load_cuda_by(py::object) {}

bool has_cuda() { return library; }

py::object use_cuda(uintptr_t address) {
  library = reinterpret_cast<decltype(&fusionsum_cuda)>(address)();
  const char* const reason = library->unavailable();
  return reason ? py::object(py::str(reason)) : py::none();
}

namespace {

void* const kStream = reinterpret_cast<void*>(0x57);  // emulation.STREAM

const CudaLibrary& cuda() {
  if (!library) throw std::runtime_error("no emulated library was given to use_cuda");
  return *library;
}
void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

}  // namespace

void execute(const Problem& problem, dlpack::Device device) {
  std::vector<char> plan(static_cast<size_t>(cuda().plan_bytes));
  int64_t bytes = 0;
  check(cuda().plan(&problem, plan.data(), &bytes));
  std::vector<char> workspace(static_cast<size_t>(bytes));
  check(cuda().execute(plan.data(), device.id, kStream, workspace.data()));
}

void execute(const Chunk& chunk, dlpack::Device device) {
  std::vector<char> workspace(static_cast<size_t>(cuda().step_workspace(&chunk)));
  check(cuda().step(&chunk, device.id, kStream, workspace.data()));
}

}  // namespace fusionsum
