// A task of a plan (plan.h): its share of the packing of a chunk of keys, then its stripe of queries against a segment
// of them, strip by strip.
#include "side.inl"
#include "tile.inl"
#include "pairs.inl"
#include "softmax.inl"
#include "sigmoid.inl"
#include "top_k.inl"
#include "rank.inl"

namespace fusionsum {
namespace FUSIONSUM_ISA {
namespace {

template <class P>
class Scorer {
  using T = typename P::Lane;
  using S = Shape<T>;

 public:
  Scorer(const ScorePlan& plan, int64_t task, char* scratch)
      : p(plan), s(*plan.scores), terms(s.terms), lanes(lanes_of<P>(terms)), task(task), scratch(scratch) {}

  void slice(int64_t slice) {
    const int64_t of_chunk = p.key_chunks * (1 + p.steps) + 1;
    first_query = slice / of_chunk * p.query_chunk;
    query_count = smaller(p.query_chunk, s.queries.rows - first_query);
    queries = rows_of<P>(s.queries, p.queries_in_place, p.query_rows, first_query, lanes);
    const int64_t within = slice % of_chunk, step = within % (1 + p.steps) - 1;
    if (within == of_chunk - 1) return finish();
    first_key = within / (1 + p.steps) * p.key_chunk;
    key_count = smaller(p.key_chunk, s.keys.rows - first_key);
    keys = rows_of<P>(s.keys, p.keys_in_place, p.key_rows, first_key, lanes);
    if (step < 0) {
      prepare();
      if (first_key == 0) begin();
      return;
    }
    if (s.epilogue == Epilogue::store && s.differentiates) {
      if (step == 0) return share(s.d_queries ? p.stripes : 0, [&](int64_t stripe) { differentiate_queries(stripe); });
      return share(s.d_keys ? p.segments * p.ranges : 0,
                   [&](int64_t i) { differentiate_keys(i / p.ranges, i % p.ranges * p.range); });
    }
    const int64_t stripe = p.latin ? task : task / p.segments;
    const int64_t segment = p.latin ? (task + step) % p.stripes : task % p.segments;
    const int64_t end = smaller(query_count, (stripe + 1) * p.stripe),
                  last_key = smaller(key_count, (segment + 1) * p.segment);
    if (s.epilogue == Epilogue::top_k) return search(stripe * p.stripe, end, segment, last_key);
    consume(stripe * p.stripe, end, segment, last_key);
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  T* memory(char* place) const { return piece<T>(place, 0); }
  T* place(int64_t at) const { return piece<T>(scratch, at); }

  // This task's share of `count` things.
  template <class F>
  void share(int64_t count, F f) const {
    for (int64_t i = task * count / p.tasks; i < (task + 1) * count / p.tasks; ++i) f(i);
  }

  // Forms `count` rows of a chunk of a side from row `at` of the chunk on.
  void form(const Side& side, char* formed, int64_t first, int64_t at, int64_t count) const {
    for (int64_t r = at; r < at + count; ++r)
      P::form(side, s.absent, terms, first + r, memory(formed) + r * lanes, place(p.row));
  }
  void pack(const Rows<T>& rows, int64_t at, int64_t count) const {
    pack_panel(Rows<T>{rows.row(at), rows.step}, count, lanes, S::cols, memory(p.panels) + at * lanes);
  }

  void begin() {
    share((query_count + S::cols - 1) / S::cols, [&](int64_t panel) {
      const int64_t at = panel * S::cols, count = smaller(S::cols, query_count - at);
      if (!p.queries_in_place) form(s.queries, p.query_rows, first_query, at, count);
      if (p.turned) pack(queries, at, count);
    });
    if (s.epilogue == Epilogue::top_k)
      share(p.segments * p.query_chunk, [&](int64_t slot) {
        p.held[slot] = 0;
        p.full[slot] = 0;
      });
  }

  void prepare() {
    share((key_count + S::cols - 1) / S::cols, [&](int64_t panel) {
      const int64_t at = panel * S::cols, count = smaller(S::cols, key_count - at);
      if (!p.keys_in_place) form(s.keys, p.key_rows, first_key, at, count);
      if (p.panels && !p.turned) pack(keys, at, count);
      for (int64_t j = at; j < at + S::cols; ++j) describe_key(j, j < key_count);
    });
  }

  T bias_of(int64_t c) const {
    double bias = s.bias;
    const Factor& own = s.key_bias;
    if (own.data)
      with_dtype(own.dtype, own.data, [&](auto data) { bias += static_cast<double>(widen(data[c * own.row])); });
    return static_cast<T>(bias);
  }

  // What strips read of a key beside its terms; of the places beyond the keys, whose scores are -inf.
  void describe_key(int64_t j, bool is_key) const {
    const int64_t c = first_key + j;
    memory(p.bias)[j] = is_key ? bias_of(c) : -kInfinity<T>;
    if (s.key_labels) memory(p.label)[j] = is_key ? static_cast<T>(s.key_labels[c]) : T(-1);
    if (s.key_ids) memory(p.id)[j] = is_key ? static_cast<T>(s.key_ids[c]) : T(-1);
    for (int i = 0; s.key_coefs && i < kSoftmaxCoefs; ++i)
      memory(p.coefs)[i * p.key_chunk + j] = is_key ? static_cast<T>(s.key_coefs[i * s.keys.rows + c]) : T(0);
  }

  Keys<T> describe(int64_t at, int64_t count) const {
    Keys<T> k{};
    k.first = first_key + at;
    k.count = count;
    k.padded = (count + S::width - 1) / S::width * S::width;
    k.bias = memory(p.bias) + at;
    k.label = memory(p.label) + at;
    k.id = memory(p.id) + at;
    for (int i = 0; s.key_coefs && i < kSoftmaxCoefs; ++i) k.coef[i] = memory(p.coefs) + i * p.key_chunk + at;
    k.reference = place(p.key_reference);
    k.sum = place(p.key_sum);
    return k;
  }

  // A tile's rows from `from` on, of which `count` are there: where they lie or, where the tile would read beyond them
  // or their entries of a term would fall into one set of the first-level cache (4 KB apart), copied.
  const T* tile_of(const Rows<T>& rows, int64_t from, int64_t count, int64_t& step) const {
    step = rows.step;
    if (count == S::rows && step * static_cast<int64_t>(sizeof(T)) % 4096) return rows.row(from);
    step = lanes + 16;
    T* const to = place(p.tile);
    for (int64_t r = 0; r < S::rows; ++r) {
      if (r < count) {
        load_row(to + r * step, rows.row(from + r), 1, lanes);
      } else {
        fill(to + r * step, T(0), lanes);
      }
    }
    return to;
  }

  void consume(int64_t from, int64_t to, int64_t segment, int64_t last_key) {
    for (int64_t at = segment * p.segment; from < to && at < last_key; at += p.block) {
      const Keys<T> block = describe(at, smaller(p.block, last_key - at));
      const bool key_stats = s.epilogue == Epilogue::softmax && !s.differentiates && s.symmetric;
      for (int64_t rows = from; rows < to; rows += p.block) {
        const int64_t end = smaller(to, rows + p.block);
        if (key_stats) begin_keys(s, block);
        for (int64_t row = rows; row < end; row += S::rows)
          strip(row, smaller(S::rows, end - row), at, block,
                place(p.strip) + (s.differentiates ? (row - rows) * step() : 0));
        if (s.differentiates) differentiate(rows, end - rows, at, block);
        if (key_stats) end_keys(s, block);
      }
    }
  }
  int64_t step() const { return p.block + 16; }  // of a strip's rows: not a power of two apart

  // The scores of a tile's rows with a block of keys, and what the epilogue makes of them.
  void strip(int64_t from, int64_t count, int64_t at, const Keys<T>& block, T* to) {
    T* const targets = memory(p.targets) + from;
    if (s.epilogue == Epilogue::rank) {
      if (block.first == 0) score_targets(from, count, targets);
      if (!s.greater) return;
    }
    int64_t direct = 0;  // columns
    if (p.by_dots) {
      score_by_dots<P>(lanes, Rows<T>{queries.row(from), queries.step}, count, Rows<T>{keys.row(at), keys.step},
                       block.count, static_cast<T>(s.scale), block.bias, to, step(), 1);
    } else {
      int64_t a_row;
      const T* const a = tile_of(queries, from, count, a_row);
      // Whole tiles of scores that are stored as they are go where they belong.
      const bool as_they_are = s.epilogue == Epilogue::store && s.matrix_dtype == kDType<T> && s.matrix_col == 1;
      direct = as_they_are && count == S::rows ? block.count / S::cols * S::cols : 0;
      if (direct)
        score_strip<P>(lanes, a, a_row, memory(p.panels) + at * lanes, direct, static_cast<T>(s.scale), block.bias,
                       static_cast<T*>(s.matrix) + (first_query + from) * s.matrix_row + block.first, s.matrix_row);
      if (direct == block.count) return;
      score_strip<P>(lanes, a, a_row, memory(p.panels) + (at + direct) * lanes, block.padded - direct,
                     static_cast<T>(s.scale), block.bias + direct, to + direct, step());
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t b = first_query + from + r;
      T* const row = to + r * step();
      fill(row + block.count, -kInfinity<T>, block.padded - block.count);  // 0 * inf gave NaN there
      switch (s.epilogue) {
        case Epilogue::store:
          with_dtype(s.matrix_dtype, s.matrix, [&](auto data) {
            store_row(unconst(data) + b * s.matrix_row + (block.first + direct) * s.matrix_col, s.matrix_col,
                      row + direct, block.count - direct, false);
          });
          break;
        case Epilogue::softmax:
          s.differentiates ? softmax_gamma(s, b, block, row) : softmax_row(s, b, block, row);
          break;
        case Epilogue::sigmoid:
          s.differentiates ? sigmoid_gamma(s, b, block, row) : sigmoid_row(s, b, block, row);
          break;
        case Epilogue::top_k:  // search
          break;
        case Epilogue::rank:
          rank_row(s, b, targets[r], block, row, s.greater[b], s.equal[b]);
          break;
      }
    }
  }

  // top_k: the scores of keys, a strip's rows, with a block of queries.
  void search(int64_t from, int64_t to, int64_t segment, int64_t last_key) const {
    T *const strip = place(p.strip), *const bound = place(p.bound), *const no_bias = place(p.key_sum);
    fill(no_bias, T(0), p.block);
    for (int64_t at = segment * p.segment; at < last_key; at += p.block)
      for (int64_t q = from; q < to; q += p.block) {
        const int64_t count = smaller(p.block, to - q), padded = (count + S::width - 1) / S::width * S::width;
        for (int64_t j = 0; j < padded; ++j) bound[j] = j < count ? find_bound<T>(p, q + j, segment) : kInfinity<T>;
        const int64_t end = smaller(last_key, at + p.block), of_strip = p.by_dots ? p.block : S::rows;
        const int64_t step = p.by_dots ? padded : this->step();
        for (int64_t row = at; row < end; row += of_strip) {
          const int64_t rows = smaller(of_strip, end - row);
          if (p.by_dots) {
            score_by_dots<P>(lanes, Rows<T>{queries.row(q), queries.step}, count, Rows<T>{keys.row(row), keys.step},
                             rows, static_cast<T>(s.scale), no_bias, strip, 1, step);
          } else {
            int64_t a_row;
            const T* const a = tile_of(keys, row, rows, a_row);
            score_strip<P>(lanes, a, a_row, memory(p.panels) + q * lanes, padded, static_cast<T>(s.scale), no_bias,
                           strip, step);
          }
          for (int64_t r = 0; r < rows; ++r) {
            // Keys come from memory once: those of the strip after the next are asked for while scores are compared.
            if (!p.by_dots && row + 2 * S::rows + r < last_key)
              for (int64_t i = 0; i < lanes; i += kLine) __builtin_prefetch(keys.row(row + 2 * S::rows + r) + i);
            top_k_key(p, first_query, q, count, segment, first_key + row + r, memory(p.bias)[row + r], strip + r * step,
                      bound);
          }
        }
      }
  }

  // The scores of queries with their targets, by the same operations as all others, so that they equal themselves.
  void score_targets(int64_t from, int64_t count, T* to) const {
    T* const panel = place(p.panel);
    T* const key = place(p.row) + 2 * terms;
    T bias[S::cols], scores[S::rows * S::cols];
    for (int64_t first = 0; first < count; first += S::cols) {
      const int64_t some = smaller(S::cols, count - first);
      fill(panel, T(0), lanes * S::cols);
      for (int64_t r = 0; r < some; ++r) {
        const int64_t c = s.targets[first_query + from + first + r];
        bias[r] = 0;
        if (c < 0) continue;
        P::form(s.keys, s.absent, terms, c, key, place(p.row));
        for (int64_t i = 0; i < lanes; ++i) __builtin_memcpy(panel + i * S::cols + r, key + i, sizeof(T));
        bias[r] = bias_of(c);
      }
      for (int64_t r = some; r < S::cols; ++r) bias[r] = 0;
      int64_t a_row;
      const T* const a = tile_of(queries, from, count, a_row);
      score_strip<P>(lanes, a, a_row, panel, S::cols, static_cast<T>(s.scale), bias, scores, S::cols);
      for (int64_t r = 0; r < some; ++r) {
        const int64_t b = first_query + from + first + r;
        T* const score = s.target_scores ? static_cast<T*>(s.target_scores) + b : nullptr;
        to[first + r] = s.targets[b] < 0 ? *score : scores[(first + r) * S::cols + r];
        if (score) *score = to[first + r];
      }
    }
  }

  // Where Gamma is given, the sides' gradients are two products by themselves: a stripe of queries with all keys; then
  // a segment of keys, and a range of terms, with all queries.
  void differentiate_queries(int64_t stripe) const {
    const int64_t end = smaller(query_count, (stripe + 1) * p.stripe);
    for (int64_t from = stripe * p.stripe; from < end; from += p.block)
      for (int64_t at = 0; at < key_count; at += p.block) {
        const int64_t rows = smaller(p.block, end - from), count = smaller(p.block, key_count - at);
        load_gamma(from, rows, at, count);
        add_to_queries(from, rows, at, count);
      }
  }
  void differentiate_keys(int64_t segment, int64_t term) const {
    const int64_t some = smaller(p.range, terms - term);
    const int64_t end = smaller(key_count, (segment + 1) * p.segment);
    for (int64_t at = segment * p.segment; at < end; at += p.block)
      for (int64_t from = 0; from < query_count; from += p.block) {
        const int64_t rows = smaller(p.block, query_count - from), count = smaller(p.block, end - at);
        load_gamma(from, rows, at, count);
        add_to_keys(from, rows, at, count, term, some);
      }
  }
  void load_gamma(int64_t from, int64_t rows, int64_t at, int64_t count) const {
    for (int64_t r = 0; r < rows; ++r)
      with_dtype(s.matrix_dtype, s.matrix, [&](auto data) {
        load_row(place(p.strip) + r * step(),
                 data + (first_query + from + r) * s.matrix_row + (first_key + at) * s.matrix_col, s.matrix_col, count);
      });
  }

  // Adds to both sides' gradients what Gamma, of a block of queries and a block of keys, gives.
  void differentiate(int64_t from, int64_t rows, int64_t at, const Keys<T>& block) const {
    const T* const gamma = place(p.strip);
    if (s.d_queries) add_to_queries(from, rows, at, block.count);
    if (s.d_keys) add_to_keys(from, rows, at, block.count, 0, terms);
    for (int64_t r = 0; s.d_key_bias && r < rows; ++r)
      for (int64_t j = 0; j < block.count; ++j)
        s.d_key_bias[block.first + j] += static_cast<double>(gamma[r * step() + j]);
  }

  // The strip holds Gamma of `rows` queries and `count` keys; of keys' gradients, `some` terms from `term` on are
  // added.
  void add_to_queries(int64_t from, int64_t rows, int64_t at, int64_t count) const {
    const T* const gamma = P::by_rows(place(p.strip), step(), rows, count, place(p.gamma));
    add_product<P>(rows, terms, count, gamma, step() / P::per_lane, 1, entries_of<P>(keys, at, 0), place(p.panel),
                   static_cast<T*>(s.d_queries) + (first_query + from) * terms, terms);
  }
  void add_to_keys(int64_t from, int64_t rows, int64_t at, int64_t count, int64_t term, int64_t some) const {
    const T* const gamma = P::by_columns(place(p.strip), step(), rows, count, place(p.gamma));
    add_product<P>(count, some, rows, gamma, 1, step(), entries_of<P>(queries, from, term), place(p.panel),
                   static_cast<T*>(s.d_keys) + (first_key + at) * terms + term, terms);
  }

  // When a chunk of queries has met all keys.
  void finish() {
    if (s.epilogue == Epilogue::top_k)
      p.select(p, first_query, task * query_count / p.tasks, (task + 1) * query_count / p.tasks);
    if (!s.d_scale) return;
    double sum = 0;
    for (int64_t r = task * p.stripe; r < smaller(query_count, (task + 1) * p.stripe); ++r) {
      const auto* const a = entries_of<P>(queries, r, 0).first;
      const T* const d = static_cast<const T*>(s.d_queries) + (first_query + r) * terms;
      for (int64_t i = 0; i < terms; ++i) sum += static_cast<double>(widen(a[i])) * static_cast<double>(d[i]);
    }
    p.d_scale[first_query / p.query_chunk * p.stripes + task] = sum;
  }

  const ScorePlan& p;
  const Scores& s;
  const int64_t terms, lanes, task;
  char* const scratch;
  int64_t first_query, query_count, first_key, key_count;
  Rows<T> queries, keys;  // of the chunks
};

template <class P>
void score(const ScorePlan& plan, int64_t task, int64_t slice, char* scratch) {
  Scorer<P>(plan, task, scratch).slice(slice);
}

}  // namespace
}  // namespace FUSIONSUM_ISA
}  // namespace fusionsum
