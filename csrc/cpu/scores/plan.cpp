// From scores to a plan, and its execution; the choice of the best candidates of a top-k. Compiled for the baseline:
// nothing here depends on the instruction set but the shape of its tile.
#include "plan.h"

#include <algorithm>
#include <limits>
#include <new>
#include <numeric>

#include "../../space.h"

namespace fusionsum {
namespace {

constexpr int64_t kMaxStripes = 64, kFewestStripes = 16;  // as many cores are kept busy
// Of a chunk of keys, packed and formed: of a Latin square, whose segments are chunks' parts; of others, which read it
// once.
constexpr int64_t kLatinBytes = int64_t{32} << 20, kKeyBytes = int64_t{4} << 20;
constexpr int64_t kQueryBytes = int64_t{32} << 20;  // of a chunk of queries, formed, or of its candidates
constexpr int64_t kQueryChunk = 1 << 16;
constexpr int64_t kFewestKeys = 64;  // of a segment: with fewer, gradients are read and written more than multiplied
// Of a task's slice, between two looks for Ctrl-C, in multiply-adds, of which a score's epilogue takes kEpilogueCost as
// long: a tenth of a second without vectors.
constexpr int64_t kSliceCost = 1 << 27, kEpilogueCost = 16;
constexpr int64_t kMaxTerms = int64_t{1} << 40;  // no memory holds a tile of longer rows
constexpr int64_t kByDots = 8;  // queries: so few are multiplied faster by keys as they lie than by packed ones

int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }
int64_t round_down(int64_t n, int64_t to) { return n / to * to; }

bool in_place(const Side& side, const Scores& s, bool bf16_pairs) {
  const Factor& f = side.factor[0];
  const DType dtype = bf16_pairs ? DType::bf16 : s.wide ? DType::f64 : DType::f32;
  const bool whole_pairs = s.terms % 2 == 0 && f.row % 2 == 0 && reinterpret_cast<uintptr_t>(f.data) % 4 == 0;
  return side.factors == 1 && f.dtype == dtype && f.activation == Activation::none && !f.mask && f.term == 1 &&
         (!bf16_pairs || whole_pairs);
}

// Keys and queries of a block: whole tiles both ways, whose Gamma stays in the second-level cache.
int64_t block_of(int64_t tile_rows, int64_t tile_cols, int64_t item) {
  const int64_t tile = std::lcm(tile_rows, tile_cols), most = item == 8 ? 128 : 256;
  return std::max<int64_t>(1, most / tile) * tile;
}

// ---- candidates -----------------------------------------------------------------------------------------------------

// Larger scores first, equal ones by the lower key, NaN after all numbers.
template <class T>
bool better(const Hit<T>& a, const Hit<T>& b) {
  const bool number_a = a.score == a.score, number_b = b.score == b.score;
  if (!number_a || !number_b) return number_a != number_b ? number_a : a.key < b.key;
  return a.score != b.score ? a.score > b.score : a.key < b.key;
}

template <class T>
Hit<T>* candidates(const ScorePlan& p, int64_t slot) {
  return reinterpret_cast<Hit<T>*>(p.candidates) + slot * p.room;
}

template <class T>
void compact(const ScorePlan& p, int64_t slot) {
  const int64_t k = p.scores->k;
  Hit<T>* const all = candidates<T>(p, slot);
  std::nth_element(all, all + k - 1, all + p.held[slot], better<T>);
  p.held[slot] = k;
  T least = all[k - 1].score;  // while it is NaN, every score is kept: any number is better
  __atomic_store(reinterpret_cast<T*>(p.threshold) + slot, &least, __ATOMIC_RELAXED);
  __atomic_store_n(&p.full[slot], uint8_t{least == least}, __ATOMIC_RELEASE);
}

template <class T>
void select(const ScorePlan& p, int64_t first_query, int64_t begin, int64_t end) {
  const Scores& s = *p.scores;
  for (int64_t b = begin; b < end; ++b) {
    Hit<T>* const all = candidates<T>(p, b * p.segments);
    int64_t count = 0;
    for (int64_t slot = b * p.segments; slot < (b + 1) * p.segments; ++slot) {
      std::copy_n(candidates<T>(p, slot), p.held[slot], all + count);
      count += p.held[slot];
    }
    const int64_t found = std::min(count, s.k);
    std::partial_sort(all, all + found, all + count, better<T>);
    T* const values = static_cast<T*>(s.values) + (first_query + b) * s.k;
    int64_t* const indices = s.indices + (first_query + b) * s.k;
    for (int64_t i = 0; i < s.k; ++i) {
      values[i] = i < found ? all[i].score : -std::numeric_limits<T>::infinity();
      indices[i] = i < found ? all[i].key : -1;
    }
  }
}

// ---- sizes ----------------------------------------------------------------------------------------------------------

// Takes pieces of one block of memory, whose address is known once its size is.
struct Layout {
  int64_t bytes = 0;
  int64_t take(int64_t count, int64_t size) {
    const int64_t at = bytes;
    bytes += in_cache_lines(count * size);
    return at;
  }
};

struct Tile {
  int64_t rows, cols;
};

void cut(const Scores& s, Tile tile, bool bf16_pairs, ScorePlan& p) {
  const int64_t item = s.wide ? 8 : 4, queries = s.queries.rows, keys = s.keys.rows;
  p.scores = &s;
  const bool given = s.epilogue == Epilogue::store && s.differentiates;  // Gamma
  p.latin = (s.differentiates && !given) || s.epilogue == Epilogue::softmax;
  p.by_dots =
      queries <= kByDots && !s.differentiates && (s.epilogue == Epilogue::store || s.epilogue == Epilogue::top_k);
  p.turned = s.epilogue == Epilogue::top_k && !p.by_dots;
  p.block = block_of(tile.rows, tile.cols, item);
  p.queries_in_place = in_place(s.queries, s, bf16_pairs);
  p.keys_in_place = in_place(s.keys, s, bf16_pairs);

  p.bf16_pairs = bf16_pairs;
  p.lanes = bf16_pairs ? divide_up(s.terms, 2) : s.terms;
  const int64_t row = std::max<int64_t>(1, p.lanes) * item;
  p.query_chunk = std::min(queries, kQueryChunk);
  if (!p.queries_in_place || p.turned)
    p.query_chunk = std::min(p.query_chunk, std::max<int64_t>(p.block, kQueryBytes / row));
  // Segments keep threads busy too where a key's scores need not meet again: then stripes are as long as a block, for a
  // stripe reads all panels of its segment.
  const bool cut_keys = !p.latin && !given && (s.epilogue == Epilogue::top_k || s.epilogue == Epilogue::store);
  const auto stripe_of = [&](int64_t rows) {
    if (rows >= kFewestStripes * p.block) return divide_up(rows, kMaxStripes * p.block) * p.block;
    const int64_t stripes = cut_keys ? divide_up(rows, p.block) : kFewestStripes;
    return std::min(p.block, std::max(2 * tile.rows, round_up(divide_up(rows, stripes), tile.rows)));
  };
  const int64_t score = s.terms + kEpilogueCost, most_rows = kSliceCost / (std::min(keys, p.block) * score);
  const int64_t longest = std::max(2 * tile.rows, round_down(most_rows, most_rows < p.block ? tile.rows : p.block));
  p.stripe = stripe_of(p.query_chunk);
  if (p.turned)  // as many panels as stay in the second-level cache
    p.stripe = round_up(divide_up(p.query_chunk, divide_up(p.query_chunk, p.block)), tile.cols);
  const bool keys_twice = !p.keys_in_place && !p.by_dots && !p.turned;
  const int64_t key_room = (p.latin ? kLatinBytes : kKeyBytes) / (row * (keys_twice ? 2 : 1));
  // Each step of a Latin square has a segment for every stripe: no more stripes than give segments of kFewestKeys, and
  // beyond kFewestStripes no more than give whole blocks (half a block took InfoNCE of B = 32768 1.3 times as long).
  if (p.latin) {
    const int64_t whole = std::max(kFewestStripes, divide_up(std::min(keys, key_room), p.block));
    const int64_t most = std::min(divide_up(keys, kFewestKeys), whole);
    p.stripe = std::max(p.stripe, round_up(divide_up(p.query_chunk, most), tile.rows));
  }
  p.stripe = std::min(p.stripe, p.turned ? round_up(longest, tile.cols) : longest);
  p.query_chunk = std::min(p.query_chunk, (given ? 2 * kFewestStripes : kMaxStripes) * p.stripe);
  if (given) {  // a segment meets all queries of a chunk
    const int64_t most = round_down(8 * kSliceCost / (p.block * score), p.block);
    p.query_chunk = std::min(p.query_chunk, std::max(p.block, most));
    p.stripe = std::min(p.stripe, p.query_chunk);
  }
  p.stripes = divide_up(p.query_chunk, p.stripe);

  p.segments = p.latin ? p.stripes : cut_keys ? divide_up(kFewestStripes, p.stripes) : 1;
  const int64_t most_keys = std::min(key_room, kSliceCost / (p.stripe * score) * p.segments);
  p.key_chunk = std::min(std::max(p.block, round_down(most_keys, p.block)), round_up(keys, tile.cols));
  p.segment = round_up(divide_up(p.key_chunk, p.segments), tile.cols);
  p.segments = divide_up(p.key_chunk, p.segment);
  if (given) {
    p.segment = round_up(divide_up(p.key_chunk, divide_up(p.key_chunk, p.block)), tile.cols);  // of about one size
    p.segments = divide_up(p.key_chunk, p.segment);
    p.range = std::max(4 * tile.cols, round_up(divide_up(s.terms, divide_up(kFewestStripes, p.segments)), tile.cols));
    p.ranges = std::max<int64_t>(1, divide_up(s.terms, p.range));
  }
  if (s.epilogue == Epilogue::top_k) {
    p.room = std::min(s.k + std::max<int64_t>(s.k, 64), divide_up(keys, p.key_chunk) * p.segment);
    const int64_t slot = p.room * (s.wide ? sizeof(Hit<double>) : sizeof(Hit<float>));
    const int64_t most = std::max<int64_t>(1, kQueryBytes / (slot * p.segments));
    if (p.query_chunk > most) {
      p.query_chunk = most;
      p.stripe = std::min(p.stripe, round_up(most, p.turned ? tile.cols : tile.rows));
      p.stripes = divide_up(p.query_chunk, p.stripe);
    }
  }
  p.query_chunks = divide_up(queries, p.query_chunk);
  p.key_chunks = divide_up(keys, p.key_chunk);
  p.steps = p.latin ? p.stripes : given ? 2 : 1;
  p.tasks = p.latin ? p.stripes : given ? std::max(p.stripes, p.segments * p.ranges) : p.stripes * p.segments;
}

// Places of all that tasks share, then of a thread's scratch memory. Called once for the sizes, once more with memory.
int64_t lay_out(const Scores& s, Tile tile, ScorePlan& p, char* memory) {
  const int64_t item = s.wide ? 8 : 4;
  Layout shared;
  const auto take = [&](bool wanted, int64_t count, int64_t size) {
    return wanted ? memory + shared.take(count, size) : nullptr;
  };
  const int64_t keys = round_up(p.key_chunk, tile.cols), slots = p.query_chunk * p.segments;
  const bool scores = !(s.epilogue == Epilogue::store && s.differentiates), top_k = s.epilogue == Epilogue::top_k;
  p.panels = take(scores && !p.by_dots, (p.turned ? round_up(p.query_chunk, tile.cols) : keys) * p.lanes, item);
  p.query_rows = take(!p.queries_in_place, p.query_chunk * p.lanes, item);
  p.key_rows = take(!p.keys_in_place, p.key_chunk * p.lanes, item);
  p.bias = take(true, keys, item);
  p.label = take(s.key_labels, keys, item);
  p.id = take(s.key_ids, keys, item);
  p.coefs = take(s.key_coefs, kSoftmaxCoefs * keys, item);
  p.d_scale = reinterpret_cast<double*>(take(s.d_scale, p.query_chunks * p.stripes, sizeof(double)));
  p.targets = take(s.epilogue == Epilogue::rank, p.query_chunk, item);
  p.candidates = take(top_k, slots * p.room, s.wide ? sizeof(Hit<double>) : sizeof(Hit<float>));
  p.threshold = take(top_k, slots, item);
  p.held = reinterpret_cast<int64_t*>(take(top_k, slots, sizeof(int64_t)));
  p.full = reinterpret_cast<uint8_t*>(take(top_k, slots, 1));
  p.compact = s.wide ? compact<double> : compact<float>;
  p.select = s.wide ? select<double> : select<float>;

  Layout own;
  // By dots, up to kByDots queries beside each other, or a vector.
  const int64_t strip_rows = s.differentiates ? p.block : p.by_dots ? 16 : tile.rows;
  p.strip = own.take(strip_rows * (p.block + 16), item);
  p.gamma = own.take(s.differentiates && p.bf16_pairs ? p.block * (p.block + 16) / 2 : 0, item);
  p.row = own.take(3 * s.terms, item);
  p.tile = own.take(tile.rows * (p.lanes + 16), item);
  p.panel = own.take(std::max(p.block, s.epilogue == Epilogue::rank ? p.lanes : 0) * tile.cols, item);
  p.key_reference = own.take(p.block, item);
  p.key_sum = own.take(p.block, item);
  p.bound = own.take(p.block, item);
  p.scratch_bytes = own.bytes;
  return shared.bytes;
}

}  // namespace

bool suits_bf16_pairs(const Scores& s) {
  const bool searches = s.epilogue == Epilogue::top_k || s.epilogue == Epilogue::rank;
  const auto suits = [&](const Side& side) {
    const Factor* const all = side.factor;
    return std::all_of(all, all + side.factors, [](const Factor& f) { return f.dtype == DType::bf16; }) &&
           (!searches || (side.factors == 1 && all->activation == Activation::none));
  };
  return !s.wide && suits(s.queries) && suits(s.keys);
}

bool execute(const Scores& s, const ScoreKernels& kernels, Workspace& workspace, bool (*interrupted)()) {
  const double lowest = s.wide ? std::numeric_limits<double>::lowest() : std::numeric_limits<float>::lowest();
  const Statistics none{lowest, 0, 0, std::numeric_limits<double>::lowest(), 0, 0, 0};
  if (s.query_stats) std::fill_n(s.query_stats, s.queries.rows, none);
  if (s.key_stats) std::fill_n(s.key_stats, s.keys.rows, none);
  if (s.d_scale) *s.d_scale = 0;
  if (!s.queries.rows || !s.keys.rows || (s.epilogue == Epilogue::top_k && !s.k)) return true;
  if (s.terms > kMaxTerms) throw std::bad_alloc();  // sizes in bytes would wrap around

  const Tile tile{kernels.tile_rows[s.wide], kernels.tile_cols[s.wide]};
  ScorePlan plan{};
  cut(s, tile, kernels.bf16_pairs, plan);
  const int64_t bytes = lay_out(s, tile, plan, nullptr);
  const int threads = threads_for(plan.tasks);
  char* const memory = workspace.reserve(bytes + threads * plan.scratch_bytes);
  lay_out(s, tile, plan, memory);

  struct Context {
    const ScorePlan* plan;
    const ScoreKernels* kernels;
    int64_t slice;
  } context{&plan, &kernels, 0};
  const bool given = s.epilogue == Epilogue::store && s.differentiates;
  const int64_t scores = given ? plan.query_chunk * plan.segment / plan.ranges : plan.stripe * plan.segment;
  const Work work{plan.tasks, 1,
                  // Without vectors, an entry with the slowest activation takes as long as a few multiply-adds.
                  1 + scores * (s.terms + kEpilogueCost) / 2, threads, memory + bytes, plan.scratch_bytes,
                  [](const void* context, int64_t task, int64_t, char* scratch) {
                    const Context& c = *static_cast<const Context*>(context);
                    c.kernels->walk[c.plan->scores->wide](*c.plan, task, c.slice, scratch);
                  },
                  &context};
  const int64_t slices = plan.query_chunks * (plan.key_chunks * (1 + plan.steps) + 1);
  int64_t done = 0;                                  // since `interrupted` was asked
  for (; context.slice < slices; ++context.slice) {  // all tasks meet after each
    if (done >= kPauseCost) {
      done = 0;
      if (interrupted()) return false;
    }
    if (!carry_out(work, interrupted)) return false;
    done += work.slice_cost * divide_up(work.tasks, threads);
  }
  for (int64_t i = 0; s.d_scale && i < plan.query_chunks * plan.stripes; ++i) *s.d_scale += plan.d_scale[i];
  return true;
}

}  // namespace fusionsum
