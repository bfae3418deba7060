// CUDA's runtime without CUDA, for the library as nvcc builds it: nothing runs, and a function of the tests is asked
// what each call returns.
//
// What lives here: the runtime's functions that the library calls (the linker refuses one that is missing), and what
// must hold between calls: a current device, the last error, what is loaded. What lives elsewhere: who answers, and the
// records (runtime.py); the runtime under which kernels run (emulator.h).
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <set>

#include "errors.h"

#define CHECK(name, number, text) static_assert(name == number, "errors.h has CUDA's numbers");
CUDA_ERRORS(CHECK)
#undef CHECK

namespace {

// runtime.py mirrors this struct. The kernel's fields are of launches, and of questions about a kernel the name alone.
struct Call {
  const char *function, *kernel;
  uint32_t grid[3], block[3];
  const void* parameters;
  int64_t shared_bytes;
  const void* stream;
  int32_t device;
};
using Answer = int(const Call*);

Answer* answer = nullptr;
int device = 0;
cudaError_t last = cudaSuccess;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
std::set<const char*> loaded;

std::map<const void*, const char*>& kernels() {  // which are registered before main, in any order
  static std::map<const void*, const char*> names;
  return names;
}

cudaError_t ask(const char* function, Call call = {}) {
  call.function = function;
  call.device = device;
  const auto error = static_cast<cudaError_t>(answer(&call));
  return error == cudaSuccess ? error : last = error;
}

// The first use of a kernel loads it, which a capture forbids, and here there always is one.
cudaError_t ask_of(const char* function, const void* kernel, Call call = {}) {
  const auto found = kernels().find(kernel);
  if (found == kernels().end()) return last = cudaErrorInvalidDeviceFunction;
  call.kernel = found->second;
  const cudaError_t error = ask(function, call);
  if (error != cudaSuccess) return error;
  if (loaded.insert(call.kernel).second && capture_mode != cudaStreamCaptureModeRelaxed)
    return last = cudaErrorStreamCaptureUnsupported;
  return cudaSuccess;
}

}  // namespace

extern "C" {

void runtime_answer_by(Answer* function) { answer = function; }
void runtime_set_device(int current) { device = current; }
int runtime_capture_mode() { return capture_mode; }
int runtime_last_error() { return last; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return ask("cudaGetDeviceCount");
}
cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return ask("cudaGetDevice");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return ask("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {};
  return ask_of("cudaFuncGetAttributes", kernel);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const cudaStreamCaptureMode before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t stream) {
  Call call{};
  uint32_t* extent = call.grid;
  for (const unsigned n : {grid.x, grid.y, grid.z, block.x, block.y, block.z}) *extent++ = n;
  call.parameters = arguments[0];
  call.shared_bytes = static_cast<int64_t>(shared_bytes);
  call.stream = stream;
  return ask_of("cudaLaunchKernel", kernel, call);
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) { return error_name(error); }
const char* cudaGetErrorString(cudaError_t error) { return error_text(error); }

// What nvcc's own code calls: registration, and the bodies of kernels' host functions, of which the library never calls
// one.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { __builtin_abort(); }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { __builtin_abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { __builtin_abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { __builtin_abort(); }
}
