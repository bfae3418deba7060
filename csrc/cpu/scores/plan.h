// How scores (../../scores.h) are cut up on the CPU.
//
//   panel    as many keys as a tile has columns, transposed: the keys' entries of a term lie side by side (of a top-k,
//            which consumes the scores of a key with all queries, the queries')
//   strip    the scores of a tile's rows of queries with a block of keys: they stay in the first-level cache
//   stripe   the queries of one task; keys are cut into segments
//   chunk    the keys (or queries) for which memory is held at a time
//
// Each chunk of keys is packed into panels first, by all tasks; then tasks consume it. Where an epilogue keeps
// something for each key too, the stripes and segments form a Latin square: in step t, stripe p meets segment
// (p + t) mod stripes. So no two tasks write the same, and the order of every sum depends on the sizes alone.
//
// What lives here: the plan; plan.cpp makes it. What lives elsewhere: the tasks themselves (walk.inl).
#pragma once
#include "../../scores.h"
#include "../work.h"

namespace fusionsum {

template <class T>
struct Hit {
  T score;
  int64_t key;
};

struct ScorePlan {
  const Scores* scores;
  bool latin;     // else each task has one stripe and one segment of every chunk
  bool turned;    // top_k: the queries are packed, and a tile's rows are keys, each of which is read once
  bool by_dots;   // few queries: each key is read once, as it lies
  int64_t block;  // keys of a strip; queries that are multiplied together
  int64_t query_chunk, key_chunk, query_chunks, key_chunks;
  int64_t stripe, stripes;    // of a chunk of queries
  int64_t segment, segments;  // of a chunk of keys
  int64_t range, ranges;      // of terms, where Gamma is given
  int64_t tasks, steps;
  bool bf16_pairs;
  int64_t lanes;                         // of a row of a side
  bool queries_in_place, keys_in_place;  // a side is one factor that can be read where it lies
  // Memory of all tasks, in T unless said: one chunk's.
  char *panels, *query_rows, *key_rows;
  char *bias, *label, *id;  // per key
  char* coefs;              // kSoftmaxCoefs x key_chunk
  char* targets;            // rank: per query, its target's score
  double* d_scale;          // per stripe of all chunks
  // top_k: per query of a chunk and segment (a slot), room for candidates; the threshold is set once the slot is full.
  int64_t room;
  char *candidates, *threshold;
  int64_t* held;
  uint8_t* full;
  void (*compact)(const ScorePlan&, int64_t slot);                                    // drops all but the best k
  void (*select)(const ScorePlan&, int64_t first_query, int64_t begin, int64_t end);  // the best k of all segments
  // Places in a thread's scratch memory, in bytes.
  int64_t strip, gamma, row, tile, panel, key_reference, key_sum, bound, scratch_bytes;
};

// The loops of one instruction set, for float32 [0] and float64 [1].
struct ScoreKernels {
  int tile_rows[2], tile_cols[2];
  void (*walk[2])(const ScorePlan&, int64_t task, int64_t slice, char* scratch);
  bool bf16_pairs;  // sides are multiplied as pairs of bf16: only those that `suits_bf16_pairs` says
};

// Whether all that forms the sides is bf16, and the scores need not be closer than its rounding, or no product is
// rounded: search is exact.
bool suits_bf16_pairs(const Scores& scores);

// As `execute` of a sum (sum/plan.h).
bool execute(const Scores& scores, const ScoreKernels& kernels, Workspace& workspace, bool (*interrupted)());

}  // namespace fusionsum
