// What is found of scores without changing them: log-sum-exps of rows and columns, sums over pairs, counts for ranks.
//
// Sums of exponentials are relative to a reference, as on the CPU (cpu/scores/softmax.inl): that of a row's part is its
// greatest score, that of a column is a score seen before, which is raised when a score exceeds it by more than
// kMargin. References are finite: a score of +inf makes the sum infinite.
#include "tile.cuh"

namespace fusionsum {
namespace cuda {
template <class T, bool kPairs>
__global__ void __launch_bounds__(kThreads, kBlocksOf<T>) log_sum_exp(const __grid_constant__ Tiles p) {
  GPU_SHARED(T, references, (kWarps * kTileCols));
  GPU_SHARED(T, sums, (kWarps * kTileCols));
  const Walk<T, kPairs> w(p);
  T reference[kLane], sum[kLane];  // of columns
  FUSIONSUM_UNROLL(8)
  for (int j = 0; j < kLane; ++j) {
    reference[j] = -kHighest<T>;
    sum[j] = 0;
  }
  GPU_LOOP
  for (int64_t row = w.first_row + w.warp; row < w.last_row; row += kWarps) {
    Entries<T> e;
    w.load(row, e);
    if (p.c.diagonal) {
      FUSIONSUM_UNROLL(8)
      for (int j = 0; j < kLane; ++j)
        if (e.positive >> j & 1) p.c.diagonal[p.c.first_row + row] = static_cast<double>(e.score[j]);
    }
    T top = -kHighest<T>;
    bool exceeds = false;
    FUSIONSUM_UNROLL(8)
    for (int j = 0; j < kLane; ++j) {
      if (p.c.only_positives && !(e.positive >> j & 1)) e.score[j] = -kInfinity<T>;
      top = at_least(top, e.score[j]);
      exceeds = exceeds || e.score[j] - reference[j] > T(kMargin);
    }
    top = at_most(warp_max(top), kHighest<T>);
    T of_row = 0;
    FUSIONSUM_UNROLL(8)
    for (int j = 0; j < kLane; ++j) of_row = of_row + fast_exp(e.score[j] - top);
    of_row = warp_sum(of_row);
    if (w.lane == 0) {
      double* const part = p.row_parts + (row * p.across + w.across) * 2;
      part[0] = static_cast<double>(top);
      part[1] = static_cast<double>(of_row);
    }
    if (!p.col_parts) continue;
    if (exceeds) {
      FUSIONSUM_UNROLL(8)
      for (int j = 0; j < kLane; ++j) {
        if (!(e.score[j] - reference[j] > T(kMargin))) continue;
        const T raised = at_most(e.score[j], kHighest<T>);
        sum[j] = sum[j] * fast_exp(reference[j] - raised);
        reference[j] = raised;
      }
    }
    FUSIONSUM_UNROLL(8)
    for (int j = 0; j < kLane; ++j) sum[j] = sum[j] + fast_exp(e.score[j] - reference[j]);
  }
  if (!p.col_parts) return;
  put_columns(w, reference, references);
  put_columns(w, sum, sums);
  __syncthreads();
  const int64_t col = w.across * kTileCols + static_cast<int64_t>(threadIdx.x);
  if (col >= p.c.cols) return;
  T top = -kHighest<T>, whole = 0;
  GPU_LOOP
  for (int warp = 0; warp < kWarps; ++warp) top = at_least(top, references[warp * kTileCols + threadIdx.x]);
  GPU_LOOP
  for (int warp = 0; warp < kWarps; ++warp) {
    const int at = warp * kTileCols + static_cast<int>(threadIdx.x);
    whole = whole + sums[at] * fast_exp(references[at] - top);
  }
  double* const part = p.col_parts + (col * p.down + w.down) * 2;
  part[0] = static_cast<double>(top);
  part[1] = static_cast<double>(whole);
}

constexpr int kPairSums = 4;
template <class T>
__global__ void __launch_bounds__(kThreads) pair_sums(const __grid_constant__ Tiles p) {
  GPU_SHARED(double, shared, (kWarps * kTileCols));
  const Walk<T, true> w(p);
  double of_cols[kPairSums][kLane] = {};
  GPU_LOOP
  for (int64_t row = w.first_row + w.warp; row < w.last_row; row += kWarps) {
    Entries<T> e;
    w.load(row, e);
    double of_row[kPairSums] = {};
    FUSIONSUM_UNROLL(8)
    for (int j = 0; j < kLane; ++j) {
      const bool positive = e.positive >> j & 1, valid = (e.here >> j & 1) && e.score[j] != -kInfinity<T>;
      const double score = static_cast<double>(e.score[j]);
      const double found[] = {double(positive), positive ? score : 0.0, valid ? score : 0.0, double(valid)};
      FUSIONSUM_UNROLL(4)
      for (int v = 0; v < kPairSums; ++v) {
        of_row[v] = of_row[v] + found[v];
        of_cols[v][j] = of_cols[v][j] + found[v];
      }
    }
    FUSIONSUM_UNROLL(4)
    for (int v = 0; v < kPairSums; ++v) {
      const double sum = warp_sum(of_row[v]);
      if (w.lane == 0) p.row_parts[(row * p.across + w.across) * kPairSums + v] = sum;
    }
  }
  if (!p.col_parts) return;
  FUSIONSUM_UNROLL(4)
  for (int v = 0; v < kPairSums; ++v) sum_columns(p, w, of_cols[v], shared, v, kPairSums);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOf<T>) rank(const __grid_constant__ Tiles p) {
  const Walk<T, true> w(p);
  GPU_LOOP
  for (int64_t row = w.first_row + w.warp; row < w.last_row; row += kWarps) {
    Entries<T> e;
    w.load(row, e);
    const int64_t b = p.c.first_row + row, own = p.c.targets[b] - p.c.first_col;
    const T target = static_cast<const T*>(p.c.target_scores)[b];
    int greater = 0, equal = 0;
    FUSIONSUM_UNROLL(8)
    for (int j = 0; j < kLane; ++j) {
      const bool counts = (e.here >> j & 1) && w.col(j) != own;
      greater += counts && (e.score[j] > target || target != target);  // the rank of NaN is the last
      equal += counts && e.score[j] == target;
    }
    greater = warp_sum(greater);
    equal = warp_sum(equal);
    if (w.lane != 0) continue;
    double* const part = p.row_parts + (row * p.across + w.across) * 2;
    part[0] = greater;
    part[1] = equal;
  }
}

TilesKernel* statistics_kernel(Step step, bool wide, bool pairs) {
  if (step == Step::log_sum_exp) {
    if (pairs) return wide ? log_sum_exp<double, true> : log_sum_exp<float, true>;
    return wide ? log_sum_exp<double, false> : log_sum_exp<float, false>;
  }
  if (step == Step::pair_sums) return wide ? pair_sums<double> : pair_sums<float>;
  return wide ? rank<double> : rank<float>;
}

}  // namespace cuda
}  // namespace fusionsum
