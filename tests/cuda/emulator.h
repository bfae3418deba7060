// CUDA's language and runtime for kernels that g++ compiles: what csrc/cuda/gpu.h includes where nvcc is not the
// compiler.
//
// What lives here: the names. What lives elsewhere: what they do (fibers.h); recording of launches, and the wrapper
// round the library (recorder.cpp); replay under sanitizers (driver.cpp).
#pragma once
#include <cmath>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::max;
using std::min;

using cudaStream_t = void*;

// ---- CUDA's functions -----------------------------------------------------------------------------------------------

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

// The reference has the array's type, for UBSan; the key is one per instantiation, as CUDA's arrays are.
#define GPU_SHARED(type, name, count)                \
  static const char name##_key = 0;                  \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      ::emulator::shared_array(&name##_key, sizeof(type) * (count), ::emulator::Site::here()))

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here()) {
  emulator::warp_barrier(mask, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffle(emulator::Collective::shfl, mask, value, static_cast<unsigned>(lane) % emulator::kWarp,
                           site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, emulator::Site site = emulator::Site::here()) {
  const unsigned lane = emulator::machine.current->rank % emulator::kWarp;
  return emulator::shuffle(emulator::Collective::shfl_xor, mask, value, (lane ^ bits) % emulator::kWarp, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, emulator::Site site = emulator::Site::here()) {
  const unsigned lane = emulator::machine.current->rank % emulator::kWarp, source = lane + by;
  return emulator::shuffle(emulator::Collective::shfl_down, mask, value, source < emulator::kWarp ? source : lane,
                           site);
}

inline unsigned __ballot_sync(unsigned mask, bool vote, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot(mask, vote, site);
}
// Rounded once, in the interpreter too (ptx_arithmetic.py); a GPU's is within 2^-22 of it.
inline float gpu_exp(float x) { return static_cast<float>(std::exp2(static_cast<double>(x * 1.44269504f))); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T>
T __ldg(const T* pointer, emulator::Site site = emulator::Site::here()) {
  emulator::check_aligned(pointer, site);
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer, emulator::Site site = emulator::Site::here()) {
  return __ldg(pointer, site);
}
template <class T>
void __stcs(T* pointer, T value, emulator::Site site = emulator::Site::here()) {
  emulator::check_aligned(pointer, site);
  *pointer = value;
}
template <class T>
void __stwb(T* pointer, T value, emulator::Site site = emulator::Site::here()) {
  __stcs(pointer, value, site);
}

template <class Parameters>
auto gpu_kernel(void (*kernel)(Parameters)) {
  return kernel;  // by whose type the emulator calls it
}
template <class Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters), dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  static_assert(std::is_trivially_copyable<Parameters>::value, "parameters are copied byte by byte");
  static_assert(sizeof(Parameters) <= emulator::kParameterLimit, "a launch takes 4 KB of parameters");
  return emulator::run({reinterpret_cast<const void*>(kernel), grid, block, *arguments, sizeof(Parameters),
                        [](const emulator::Launch& launch) {
                          reinterpret_cast<void (*)(Parameters)>(launch.kernel)(
                              *static_cast<const Parameters*>(launch.parameters));
                        },
                        stream, shared});
}

inline const char* cudaGetErrorName(cudaError_t error) { return error_name(error); }
// Of a failed launch, the emulator's report; valid until the next one fails.
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == emulator::machine.failed_with ? emulator::machine.failure.c_str() : error_text(error);
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

// Devices of compute capability 9.0, whose memory is the host's; each OS thread has a current one. What makes another
// one current is not the library's business: there is no cudaSetDevice.
namespace emulator {
constexpr int kDevices = 2;
inline thread_local int current_device = 0;
inline cudaError_t of_device(int device) {
  return device >= 0 && device < kDevices ? cudaSuccess : last_error = cudaErrorInvalidDevice;
}
}  // namespace emulator
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulator::kDevices;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device;
  return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return emulator::of_device(device);
}

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
namespace emulator {
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, emulator::capture_mode);
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int maxThreadsPerBlock;
};
// It may load the kernel, which every stream's being captured would forbid: here one always is.
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (!kernel) return emulator::last_error = cudaErrorInvalidValue;
  if (emulator::capture_mode != cudaStreamCaptureModeRelaxed)
    return emulator::last_error = cudaErrorStreamCaptureUnsupported;
  attributes->maxThreadsPerBlock = emulator::kMostThreads;
  return cudaSuccess;
}
