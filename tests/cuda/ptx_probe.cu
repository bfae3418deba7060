// Kernels for test_ptx.py: what they compute, what they move and what is wrong with them is known.
//
// What lives elsewhere: the project's own kernels (csrc/cuda), and instructions one by one (test_ptx.py, as PTX).
#include <cmath>
#include <cstdint>

// ---- right ----------------------------------------------------------------------------------------------------------

struct Sum {
  const float* x;
  double* partial;
  int64_t stride[4];
  int n, which;
};

// One partial sum per block: a loop, shuffles of doubles, shared memory, a parameter read at a run-time index.
extern "C" __global__ void __launch_bounds__(256) block_sum(const __grid_constant__ Sum p) {
  __shared__ double warps[8];
  double sum = 0;
  for (int64_t i = blockIdx.x * 256 + threadIdx.x; i < p.n; i += gridDim.x * 256) sum += p.x[i * p.stride[p.which]];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 8; ++i) sum += warps[i];
    p.partial[blockIdx.x] = sum;
  }
}

// Branches within a warp, a loop of a different length for every thread, integer division.
extern "C" __global__ void collatz(const int64_t* start, int* steps, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int64_t value = start[i];
  int count = 0;
  while (value != 1) {
    value = value % 2 ? 3 * value + 1 : value / 2;
    ++count;
  }
  steps[i] = count;
}

// What lanes of a warp wrote, read by others after __syncwarp.
extern "C" __global__ void warp_reverse(const float* x, float* y) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = tile[31 - threadIdx.x];
}

// An array per thread, indexed at run time and too long for ptxas to keep in registers.
extern "C" __global__ void local_rotate(const float* x, float* y, int by) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = x[threadIdx.x * 64 + i];
  for (int i = 0; i < 64; ++i) y[threadIdx.x * 64 + i] = values[(i + by) & 63];
}

// ---- traffic --------------------------------------------------------------------------------------------------------

extern "C" __global__ void copy_packets(const float4* x, float4* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i];
}
extern "C" __global__ void copy_strided(const float* x, float* y, int stride) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i * stride];
}
// Sixteen bytes at a time in a loop, where a byte says so.
extern "C" __global__ void copy_in_a_loop(const float4* x, const uint8_t* mask, float4* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    if (mask[i]) y[i] = x[i];
}
// Threads write along rows of a 32 x `Pitch` tile and read along columns: 32 ways into one bank, unless padded.
template <int Pitch>
__device__ void transposed(const float* x, float* y) {
  __shared__ float tile[32][Pitch];
  for (int row = threadIdx.x / 32; row < 32; row += 8) tile[row][threadIdx.x % 32] = x[row * 32 + threadIdx.x % 32];
  __syncthreads();
  for (int row = threadIdx.x / 32; row < 32; row += 8) y[row * 32 + threadIdx.x % 32] = tile[threadIdx.x % 32][row];
}
extern "C" __global__ void transpose_conflicting(const float* x, float* y) { transposed<32>(x, y); }
extern "C" __global__ void transpose_padded(const float* x, float* y) { transposed<33>(x, y); }

// ---- wrong, one mistake each ----------------------------------------------------------------------------------------

extern "C" __global__ void past_the_end(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = x[i];
}
extern "C" __global__ void misaligned(const float* x, float4* y) { y[threadIdx.x] = *(const float4*)(x + threadIdx.x); }
extern "C" __global__ void writes_input(float* x, float* y) { x[threadIdx.x] = y[threadIdx.x]; }
extern "C" __global__ void reads_unwritten_shared(float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x + 1];
}
extern "C" __global__ void shared_past_the_end(float* y, int by) {
  __shared__ float tile[64];
  tile[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x ^ by];
}
extern "C" __global__ void missing_barrier(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[63 - threadIdx.x];
}
extern "C" __global__ void missing_second_barrier(const float* x, float* y) {
  __shared__ float tile[64];
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = x[threadIdx.x] + round;
    __syncthreads();
    y[threadIdx.x + 64 * round] = tile[63 - threadIdx.x];
  }
}
extern "C" __global__ void read_by_all_written_by_the_last(float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = tile[63];
  if (threadIdx.x == 63) tile[63] = 2;
  __syncthreads();
  y[64 + threadIdx.x] = tile[63];
}
extern "C" __global__ void missing_syncwarp(const float* x, float* y) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[31 - threadIdx.x];
}
// A shuffle makes threads meet, but orders no memory.
extern "C" __global__ void shuffle_for_a_fence(const float* x, float* y) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  const float other = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
  y[threadIdx.x] = tile[31 - threadIdx.x] + other;
}
extern "C" __global__ void blocks_share_a_sum(float* y) {
  if (threadIdx.x == 0) y[0] = y[0] + 1;
}
extern "C" __global__ void blocks_overlap(float* y) { y[blockIdx.x * (blockDim.x - 1) + threadIdx.x] = threadIdx.x; }
extern "C" __global__ void reads_another_block(float* y) {
  y[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  y[(gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x] = y[(blockIdx.x ^ 1) * blockDim.x + threadIdx.x];
}
extern "C" __global__ void nc_of_written(const float* x, float* y) { y[threadIdx.x] = __ldg(x + threadIdx.x) + 1; }
extern "C" __global__ void barrier_in_one_branch(float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 32) {
    __syncthreads();
    y[threadIdx.x] = tile[63 - threadIdx.x];
  }
}
extern "C" __global__ void two_barriers(float* y) {
  if (threadIdx.x < 32) {
    y[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = 2;
  } else {
    y[threadIdx.x] = 3;
    __syncthreads();
    y[threadIdx.x] = 4;
  }
}
extern "C" __global__ void shuffle_in_a_branch(float* y) {
  if (threadIdx.x % 2) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, y[threadIdx.x], 2);
}
extern "C" __global__ void shuffle_after_exit(float* y) {
  if (threadIdx.x >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, y[threadIdx.x], 1);
}
extern "C" __global__ void shuffle_outside_its_mask(float* y) {
  y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, y[threadIdx.x], 1);
}
extern "C" __global__ void divides_by_zero(int* y, int by) {
  y[threadIdx.x] = 100 / (static_cast<int>(threadIdx.x) - by);
}
