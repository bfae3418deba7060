// Scores on CUDA (../../scores.h says what they are) come in chunks. A product of matrices, torch.mm's, has written
//
//     product[r, c] = sum_i A[first_row + r, i] K[first_col + c, i]
//
// to a buffer that the second-level cache holds, and the steps of an epilogue read it there:
//
//     S = scale * product + bias + key_bias
//
// What is found of a chunk is added to what was found of those before it, in a fixed order: no atomics, the same bits
// in every run. Nothing synchronises, and no step knows a value but by the device's memory.
//
// What lives here: the contract. What lives elsewhere: the walk through tiles of a chunk (tile.cuh), the steps' kernels
// (*.cu), their launches (steps.cu), the loop over chunks (python/fusionsum/chunks.py).
#pragma once
#include "../../scores.h"

namespace fusionsum {

enum class Step : uint8_t {
  log_sum_exp,    // of rows and of columns: reference and sum of exp(S - reference), 2 values each
  pair_sums,      // how many pairs are positive, the sum of their scores; the sum of scores above -inf, their number
  softmax_gamma,  // Gamma = dL/dS, and its sums by columns
  sigmoid,        // the sums by rows of the losses; with `gamma` the same of Gamma
  leave_out,      // marks the pairs that lists exclude, for the two steps that follow
  top_k,          // merges each row's scores into its best k
  rank,           // how many scores of a row are above its target's, and how many equal to it
};

// How many values a step finds of each row, of each column and of the whole chunk.
struct Values {
  int of_row, of_col, of_all;
};
constexpr Values values_of(Step step) {
  switch (step) {
    case Step::log_sum_exp:
      return {2, 2, 0};
    case Step::pair_sums:
      return {4, 4, 0};
    case Step::softmax_gamma:
      return {0, 1, 2};
    case Step::sigmoid:
      return {1, 0, 2};
    case Step::rank:
      return {2, 0, 0};
    default:
      return {0, 0, 0};
  }
}

struct Chunk {
  Step step;
  DType dtype;  // of products and of Gamma: f32 or f64
  void* products;
  int64_t rows, cols, stride;  // rows are `stride` entries apart, a multiple of 16 bytes
  int64_t first_row, first_col, all_rows, all_cols;
  int64_t skip;  // columns that the chunk before it has had: chunks are of one shape, so that equal keys score alike

  const double *scale_at, *bias_at;  // null: the values
  double scale, bias;
  const void* key_bias;  // null: none
  DType key_bias_dtype;
  int64_t key_bias_stride;

  // Pairs, as ../../scores.h has them; but codes are any integers.
  const int64_t *query_labels, *key_labels, *query_ids, *key_ids;
  const uint8_t* exclude;
  int64_t exclude_row, exclude_col;
  const int64_t* places;  // leave_out: row * all_cols + col of each pair, ascending
  int64_t places_count;

  // What is found of all rows, [value][row], and of all columns, alike; null: not asked for. Of Gamma in all: the sums
  // of Gamma * product and of Gamma.
  double *of_rows, *of_cols, *of_all;

  bool only_positives;  // log_sum_exp
  double* diagonal;     // log_sum_exp: per row, the score of its pair on the diagonal; null: not asked for

  bool any;
  const double *row_coefs, *col_coefs;  // as ../../scores.h has query_coefs and key_coefs
  void* gamma;                          // as `products` lies, which it may be; null: losses alone
  DType gamma_dtype;                    // that of the products or, of f32, bf16

  int64_t k;
  void* best;        // per row k hits (select.cuh), in order
  void* values;      // per row k scores; null: more chunks follow
  int64_t* indices;  // alike

  const void* target_scores;  // rank: per row, in the products' dtype
  const int64_t* targets;
};

constexpr int64_t kMostSelected = 1024;  // k of the step top_k; beyond, the scores are sorted

}  // namespace fusionsum
