// What the tests of the CUDA kernels link in the place of csrc/bindings/execute.cpp: arrays, which are the CPU's, go to
// the CUDA library that use_cuda was given, an emulation (emulation.py). The module that this makes has no kernels of
// the CPU.
#include <stdexcept>
#include <vector>

#include "bindings/execute.h"
#include "cpu/dispatch.h"
#include "cuda/cuda.h"

namespace fusionsum {

namespace scalar {
extern const Isa isa{"emulator", {}, {}};  // the one that cpu/dispatch.cpp finds
}

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

void execute(const Problem& problem, dlpack::Device device) {
  if (!library) throw std::runtime_error("no emulated library was given to use_cuda");
  std::vector<double> workspace;
  const auto allocate = [](void* context, int64_t bytes) -> void* {
    auto& workspace = *static_cast<std::vector<double>*>(context);
    workspace.resize(static_cast<size_t>((bytes + 7) / 8));
    return workspace.data();
  };
  if (const char* error = library->run(&problem, device.id, nullptr, allocate, &workspace))
    throw std::runtime_error(error);
}

}  // namespace fusionsum
