// Gamma, the derivative of a loss by each score, put in the place of the scores or, in bf16, beside them; and the sums
// of it. Of the sigmoid loss (cpu/scores/sigmoid.inl has the formula) the losses too, of which Gamma may be left away.
#include "../sum/packet.cuh"
#include "tile.cuh"

namespace fusionsum {
namespace cuda {
namespace {

// Stores a lane's entries of a row, W together.
template <class S, class T, bool kPairs>
FUSIONSUM_INLINE void store_entries(const Walk<T, kPairs>& w, int64_t row, const T (&x)[kLane]) {
  constexpr int W = Walk<T, kPairs>::W;
  S* const to = static_cast<S*>(w.c.gamma) + row * w.c.stride;
  FUSIONSUM_UNROLL(8)
  for (int i = 0; i < kLane; i += W) {
    const int64_t at = w.col(i);
    S narrowed[W];
    FUSIONSUM_UNROLL(4)
    for (int j = 0; j < W; ++j) narrow_fast(x[i + j], &narrowed[j]);
    if (at + W <= w.c.cols) {
      using Packet = std::conditional_t<sizeof narrowed == 16, uint4, uint2>;
      static_assert(sizeof(Packet) == sizeof narrowed, "entries are stored together");
      Packet packet;
      __builtin_memcpy(&packet, narrowed, sizeof packet);
      __stwb(reinterpret_cast<Packet*>(to + at), packet);
    } else {
      FUSIONSUM_UNROLL(4)
      for (int j = 0; j < W; ++j)
        if (at + j < w.c.cols) to[at + j] = narrowed[j];
    }
  }
}

}  // namespace

template <class T, bool kSigmoid, bool kPairs>
__global__ void __launch_bounds__(kThreads, kBlocksOf<T>) gamma(const __grid_constant__ Tiles p) {
  GPU_SHARED(T, of_cols, (kSoftmaxCoefs * kTileCols));
  GPU_SHARED(T, shared, (kWarps * kTileCols));
  GPU_SHARED(double, buffer, kWarps);
  const Chunk& c = p.c;
  const Walk<T, kPairs> w(p);
  if (!kSigmoid && c.col_coefs) {
    const int64_t col = w.across * kTileCols + static_cast<int64_t>(threadIdx.x);
    GPU_LOOP
    for (int i = 0; i < kSoftmaxCoefs; ++i)
      of_cols[i * kTileCols + threadIdx.x] =
          col < c.cols ? static_cast<T>(c.col_coefs[i * c.all_cols + c.first_col + col]) : T(0);
    __syncthreads();
  }
  T col_sum[kLane] = {};
  double gamma_product = 0, gamma_sum = 0;
  GPU_LOOP
  for (int64_t row = w.first_row + w.warp; row < w.last_row; row += kWarps) {
    Entries<T> e;
    w.load(row, e);
    const int64_t b = c.first_row + row;
    T g[kLane];
    if (kSigmoid) {
      T loss = 0;
      const T coef = c.gamma ? static_cast<T>(c.row_coefs[b]) : T(0);
      FUSIONSUM_UNROLL(8)
      for (int j = 0; j < kLane; ++j) {
        const T z = e.positive >> j & 1 ? T(-1) : T(1);  // sigmoid(S) - 1 = -sigmoid(-S)
        loss = loss + softplus(z * e.score[j]);
        g[j] = z * coef * sigmoid_value(z * e.score[j]).y;
      }
      loss = warp_sum(loss);
      if (w.lane == 0) p.row_parts[row * p.across + w.across] = static_cast<double>(loss);
      if (!c.gamma) continue;
    } else {
      T q[kSoftmaxCoefs];
      FUSIONSUM_UNROLL(8)
      for (int i = 0; i < kSoftmaxCoefs; ++i) q[i] = static_cast<T>(c.row_coefs[i * c.all_rows + b]);
      FUSIONSUM_UNROLL(8)
      for (int j = 0; j < kLane; ++j) {
        const T score = e.score[j], *const k = of_cols + w.in_tile(j);
        const bool positive = e.positive >> j & 1;
        g[j] = q[kSoftmax] * fast_exp(score - q[kLse]);
        T constant = score < -kHighest<T> ? T(0) : q[kSmoothing];
        if (positive) constant = constant + q[kPositive] * (c.any ? fast_exp(score - q[kPositiveLse]) : T(1));
        if (c.col_coefs) {
          g[j] = madd(k[kSoftmax * kTileCols], fast_exp(score - k[kLse * kTileCols]), g[j]);
          if (!(score < -kHighest<T>)) constant = constant + k[kSmoothing * kTileCols];
          if (positive)
            constant =
                constant + k[kPositive * kTileCols] * (c.any ? fast_exp(score - k[kPositiveLse * kTileCols]) : T(1));
        }
        g[j] = g[j] - constant;
      }
    }
    T row_product = 0, row_sum = 0;
    FUSIONSUM_UNROLL(8)
    for (int j = 0; j < kLane; ++j) {
      if (!(e.here >> j & 1)) g[j] = 0;
      if (e.here >> j & 1) row_product = madd(g[j], e.product[j], row_product);
      row_sum = row_sum + g[j];
      col_sum[j] = col_sum[j] + g[j];
    }
    gamma_product += static_cast<double>(row_product);
    gamma_sum += static_cast<double>(row_sum);
    if (sizeof(T) == 4 && c.gamma_dtype == DType::bf16) {
      if constexpr (sizeof(T) == 4) store_entries<Bf16>(w, row, g);
    } else {
      store_entries<T>(w, row, g);
    }
  }
  if (p.col_parts) sum_columns(p, w, col_sum, shared, 0, 1);
  if (p.all_parts) {
    const double sums[] = {segment_sum(gamma_product, 8, buffer), segment_sum(gamma_sum, 8, buffer)};
    if (threadIdx.x == 0) {
      p.all_parts[2 * blockIdx.x] = sums[0];
      p.all_parts[2 * blockIdx.x + 1] = sums[1];
    }
  }
}

TilesKernel* gamma_kernel(Step step, bool wide, bool pairs) {
  static TilesKernel* const kernels[2][2][2] = {
      {{gamma<float, false, false>, gamma<float, false, true>},
       {gamma<double, false, false>, gamma<double, false, true>}},
      {{gamma<float, true, false>, gamma<float, true, true>}, {gamma<double, true, false>, gamma<double, true, true>}}};
  return kernels[step == Step::sigmoid][wide][pairs];
}

}  // namespace cuda
}  // namespace fusionsum
