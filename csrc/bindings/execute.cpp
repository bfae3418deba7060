#include "execute.h"

#include <atomic>
#include <memory>

#include "../cpu/dispatch.h"
#include "../cuda/cuda.h"
#include "torch.h"

namespace fusionsum {
namespace {

std::atomic<const CudaLibrary*> library{nullptr};  // one that can run
PyObject* load_cuda = nullptr;

constexpr int64_t kFewEntries = 1 << 14;  // a few microseconds: less than letting go of the GIL may cost

bool ctrl_c() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

void execute_on_cpu(const Problem& problem) {
  int64_t entries = 1;
  for (int d = 0; d < problem.ndim; ++d) entries *= problem.size[d];
  Workspace workspace;
  bool done;
  if (entries < kFewEntries) {
    done = execute(problem, *active_isa().sum, workspace, [] { return false; });
  } else {
    py::gil_scoped_release no_gil;
    done = execute(problem, *active_isa().sum, workspace, ctrl_c);
  }
  if (!done) throw py::error_already_set();
}

void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

// Memory on a GPU that goes back to torch's allocator at once: it gives it out again to what comes later on the same
// stream.
class GpuWorkspace {
 public:
  GpuWorkspace(dlpack::Device device, int64_t bytes) {
    if (!bytes) return;
    const int64_t entries = divide_up(bytes, item_size(DType::f64));
    owner_ = allocate_tensor(device, DType::f64, 1, &entries, &data_);
  }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  py::object owner_;
};

void execute_on_cuda(const Problem& problem, dlpack::Device device) {
  const CudaLibrary& cuda = *library.load();
  const std::unique_ptr<char[]> plan(new char[static_cast<size_t>(cuda.plan_bytes)]);
  int64_t bytes = 0;
  check(cuda.plan(&problem, plan.get(), &bytes));
  const GpuWorkspace workspace(device, bytes);
  const OnDevice guard(device);
  check(cuda.execute(plan.get(), device.id, current_stream(device), workspace.data()));
}

}  // namespace

void load_cuda_by(py::object load) { load_cuda = load.release().ptr(); }  // as long as the process

bool has_cuda() {
  if (!library.load() && load_cuda) py::reinterpret_borrow<py::object>(load_cuda)();
  return library.load() != nullptr;
}

py::object use_cuda(uintptr_t address) {
  const CudaLibrary* const found = reinterpret_cast<decltype(&fusionsum_cuda)>(address)();
  const char* const reason = found->unavailable();
  library = reason ? nullptr : found;
  return reason ? py::object(py::str(reason)) : py::none();
}

void execute(const Problem& problem, dlpack::Device device) {
  if (device.type == dlpack::kCuda) {
    execute_on_cuda(problem, device);
  } else {
    execute_on_cpu(problem);
  }
}

void execute(const Chunk& chunk, dlpack::Device device) {
  const CudaLibrary& cuda = *library.load();
  const GpuWorkspace workspace(device, cuda.step_workspace(&chunk));
  const OnDevice guard(device);
  check(cuda.step(&chunk, device.id, current_stream(device), workspace.data()));
}

}  // namespace fusionsum
