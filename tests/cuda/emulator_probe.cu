// Small kernels, right and wrong, behind the CUDA library's interface: what test_emulator.py tests the emulator with.
//
// A problem's sum_dim says which program runs; operand 1 is the input, n floats, and operand 0's gradient the output.
// The names' list, at the end, is the programs' order.
#include <cstring>
#include <string>
#include <vector>

#include "cuda/cuda.h"
#include "cuda/gpu.h"

struct Probe {
  const float* in;
  float *out, *partial;
  int n;
};

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 64;

// ---- right ----------------------------------------------------------------------------------------------------------

// Each block's sum, by a tree in shared memory.
__global__ void __launch_bounds__(kThreads) tree(const __grid_constant__ Probe p) {
  GPU_SHARED(float, sums, kThreads);
  const unsigned t = threadIdx.x;
  float sum = 0;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + t); i < p.n; i += static_cast<int>(gridDim.x * blockDim.x))
    sum += __ldg(p.in + i);
  sums[t] = sum;
  for (unsigned half = kThreads / 2; half; half /= 2) {
    __syncthreads();
    if (t < half) sums[t] += sums[t + half];
  }
  if (t == 0) p.out[blockIdx.x] = sums[0];
}

// Sums, a shared exchange within each warp, and back, in all the types that can be shuffled.
__global__ void shuffles(const __grid_constant__ Probe p) {
  GPU_SHARED(int, exchange, kThreads);
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  double sum = 0;
  for (int i = t; i < p.n; i += kThreads) sum += p.in[i];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  float below = static_cast<float>(lane);
  below -= __shfl_down_sync(kAll, below, 1);  // -1, and 0 in the last lane
  exchange[t] = __shfl_sync(kAll, lane, 31 - lane);
  __syncwarp();
  const int mirrored = exchange[t - lane + 31 - lane];  // lane
  __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  p.out[t] = static_cast<float>(sum) + below + static_cast<float>(mirrored);
}

__global__ void packets(const __grid_constant__ Probe p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i < p.n) __stcs(reinterpret_cast<uint4*>(p.out + i), __ldcs(reinterpret_cast<const uint4*>(p.in + i)));
}

// ---- wrong: found in every build ------------------------------------------------------------------------------------

__global__ void uneven_barrier(const __grid_constant__ Probe p) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    p.out[threadIdx.x] = 0;
    __syncthreads();
  }
}
__global__ void early_exit(const __grid_constant__ Probe p) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  p.out[threadIdx.x] = 0;
}
__global__ void stuck(const __grid_constant__ Probe p) {
  if (threadIdx.x != 31) p.out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
  __syncthreads();
}
__global__ void divergent_shuffle(const __grid_constant__ Probe p) {
  if (threadIdx.x < 16) p.out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}
__global__ void outside_mask(const __grid_constant__ Probe p) {
  p.out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1);
}
__global__ void masked_source(const __grid_constant__ Probe p) {
  if (threadIdx.x < 16) p.out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 16);
}
__global__ void mixed_shuffles(const __grid_constant__ Probe p) {
  p.out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(kAll, 1.0f, 1) : __shfl_down_sync(kAll, 1.0f, 1);
}
__global__ void misaligned_load(const __grid_constant__ Probe p) {
  p.out[threadIdx.x] = static_cast<float>(__ldg(reinterpret_cast<const uint4*>(p.in + 1)).x);
}
__global__ void misaligned_store(const __grid_constant__ Probe p) {
  __stcs(reinterpret_cast<uint4*>(p.out + 2), make_uint4(0, 0, 0, 0));
}
__global__ void much_shared(const __grid_constant__ Probe p) {
  GPU_SHARED(double, most, 6144);
  GPU_SHARED(float, more, 1);
  if (threadIdx.x == 0) p.out[0] = static_cast<float>(most[0]) + more[0];
}
__global__ void small(const __grid_constant__ Probe p) { p.out[0] = 0; }

// ---- wrong: found by a schedule, by NaN in what was not written, or by ThreadSanitizer ------------------------------

__global__ void missing_barrier(const __grid_constant__ Probe p) {
  GPU_SHARED(float, values, kThreads);
  const unsigned t = threadIdx.x;
  values[t] = p.in[t];
  p.out[t] = values[t / 2];
}
__global__ void missing_syncwarp(const __grid_constant__ Probe p) {  // a shuffle orders no memory
  GPU_SHARED(float, values, kThreads);
  const unsigned t = threadIdx.x;
  values[t] = p.in[t];
  p.out[t] = __shfl_sync(kAll, 0.0f, 0) + values[t ^ 1];
}
__global__ void missing_second_barrier(const __grid_constant__ Probe p) {
  GPU_SHARED(float, values, kThreads);
  const unsigned t = threadIdx.x;
  values[t] = p.in[t];
  __syncthreads();
  p.out[t] = values[kThreads - 1 - t];
  values[t] = 0;
}
__global__ void uninitialised(const __grid_constant__ Probe p) {
  GPU_SHARED(float, values, kThreads);
  if (threadIdx.x) values[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = values[threadIdx.x];
}
__global__ void block_race(const __grid_constant__ Probe p) {
  if (threadIdx.x == 0) p.out[0] = p.in[0];
}
__global__ void block_race_packet(const __grid_constant__ Probe p) {
  if (threadIdx.x == 0) __stcs(reinterpret_cast<uint4*>(p.out), make_uint4(0, 0, 0, 0));
}
__global__ void block_race_read(const __grid_constant__ Probe p) {
  if (threadIdx.x == 0) p.out[blockIdx.x] = blockIdx.x ? p.out[0] * 0 : 1.0f;
}

// ---- wrong: found by AddressSanitizer -------------------------------------------------------------------------------

__global__ void read_past_global(const __grid_constant__ Probe p) { p.out[threadIdx.x] = p.in[p.n - 63 + threadIdx.x]; }
__global__ void write_past_global(const __grid_constant__ Probe p) { p.out[threadIdx.x + 1] = 0; }
__global__ void write_before_global(const __grid_constant__ Probe p) { (p.out - 1)[threadIdx.x] = 0; }
__global__ void write_past_workspace(const __grid_constant__ Probe p) {
  p.partial[threadIdx.x + 1] = p.out[threadIdx.x] = 0;
}
__global__ void read_past_shared(const __grid_constant__ Probe p) {
  GPU_SHARED(float, values, 33);
  const float* const all = values;
  for (unsigned i = threadIdx.x; i < 33; i += kThreads) values[i] = 0;
  __syncthreads();
  p.out[threadIdx.x] = all[threadIdx.x ? 1 : 33] * 0;
}
__global__ void write_past_shared(const __grid_constant__ Probe p) {
  GPU_SHARED(float, values, 33);
  float* const all = values;
  if (threadIdx.x <= 33) all[threadIdx.x] = 0;
  p.out[threadIdx.x] = 0;
}
__global__ void index_past_shared(
    const __grid_constant__ Probe p) {  // UndefinedBehaviourSanitizer knows the array's type
  GPU_SHARED(float, values, 33);
  if (threadIdx.x <= 33) values[threadIdx.x] = 0;
  p.out[threadIdx.x] = 0;
}

// ---- the library ----------------------------------------------------------------------------------------------------

namespace {

struct Program {
  const char* name;
  void (*kernel)(const Probe);
  dim3 blocks;
  unsigned threads;
  size_t dynamic = 0;  // bytes of shared memory that the launch asks for
};
#define PROGRAM(name, blocks) {#name, name, blocks, kThreads}
constexpr Program kPrograms[] = {
    PROGRAM(tree, 1),
    PROGRAM(shuffles, 1),
    PROGRAM(packets, 16),
    {"two_stages", tree, 8, kThreads},  // then tree again, over the blocks' sums
    PROGRAM(uneven_barrier, 2),
    PROGRAM(early_exit, 2),
    PROGRAM(stuck, 2),
    PROGRAM(divergent_shuffle, 2),
    PROGRAM(outside_mask, 1),
    PROGRAM(masked_source, 1),
    PROGRAM(mixed_shuffles, 1),
    {"partial_warp", shuffles, 1, 40},
    PROGRAM(misaligned_load, 1),
    PROGRAM(misaligned_store, 1),
    PROGRAM(much_shared, 1),
    PROGRAM(small, 0),
    {"large_block", small, 1, 2048},
    {"long_second_dim", small, {1, 1 << 16}, kThreads},
    {"much_dynamic", small, 1, kThreads, 100 << 10},
    {"much_in_all", tree, 1, kThreads, 48 << 10},
    PROGRAM(missing_barrier, 1),
    PROGRAM(missing_syncwarp, 1),
    PROGRAM(missing_second_barrier, 1),
    PROGRAM(uninitialised, 1),
    PROGRAM(block_race, 2),
    PROGRAM(block_race_packet, 2),
    PROGRAM(block_race_read, 2),
    PROGRAM(read_past_global, 1),
    PROGRAM(write_past_global, 1),
    PROGRAM(write_before_global, 1),
    PROGRAM(write_past_workspace, 1),
    PROGRAM(read_past_shared, 1),
    PROGRAM(write_past_shared, 1),
    PROGRAM(index_past_shared, 1),
};

const char* unavailable() noexcept { return nullptr; }

// The plan is a copy of the problem.
const char* plan(const fusionsum::Problem* problem, void* to, int64_t* workspace_bytes) noexcept {
  std::memcpy(to, problem, sizeof *problem);
  *workspace_bytes = kThreads * sizeof(float);
  return nullptr;
}

const char* execute(const void* plan, int, void* stream, void* workspace) noexcept {
  const auto& problem = *static_cast<const fusionsum::Problem*>(plan);
  const Program& program = kPrograms[problem.sum_dim];
  const fusionsum::Operand* o = problem.operand;
  Probe p{static_cast<const float*>(o[1].data), static_cast<float*>(o[0].grad), static_cast<float*>(workspace),
          static_cast<int>(problem.size[0])};
  const bool two_stages = std::string(program.name) == "two_stages";
  if (two_stages) std::swap(p.out, p.partial);
  void* arguments[] = {&p};
  cudaError_t error =
      cudaLaunchKernel(program.kernel, program.blocks, dim3(program.threads), arguments, program.dynamic, stream);
  if (error == cudaSuccess && two_stages) {
    error = gpu_launch(tree, dim3(1), dim3(kThreads), stream,
                       Probe{p.out, p.partial, nullptr, static_cast<int>(program.blocks.x)});
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

extern "C" {

const fusionsum::CudaLibrary* fusionsum_cuda() {
  static const fusionsum::CudaLibrary library{unavailable, sizeof(fusionsum::Problem), plan, execute};
  return &library;
}

// Runs a program through what stands before this library; null, or an error.
#undef fusionsum_cuda
const fusionsum::CudaLibrary* fusionsum_cuda();
const char* probe_run(const char* name, const float* in, int n, float* out, int m) {
  fusionsum::Problem p{};
  p.ndim = p.operands = 2;
  p.size[0] = n;
  p.size[1] = m;
  p.operand[0].grad = out;
  p.operand[1].data = in;
  for (int k : {0, 1}) {
    fusionsum::Operand& o = p.operand[k];
    o.dtype = fusionsum::DType::f32;
    o.dims = k ? 1 : 2;
    o.stride[0] = o.grad_stride[1] = 1;
  }
  for (const Program& program : kPrograms) {
    if (std::strcmp(program.name, name)) continue;
    p.sum_dim = static_cast<int>(&program - kPrograms);
    const fusionsum::CudaLibrary& library = *fusionsum_cuda();
    std::vector<char> plan(static_cast<size_t>(library.plan_bytes));
    int64_t bytes = 0;
    if (const char* error = library.plan(&p, plan.data(), &bytes)) return error;
    std::vector<double> workspace(static_cast<size_t>(bytes));  // bytes and more: some programs write past them
    return library.execute(plan.data(), 0, nullptr, workspace.data());
  }
  return "no such program";
}
}
