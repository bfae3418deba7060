// The contract of scores: what crosses from the bindings to the kernels. Plain data, like sum.h.
//
//     S[b, c] = scale * sum_i A[b, i] K[c, i] + bias + key_bias[c]
//
// A is the queries' side, K the keys': a side is the product of its factors, activations and masks applied; the weights
// of the terms are one more factor of the queries, the same for all rows. S is never stored (unless it is asked for):
// an epilogue consumes it a strip at a time, or turns it into Gamma = dL/dS, of which the sides' gradients are made:
//
//     d_queries = Gamma K,    d_keys = Gamma^T A,    d_scale = sum Gamma * (A K^T),    d_key_bias = sum_b Gamma
//
// without `scale`.
//
// Sums are in float32 (`wide`: float64). With AVX512_BF16, where all factors and the weights are bf16, sides are
// multiplied as pairs of bf16 and summed in float32: a side that is made of several factors, activations or weights is
// rounded to bf16 once it is formed, as is Gamma. Each adds 2^-8 of the magnitude of a product to its error, and what
// is below 2^-126 counts as zero. Search takes pairs only where nothing is rounded.
//
// What lives elsewhere: the order of the work (cpu/scores/plan.h), the epilogues (cpu/scores/*.inl),
// what losses are made of them (python/fusionsum/losses.py).
#pragma once
#include "sum.h"

namespace fusionsum {

struct Factor {
  const void* data;
  const uint8_t* mask;  // one byte per row, 0 where the factor is absent; null: present everywhere
  DType dtype;
  Activation activation;
  int64_t row, term, mask_row;  // strides, in elements
};

struct Side {
  int64_t rows;
  int factors;
  Factor factor[kMaxFactors + 1];
};

enum class Epilogue : uint8_t {
  store,    // S itself; its gradient is given
  softmax,  // statistics of rows and columns, from which log-sum-exps are made
  sigmoid,  // the losses of the rows
  top_k,    // each row's largest scores
  rank,     // how many scores are above each row's target
};

// Of one query over its keys, or of one key over its queries; of pairs that are not excluded.
struct Statistics {
  double reference, sum;                // sum of exp(score - reference)
  double positives;                     // how many
  double positive_reference, positive;  // sum over positives of the score or, with `any`, of exp(score - reference)
  double total, valid;                  // sum and number of scores above -inf, where they are asked for
};

struct Scores {
  Side queries, keys;
  int64_t terms;
  bool wide;      // float64, else float32: of sides, scores, gradients
  double absent;  // what an absent factor counts as: 1 or 0
  double scale, bias;
  Factor key_bias;  // a value per row; without data: none

  // Pairs. Codes are equal where labels are; null labels: key b is the positive of query b.
  const int32_t *query_labels, *key_labels;
  const int32_t *query_ids, *key_ids;  // pairs of equal code are excluded, unless positive
  const uint8_t* exclude;              // a byte per pair, not 0 where it is excluded, even if positive
  int64_t exclude_row, exclude_col;
  const int64_t *excluded_from, *excluded;  // per query, which of `excluded` are its own: keys, in ascending order

  Epilogue epilogue;
  bool differentiates;

  void* matrix;  // store: S, or its gradient
  DType matrix_dtype;
  int64_t matrix_row, matrix_col;

  bool any, symmetric, totals;  // softmax
  Statistics *query_stats, *key_stats;
  const double *query_coefs, *key_coefs;  // softmax: 5 x rows (SoftmaxCoefs), sigmoid: 1 x rows

  double* losses;  // sigmoid

  void *d_queries, *d_keys;      // rows x terms, set to zero; null: not asked for
  double *d_scale, *d_key_bias;  // d_scale asks for d_queries too

  int64_t k;  // top_k
  void* values;
  int64_t* indices;

  const int64_t* targets;    // rank; negative: the target is no key here, and its score is given
  void* target_scores;       // in the scores' dtype: what targets score here is written; null: none is given or wanted
  int64_t *greater, *equal;  // null: the targets' scores alone are wanted
};

// Gamma = exp(S - lse) softmax - smoothing - [positive] positive (any: times exp(S - positive_lse)), of queries and of
// keys, which are added.
enum SoftmaxCoefs { kLse, kSoftmax, kPositiveLse, kPositive, kSmoothing, kSoftmaxCoefs };

}  // namespace fusionsum
