// The library's interface (cuda.h): what it asks of CUDA's runtime, and the launches of a plan (sum/plan.h). Those of
// scores are in scores/steps.cu.
#include <atomic>
#include <cstdio>
#include <new>

#include "cuda.h"
#include "gpu.h"
#include "scores/steps.h"
#include "sum/plan.h"

namespace fusionsum {
namespace cuda {

__global__ void combine(const __grid_constant__ Combine c);  // sum/combine.cu

namespace {

thread_local char message[512];

// Errors that CUDA reports from one call after another once work on the device has failed: that is seldom ours.
bool is_left_behind(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
      return true;
    default:
      return false;
  }
}

const char* failed(const char* what, cudaError_t error) {
  std::snprintf(message, sizeof message, "%s: %s, %s%s", what, cudaGetErrorName(error), cudaGetErrorString(error),
                is_left_behind(error) ? " (left behind by earlier work, unless CUDA_LAUNCH_BLOCKING is set)" : "");
  return message;
}

// Lets the first use of a kernel, whose code is loaded then, be in the midst of a capture: that is among the calls that
// a capture forbids to its thread, or to all (torch's default), unless they say that they know what they do.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

const char* unavailable() noexcept {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return failed("CUDA finds no usable GPU", error);
  }
  return devices ? nullptr : "CUDA finds no GPU";
}

// A device whose compute capability has no kernels says so here, once, not at the launch.
const char* check_device(int device) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return failed("the current device", error);
  }
  if (current != device) {
    std::snprintf(message, sizeof message, "device %d is current, and the arrays are on device %d", current, device);
    return message;
  }
  static std::atomic<uint64_t> checked{0};
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (checked.load(std::memory_order_relaxed) & bit) return nullptr;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&combine));
  if (error == cudaSuccess) {
    checked.fetch_or(bit, std::memory_order_relaxed);
    return nullptr;
  }
  cudaGetLastError();
  if (is_left_behind(error)) return failed("the device", error);
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  std::snprintf(
      message, sizeof message,
      "device %d, of compute capability %d.%d, does not take the kernels of this build, which are for %s: %s, %s",
      device, major, minor, FUSIONSUM_CUDA_ARCHITECTURES, cudaGetErrorName(error), cudaGetErrorString(error));
  return message;
}

const char* plan(const Problem* problem, void* to, int64_t* workspace_bytes) noexcept {
  Plan& plan = *new (to) Plan;
  const char* const error = make_plan(*problem, plan);
  *workspace_bytes = plan.workspace_bytes;
  return error;
}

const char* execute(const void* from, int device, void* stream, void* workspace) noexcept {
  const Plan& plan = *static_cast<const Plan*>(from);
  const Relaxed relaxed;
  if (const char* error = check_device(device)) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  for (int i = 0; i < plan.launches; ++i) {
    Launch launch = plan.launch[i];
    place_sums(launch, workspace);
    const dim3 grid(static_cast<unsigned>(launch.blocks)), block(kThreads);
    cudaError_t error = gpu_launch(launch.kernel, grid, block, on, launch.pass);
    if (error != cudaSuccess) return failed(launch.by_columns ? "kernel columns" : "kernel rows", error);
    for (int c = 0; c < launch.combines; ++c) {
      const Combine& sums = launch.combine[c];
      error = gpu_launch(combine, dim3(static_cast<unsigned>(divide_up(sums.entries, kCombined))), block, on, sums);
      if (error != cudaSuccess) return failed("kernel combine", error);
    }
  }
  return nullptr;
}

int64_t workspace_of(const Chunk* chunk) noexcept { return step_workspace(*chunk); }

const char* step(const Chunk* chunk, int device, void* stream, void* workspace) noexcept {
  const Relaxed relaxed;
  if (const char* error = check_device(device)) return error;
  cudaError_t error;
  const char* const kernel = launch_step(*chunk, static_cast<cudaStream_t>(stream), workspace, error);
  if (!kernel) return nullptr;
  char what[64];
  std::snprintf(what, sizeof what, "kernel %s", kernel);
  return failed(what, error);
}

}  // namespace
}  // namespace cuda
}  // namespace fusionsum

extern "C" const fusionsum::CudaLibrary* fusionsum_cuda() {
  using namespace fusionsum;
  static const CudaLibrary library{cuda::unavailable, sizeof(cuda::Plan), cuda::plan,
                                   cuda::execute,     cuda::workspace_of, cuda::step};
  return &library;
}
