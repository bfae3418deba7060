// Errors of CUDA's runtime, for the runtimes that stand in its place: the emulator (fibers.h) and the stub
// (runtime.cpp).
//
// X(name, number, what CUDA says)
#pragma once
#define CUDA_ERRORS(X)                                                                                \
  X(cudaSuccess, 0, "no error")                                                                       \
  X(cudaErrorInvalidValue, 1, "invalid argument")                                                     \
  X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                               \
  X(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version")  \
  X(cudaErrorInvalidDeviceFunction, 98, "invalid device function")                                    \
  X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                                     \
  X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                            \
  X(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution on the device") \
  X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                         \
  X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch")                    \
  X(cudaErrorLaunchTimeout, 702, "the launch timed out and was terminated")                           \
  X(cudaErrorAssert, 710, "device-side assert triggered")                                             \
  X(cudaErrorHardwareStackError, 714, "hardware stack error")                                         \
  X(cudaErrorIllegalInstruction, 715, "an illegal instruction was encountered")                       \
  X(cudaErrorMisalignedAddress, 716, "misaligned address")                                            \
  X(cudaErrorInvalidAddressSpace, 717, "operation not supported on global/shared address space")      \
  X(cudaErrorInvalidPc, 718, "invalid program counter")                                               \
  X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                        \
  X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing")

inline const char* error_name(int error) {
  switch (error) {
#define NAME(name, number, text) \
  case number:                   \
    return #name;
    CUDA_ERRORS(NAME)
#undef NAME
  }
  return "unrecognized error code";
}
inline const char* error_text(int error) {
  switch (error) {
#define TEXT(name, number, text) \
  case number:                   \
    return text;
    CUDA_ERRORS(TEXT)
#undef TEXT
  }
  return "unrecognized error code";
}
