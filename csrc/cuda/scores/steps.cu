// How a chunk's steps are launched: the cut into tiles, which depends on the sizes alone, and the parts that tiles
// leave to `merge`.
#include "steps.h"

#include <algorithm>

#include "merge.cuh"
#include "select.cuh"

namespace fusionsum {
namespace cuda {

__global__ void merge(const __grid_constant__ Merge m);  // merge.cu

namespace {

constexpr int64_t kFewBlocks = 256;      // about two for each multiprocessor of an H100
constexpr int64_t kManyWarps = 1 << 11;  // that look for the best of rows
// The kernels of the steps.
constexpr const char* kNames[] = {"log_sum_exp", "pair_sums", "gamma", "gamma", "leave_out", "select", "rank"};

Tiles tiles_of(const Chunk& c, char* workspace, int64_t& bytes) {
  Tiles p{c, kTileRows, divide_up(c.cols, kTileCols), 0, nullptr, nullptr, nullptr};
  while (p.tile_rows > kWarps && divide_up(c.rows, p.tile_rows) * p.across < kFewBlocks) p.tile_rows /= 2;
  p.down = divide_up(c.rows, p.tile_rows);
  const Values values = values_of(c.step);
  bytes = 0;
  const auto place = [&](const double* wanted, int64_t parts) -> double* {
    if (!wanted || !parts) return nullptr;
    double* const to = workspace ? reinterpret_cast<double*>(workspace + bytes) : nullptr;
    bytes += parts * static_cast<int64_t>(sizeof(double));
    return to;
  };
  p.row_parts = place(c.of_rows, c.rows * p.across * values.of_row);
  p.col_parts = place(c.of_cols, c.cols * p.down * values.of_col);
  p.all_parts = place(c.of_all, p.across * p.down * values.of_all);
  return p;
}

// The segments into which a row's columns are cut, where there are few rows.
Selection selection_of(const Chunk& c) {
  Selection p{c, 1, c.cols, nullptr, 0, nullptr, true};
  const int64_t wanted =
      std::min(kManyWarps / std::max<int64_t>(1, c.rows), c.cols / (4 * std::max<int64_t>(c.k, 128)));
  if (wanted > 1) {
    p.of_segment = divide_up(divide_up(c.cols, wanted), 128) * 128;
    p.segments = divide_up(c.cols, p.of_segment);
    p.with_known = false;
  }
  return p;
}
int64_t hit_bytes(const Chunk& c) { return c.dtype == DType::f64 ? sizeof(Hit64) : sizeof(Hit32); }

// What a step's launches share.
struct Launcher {
  const Chunk& c;
  cudaStream_t stream;
  char* workspace;
  cudaError_t& error;

  bool wide() const { return c.dtype == DType::f64; }

  template <class Parameters>
  bool launch(void (*kernel)(Parameters), int64_t blocks, int threads, const Parameters& parameters) {
    error = gpu_launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), stream,
                       parameters);
    return error == cudaSuccess;
  }

  bool select(const Selection& p) {
    const bool large = c.k > kSelectedOfRoom;
    const int warps = wide() ? (large ? kSelectWarps<Hit64, true> : kSelectWarps<Hit64, false>)
                             : (large ? kSelectWarps<Hit32, true> : kSelectWarps<Hit32, false>);
    return launch(select_kernel(wide(), large), divide_up(c.rows * p.segments, warps), warps * 32, p);
  }
  bool top_k() {
    Selection p = selection_of(c);
    if (p.segments == 1) return select(p);
    p.to = workspace;
    const int64_t listed = p.segments * c.k;
    return select(p) && select({c, 1, listed, workspace, listed, nullptr, true});
  }

  // What tiles have found of so many entries, the first of which is number `first` of `all`.
  bool merge_parts(const double* parts, int64_t entries, int64_t parts_of_entry, int values, double* to, int64_t first,
                   int64_t all) {
    if (!parts) return true;
    const Merge m{parts, entries, parts_of_entry, values, c.step == Step::log_sum_exp, to + first, all};
    return launch(merge, divide_up(entries, kWarps), kThreads, m);
  }
  bool merge_all(const Tiles& p) {
    const Values values = values_of(c.step);
    return merge_parts(p.row_parts, c.rows, p.across, values.of_row, c.of_rows, c.first_row, c.all_rows) &&
           merge_parts(p.col_parts, c.cols, p.down, values.of_col, c.of_cols, c.first_col, c.all_cols) &&
           merge_parts(p.all_parts, 1, p.across * p.down, values.of_all, c.of_all, 0, 1);
  }
};

}  // namespace

int64_t step_workspace(const Chunk& c) {
  if (c.step == Step::leave_out) return 0;
  if (c.step == Step::top_k) {
    const Selection p = selection_of(c);
    return p.segments > 1 ? c.rows * p.segments * c.k * hit_bytes(c) : 0;
  }
  int64_t bytes;
  tiles_of(c, nullptr, bytes);
  return bytes;
}

const char* launch_step(const Chunk& c, cudaStream_t stream, void* workspace, cudaError_t& error) {
  error = cudaSuccess;
  if (c.rows == 0 || c.cols == 0) return nullptr;
  Launcher to{c, stream, static_cast<char*>(workspace), error};
  const char* const name = kNames[static_cast<int>(c.step)];
  if (c.step == Step::leave_out)
    return to.launch(leave_out_kernel(to.wide()), divide_up(c.rows, kWarps), kThreads, c) ? nullptr : name;
  if (c.step == Step::top_k) return to.top_k() ? nullptr : name;
  int64_t bytes;
  const Tiles p = tiles_of(c, to.workspace, bytes);
  const bool pairs = c.query_labels || c.query_ids || c.exclude;
  const bool changes = c.step == Step::softmax_gamma || c.step == Step::sigmoid;
  TilesKernel* const kernel =
      changes ? gamma_kernel(c.step, to.wide(), pairs) : statistics_kernel(c.step, to.wide(), pairs);
  if (!to.launch(kernel, p.across * p.down, kThreads, p)) return name;
  return to.merge_all(p) ? nullptr : "merge";
}

}  // namespace cuda
}  // namespace fusionsum
