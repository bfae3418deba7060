// Scores (csrc/scores.h) of every kind from any bytes, each array in memory that ends at a fence, and the check of what
// is made of them against plain loops.
//
//     ScoreMemory memory(bytes, seed, most);  // draws the scores, fills the arrays
//     memory.check_everything();              // all instruction sets, 1 to 3 threads
//
// What lives elsewhere: fences, numbers from bytes, activations (problem.h), the programs that use this
// (fuzz_scores.cpp, memory.cpp). The bounds are those of tests/score_cases.py.
#pragma once
#include <algorithm>
#include <numeric>

#include "problem.h"

namespace native {

class ScoreMemory {
 public:
  // Of at most `most` products of two terms.
  ScoreMemory(Bytes& b, uint32_t seed, int64_t most) : seed_(seed), whole_(seed % 4 == 0) {
    constexpr int64_t kSizes[] = {0,   1,   1,   2,   3,   4,   5,   7,   8,   9,   13,  14,   15,
                                  16,  17,  27,  28,  31,  32,  33,  47,  48,  63,  65,  111,  113,
                                  127, 128, 129, 223, 224, 225, 239, 241, 255, 257, 449, 1025, 3585};
    const auto size = [&](int64_t room) {
      return std::min(kSizes[b.below(std::size(kSizes))], std::max<int64_t>(0, room));
    };
    s.queries.rows = size(most);
    s.keys.rows = size(most / std::max<int64_t>(1, s.queries.rows));
    s.terms = size(most / std::max<int64_t>(1, s.queries.rows * s.keys.rows));
    s.epilogue = static_cast<Epilogue>(b.below(5));
    s.differentiates = static_cast<int>(s.epilogue) < 3 && b.one_in(2);
    dtype_ = any_dtype(b);
    mixed_ = b.one_in(4);
    s.wide = b.one_in(8);
    s.absent = b.below(2);
    s.scale = whole_ ? b.below(4) - 1.0 : (b.below(16) - 4.0) / 8;
    s.bias = b.below(3) - 1.0;
    exact_ = whole_;
    for (Side* side : {&s.queries, &s.keys}) {
      side->factors = static_cast<int>(b.one_in(3) ? 1 + b.below(kMaxFactors) : 1 + b.below(2));
      for (int m = 0; m < side->factors; ++m) side->factor[m] = factor(b, side->rows, s.terms);
    }
    if (b.one_in(4)) {
      Factor weights = factor(b, 1, s.terms);
      weights.mask = nullptr;
      weights.row = 0;
      s.queries.factor[s.queries.factors++] = weights;
    }
    form(s.queries, a_, a_size_);
    form(s.keys, k_, k_size_);
    if (b.one_in(3)) {
      s.key_bias = factor(b, s.keys.rows, 1);
      s.key_bias.mask = nullptr;
      s.key_bias.activation = Activation::none;
    }
    pairs(b);
    score();
    outputs(b);
  }
  ScoreMemory(const ScoreMemory&) = delete;
  ScoreMemory& operator=(const ScoreMemory&) = delete;

  void check_everything() {
    for (const Isa* isa : sets()) {
      std::vector<emulator::Bytes> first;
      for (int threads = 1; threads <= 3; ++threads) {
        set_num_threads(threads);
        const auto found = results(*isa);
        if (threads == 1) check(*isa);
        if (threads == 1) first = found;
        if (found != first) fail("other bits with " + std::to_string(threads) + " threads\n" + described());
      }
    }
  }

  void run(const Isa& isa) {
    for (const Output& o : outputs_) std::memset(o.to, o.before, o.bytes);
    Workspace workspace;
    execute(s, kernels_for(s, isa), workspace, [] { return false; });
  }

  std::vector<emulator::Bytes> results(const Isa& isa) {
    run(isa);
    for (const auto& fenced : fenced_)
      if (!fenced->guard_is_whole()) fail(std::string(isa.name) + ": wrote beside an array\n" + described());
    std::vector<emulator::Bytes> all;
    for (const Output& o : outputs_) all.emplace_back(o.to, o.to + o.bytes);
    return all;
  }

  // What was run last is within the bounds.
  void check(const Isa& isa) {
    isa_ = isa.name;
    bound(kernels_for(s, isa).bf16_pairs);
    switch (s.epilogue) {
      case Epilogue::store:
        if (!s.differentiates) check_matrix();
        break;
      case Epilogue::softmax:
        if (!s.differentiates) check_statistics(s.query_stats, false);
        if (!s.differentiates && s.symmetric) check_statistics(s.key_stats, true);
        break;
      case Epilogue::sigmoid:
        check_losses();
        break;
      case Epilogue::top_k:
        check_top_k();
        break;
      case Epilogue::rank:
        check_ranks();
        break;
    }
    if (s.differentiates) check_gradients();
  }

  std::string described() const {
    std::string text = "sizes " + std::to_string(s.queries.rows) + " " + std::to_string(s.keys.rows) + " " +
                       std::to_string(s.terms) + ", epilogue " + std::to_string(static_cast<int>(s.epilogue)) +
                       (s.differentiates ? ", differentiates" : "") + (s.wide ? ", wide" : "") + ", scale " +
                       std::to_string(s.scale) + ", bias " + std::to_string(s.bias) + ", k " + std::to_string(s.k);
    for (const Side* side : {&s.queries, &s.keys})
      for (int m = 0; m < side->factors; ++m) {
        const Factor& f = side->factor[m];
        text += std::string(side == &s.keys ? "\nkeys" : "\nqueries") + ": dtype " +
                std::to_string(static_cast<int>(f.dtype)) + ", activation " +
                std::to_string(static_cast<int>(f.activation)) + ", strides " + std::to_string(f.row) + " " +
                std::to_string(f.term) + (f.mask ? ", masked" : "");
      }
    return text;
  }

 private:
  using Reals = std::vector<double>;
  struct Output {
    char* to;
    int64_t bytes;
    int before;
  };

  static DType any_dtype(Bytes& b) { return static_cast<DType>(b.below(static_cast<uint32_t>(DType::f16) + 1)); }

  // ---- arrays
  // ----------------------------------------------------------------------------------------------------------

  template <class T>
  T* room(int64_t count) {
    fenced_.push_back(std::make_unique<Fenced>(count * sizeof(T)));
    fenced_.back()->place(count * sizeof(T), (seed_ >> fenced_.size() % 32 & 1) == 0);
    return reinterpret_cast<T*>(fenced_.back()->begin());
  }
  template <class T>
  T* output(int64_t count, int before) {
    T* const to = room<T>(count);
    outputs_.push_back({reinterpret_cast<char*>(to), static_cast<int64_t>(count * sizeof(T)), before});
    return to;
  }
  template <class T, class F>
  const T* filled(int64_t count, F of) {
    T* const to = room<T>(count);
    for (int64_t i = 0; i < count; ++i) to[i] = of(i);
    return to;
  }
  uint32_t random(int64_t array, int64_t offset) const {
    uint64_t x = seed_ + 0x9e3779b97f4a7c15 * static_cast<uint64_t>(array + 1) +
                 0xd1342543de82ef95 * static_cast<uint64_t>(offset);
    x = (x ^ x >> 32) * 0xd6e8feb86659fd93;
    return static_cast<uint32_t>((x ^ x >> 32) >> 8);
  }
  double number(int64_t array, int64_t offset) const {  // which every dtype has exactly
    const uint32_t r = random(array, offset);
    return whole_ ? static_cast<int>(r % 5) - 2 : std::ldexp(static_cast<int>(r % 257) - 128, -7);
  }

  Factor factor(Bytes& b, int64_t rows, int64_t terms) {
    Factor f{};
    f.dtype = mixed_ ? any_dtype(b) : dtype_;
    s.wide = s.wide || f.dtype == DType::f64;
    const int64_t item = item_size(f.dtype), terms_or_1 = std::max<int64_t>(1, terms);
    f.term = 1;
    f.row = terms_or_1;
    if (b.one_in(3)) {
      constexpr int64_t kSteps[] = {1, 1, 2, -1, 0};
      f.term = kSteps[b.below(5)];
      const int64_t apart = terms_or_1 * std::max<int64_t>(1, std::abs(f.term));
      const int64_t rows_apart[] = {apart, apart + 3, -apart, 0, divide_up(apart * item, 4096) * 4096 / item};
      f.row = rows_apart[b.below(rows > 300 ? 4 : 5)];
    }
    const int64_t down = std::max<int64_t>(0, rows - 1) * f.row, along = (terms_or_1 - 1) * f.term;
    const int64_t low = std::min<int64_t>(0, down) + std::min<int64_t>(0, along);
    const int64_t high = std::max<int64_t>(0, down) + std::max<int64_t>(0, along);
    const int64_t index = static_cast<int64_t>(fenced_.size());
    char* const begin = room<char>((rows && terms ? high - low + 1 : 0) * item);
    f.data = begin - (rows && terms ? low * item : 0);
    for (int64_t i = 0; rows && terms && i <= high - low; ++i)
      scalar::with_dtype(f.dtype, begin, [&](const auto* type) {
        auto stored = *type;
        scalar::narrow(number(index, i), &stored);
        std::memcpy(begin + i * item, &stored, sizeof stored);
      });
    if (b.one_in(3)) f.activation = static_cast<Activation>(b.below(static_cast<uint32_t>(Activation::gelu) + 1));
    exact_ = exact_ && (f.activation == Activation::none || f.activation == Activation::relu);
    if (b.one_in(4)) {
      f.mask_row = b.below(3);
      f.mask =
          filled<uint8_t>(rows ? (rows - 1) * f.mask_row + 1 : 0, [&](int64_t i) { return random(index, i) % 3 != 0; });
    }
    return f;
  }

  void form(const Side& side, Reals& value, Reals& size) const {
    value.assign(side.rows * s.terms, 1);
    size = value;
    for (int64_t r = 0; r < side.rows; ++r)
      for (int m = 0; m < side.factors; ++m) {
        const Factor& f = side.factor[m];
        const bool absent = f.mask && !f.mask[r * f.mask_row];
        for (int64_t i = 0; i < s.terms; ++i) {
          const char* const at = static_cast<const char*>(f.data) + (r * f.row + i * f.term) * item_size(f.dtype);
          const double z = widened(f.dtype, at);
          value[r * s.terms + i] *= absent ? s.absent : activated(f.activation, z).y;
          size[r * s.terms + i] *= absent ? s.absent : f.activation == Activation::sigmoid ? 1 : std::fabs(z);
        }
      }
  }

  void pairs(Bytes& b) {
    const int64_t rows = s.queries.rows, cols = s.keys.rows, index = static_cast<int64_t>(fenced_.size());
    const int32_t kinds = static_cast<int32_t>(1 + b.below(9));
    const auto code = [&](int64_t which) {
      return [=, this](int64_t i) { return static_cast<int32_t>((1 << 24) - 1 - random(index + which, i) % kinds); };
    };
    const bool searches = s.epilogue == Epilogue::top_k || s.epilogue == Epilogue::rank;
    if (!searches && s.epilogue != Epilogue::store) {
      if (b.one_in(2)) {
        s.query_labels = filled<int32_t>(rows, code(0));
        s.key_labels = filled<int32_t>(cols, code(1));
      }
      if (b.one_in(2)) {
        s.query_ids = filled<int32_t>(rows, code(2));
        s.key_ids = filled<int32_t>(cols, code(3));
      }
    }
    if (s.epilogue != Epilogue::store && b.one_in(3)) {
      s.exclude_col = b.below(3);
      s.exclude_row = b.one_in(4) ? 0 : cols * s.exclude_col;
      s.exclude = filled<uint8_t>(rows * cols ? (rows - 1) * s.exclude_row + (cols - 1) * s.exclude_col + 1 : 0,
                                  [&](int64_t i) { return random(index + 4, i) % 4 == 0; });
    } else if (searches && b.one_in(2)) {
      std::vector<int64_t> from{0}, keys;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c)
          if (random(index + 5, r * cols + c) % 5 == 0) keys.push_back(c);
        from.push_back(static_cast<int64_t>(keys.size()));
      }
      s.excluded_from = filled<int64_t>(rows + 1, [&](int64_t i) { return from[i]; });
      s.excluded = filled<int64_t>(static_cast<int64_t>(keys.size()), [&](int64_t i) { return keys[i]; });
    }
  }

  // ---- what should be found
  // ----------------------------------------------------------------------------------------------------------

  void score() {
    const int64_t rows = s.queries.rows, cols = s.keys.rows;
    eps_ = s.wide ? 0x1p-51 : 0x1p-23;  // as much for these loops' own error
    least_ = s.wide ? 0x1p-1022 : 0x1p-126;
    dot_.assign(rows * cols, 0);
    score_ = tol_ = size_ = offset_ = dot_;
    positive_.assign(rows * cols, 0);
    excluded_ = positive_;
    exact_ = exact_ && std::fmod(s.scale * 2, 1) == 0;
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t c = 0; c < cols; ++c) {
        const int64_t at = b * cols + c;
        double size = 0, key_bias = 0;
        for (int64_t i = 0; i < s.terms; ++i) {
          dot_[at] += a_[b * s.terms + i] * k_[c * s.terms + i];
          size += a_size_[b * s.terms + i] * k_size_[c * s.terms + i];
        }
        const Factor& own = s.key_bias;
        if (own.data)
          key_bias = widened(own.dtype, static_cast<const char*>(own.data) + c * own.row * item_size(own.dtype));
        score_[at] = s.scale * dot_[at] + s.bias + key_bias;
        size_[at] = size;
        offset_[at] = std::fabs(s.bias) + std::fabs(key_bias);
        const bool same = s.query_labels ? s.query_labels[b] == s.key_labels[c] : b == c;
        bool out = s.exclude && s.exclude[b * s.exclude_row + c * s.exclude_col];
        if (s.excluded_from)
          out = std::binary_search(s.excluded + s.excluded_from[b], s.excluded + s.excluded_from[b + 1], c);
        positive_[at] = same && !out;
        excluded_[at] = out || (s.query_ids && s.query_ids[b] == s.key_ids[c] && !same);
      }
    bound(false);
  }
  // The bounds on the scores' errors. What is drawn is far from subnormal, but for the products of many factors.
  void bound(bool in_pairs) {
    in_pairs_ = in_pairs;
    of_a_ = rounding(a_);
    of_k_ = rounding(k_);
    for (size_t at = 0; at < tol_.size(); ++at) {
      tol_[at] = ((static_cast<double>(s.terms) + slack()) * eps_ + of_a_ + of_k_) * std::fabs(s.scale) * size_[at] +
                 4 * eps_ * offset_[at] + limits(s.wide ? DType::f64 : DType::f32).smallest +
                 (in_pairs ? 4 * least_ * static_cast<double>(s.terms) * std::fabs(s.scale) : 0);
      if (exact_ && of_a_ + of_k_ == 0 && size_[at] < 0x1p22) tol_[at] = 0;
    }
  }
  // Of these as bf16, where they are multiplied as pairs of it.
  double rounding(const Reals& values) const {
    for (const double value : values) {
      scalar::Bf16 stored;
      scalar::narrow(value, &stored);
      if (in_pairs_ && static_cast<double>(scalar::widen(stored)) != value) return 0x1.02p-8;
    }
    return 0;
  }
  double slack() const { return 6.0 * (s.queries.factors + s.keys.factors) + 8; }

  // Sums over a row or column of scores, of those that `counts` has.
  struct Sum {
    double lse = -std::numeric_limits<double>::infinity(), tol = 0, total = 0, size = 0, count = 0;
  };
  Sum sum(const std::vector<char>& marks, char counts, bool column, int64_t i) const {
    const int64_t cols = s.keys.rows, step = column ? cols : 1, count = column ? s.queries.rows : cols;
    const int64_t first = column ? i : i * cols;
    Sum found;
    double top = -std::numeric_limits<double>::infinity(), exps = 0;
    for (int64_t j = 0, at = first; j < count; ++j, at += step)
      if (marks[at] == counts) top = std::max(top, score_[at]);
    for (int64_t j = 0, at = first; j < count; ++j, at += step) {
      if (marks[at] != counts) continue;
      exps += std::exp(score_[at] - top);
      found.tol = std::max(found.tol, tol_[at]);
      found.total += score_[at];
      found.size += tol_[at] + (2 * eps_ + 1e-12) * std::fabs(score_[at]);
      ++found.count;
    }
    if (found.count) found.lse = top + std::log(exps);
    return found;
  }

  void outputs(Bytes& b) {
    const int64_t rows = s.queries.rows, cols = s.keys.rows, item = s.wide ? 8 : 4;
    const int64_t index = static_cast<int64_t>(fenced_.size());
    if (s.epilogue == Epilogue::store) {
      s.matrix_dtype = any_dtype(b);
      if (!s.wide && s.matrix_dtype == DType::f64) s.matrix_dtype = DType::f32;
      s.matrix_col = 1 + b.one_in(3);
      s.matrix_row = s.matrix_col * cols + b.below(3);
      const int64_t entries = rows * cols ? (rows - 1) * s.matrix_row + (cols - 1) * s.matrix_col + 1 : 0;
      const int64_t bytes = entries * item_size(s.matrix_dtype);
      char* const matrix = s.differentiates ? room<char>(bytes) : output<char>(bytes, 0xff);
      for (int64_t i = 0; s.differentiates && i < entries; ++i)
        scalar::with_dtype(s.matrix_dtype, matrix, [&](const auto* type) {
          auto stored = *type;
          scalar::narrow(number(index, i), &stored);
          std::memcpy(matrix + i * item_size(s.matrix_dtype), &stored, sizeof stored);
        });
      s.matrix = matrix;
    }
    s.any = b.one_in(2);
    s.symmetric = b.one_in(2);
    s.totals = b.one_in(2);
    if (s.epilogue == Epilogue::softmax && !s.differentiates) {
      s.query_stats = output<Statistics>(rows, 0xff);
      if (s.symmetric) s.key_stats = output<Statistics>(cols, 0xff);
    }
    if (s.epilogue == Epilogue::sigmoid) s.losses = output<double>(rows, 0);
    const auto unit = [&](int64_t which, int64_t i) { return random(index + which, i) % 1000 / 1000.0; };
    if (s.differentiates) {
      if (s.epilogue == Epilogue::sigmoid) s.query_coefs = filled<double>(rows, [&](int64_t i) { return unit(1, i); });
      if (s.epilogue == Epilogue::softmax) {
        const auto coefs = [&](bool column, int64_t count) {
          Reals all(kSoftmaxCoefs * count);
          for (int64_t i = 0; i < kSoftmaxCoefs * count; ++i) all[i] = unit(2 + column, i);
          for (int64_t i = 0; i < count; ++i) {
            const double lse = sum(excluded_, 0, column, i).lse, positive = sum(positive_, 1, column, i).lse;
            all[kLse * count + i] = std::isfinite(lse) ? lse : 0;
            all[kPositiveLse * count + i] = std::isfinite(positive) ? positive : 0;
          }
          return filled<double>(kSoftmaxCoefs * count, [&](int64_t i) { return all[i]; });
        };
        s.query_coefs = coefs(false, rows);
        if (s.symmetric) s.key_coefs = coefs(true, cols);
      }
      const bool scores = s.epilogue != Epilogue::store;
      if (scores && b.one_in(2)) s.d_scale = output<double>(1, 0xff);
      if (s.d_scale || b.one_in(2)) s.d_queries = output<char>(rows * s.terms * item, 0);
      if (!s.d_queries || b.one_in(2)) s.d_keys = output<char>(cols * s.terms * item, 0);
      if (scores && b.one_in(2)) s.d_key_bias = output<double>(cols, 0);
    }
    if (s.epilogue == Epilogue::top_k) {
      s.k = std::min<int64_t>(cols, b.one_in(3) ? cols : b.below(80));
      s.values = output<char>(rows * s.k * item, 0xff);
      s.indices = output<int64_t>(rows * s.k, 0xff);
    }
    if (s.epilogue == Epilogue::rank) {
      s.targets = filled<int64_t>(cols ? rows : 0, [&](int64_t i) { return random(index + 4, i) % cols; });
      if (b.one_in(2)) s.target_scores = output<char>(rows * item, 0xff);
      if (!s.target_scores || b.one_in(2)) {
        s.greater = output<int64_t>(rows, 0);
        s.equal = output<int64_t>(rows, 0);
      }
    }
  }

  // ---- checks
  // ----------------------------------------------------------------------------------------------------------

  void near(const char* what, int64_t at, double got, double want, double tol) const {
    if (got == want || std::fabs(got - want) <= tol) return;
    fail(std::string(isa_) + ", " + what + " " + std::to_string(at) + ": got " + std::to_string(got) + ", want " +
         std::to_string(want) + ", bound " + std::to_string(tol) + "\n" + described());
  }
  void require(bool holds, const char* what) const {
    if (!holds) fail(std::string(isa_) + ": " + what + "\n" + described());
  }
  double real(const void* from, int64_t i) const {
    return s.wide ? static_cast<const double*>(from)[i] : static_cast<double>(static_cast<const float*>(from)[i]);
  }

  void check_matrix() const {
    const char* const matrix = static_cast<const char*>(s.matrix);
    for (int64_t at = 0; at < s.queries.rows * s.keys.rows; ++at) {
      const int64_t b = at / s.keys.rows, c = at % s.keys.rows;
      const double most = s.matrix_dtype == DType::f16 ? 65520 : std::numeric_limits<double>::max();
      double got = widened(s.matrix_dtype, matrix + (b * s.matrix_row + c * s.matrix_col) * item_size(s.matrix_dtype));
      got = std::fmax(-most, std::fmin(most, got));
      near("score", at, got, std::fmax(-most, std::fmin(most, score_[at])),
           tol_[at] + limits(s.matrix_dtype).eps * std::fabs(score_[at]) + limits(s.matrix_dtype).smallest);
    }
  }

  void check_statistics(const Statistics* stats, bool column) const {
    for (int64_t i = 0; i < (column ? s.keys.rows : s.queries.rows); ++i) {
      const Statistics& of = stats[i];
      const Sum all = sum(excluded_, 0, column, i), positives = sum(positive_, 1, column, i);
      const auto size = [](double lse) { return std::isfinite(lse) ? std::fabs(lse) : 0; };
      near("log-sum-exp", i, of.reference + std::log(of.sum), all.lse, all.tol + eps_ * (300 + size(all.lse)));
      near("number of positives", i, of.positives, positives.count, 0);
      if (!s.any) near("positives", i, of.positive, positives.total, positives.size);
      if (s.any && positives.count)
        near("positives", i, of.positive_reference + std::log(of.positive), positives.lse,
             positives.tol + (eps_ + 1e-12) * (1 + size(positives.lse)));
      if (!s.totals) continue;
      near("number of scores", i, of.valid, all.count, 0);
      near("total", i, of.total, all.total, all.size);
    }
  }

  void check_losses() const {
    const int64_t cols = s.keys.rows;
    for (int64_t b = 0; b < s.queries.rows; ++b) {
      double loss = 0, tol = 0;
      for (int64_t at = b * cols; at < (b + 1) * cols; ++at) {
        if (excluded_[at]) continue;
        const double x = positive_[at] ? -score_[at] : score_[at];
        loss += std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x)));
        tol += tol_[at] + least_;
      }
      near("loss", b, s.losses[b], loss, tol + 300 * eps_ * loss);
    }
  }

  void check_top_k() const {
    const int64_t cols = s.keys.rows;
    for (int64_t b = 0; b < s.queries.rows; ++b) {
      std::vector<char> chosen(cols, 0);
      int64_t left = std::count(excluded_.begin() + b * cols, excluded_.begin() + (b + 1) * cols, 0);
      double least = std::numeric_limits<double>::infinity(), last = least;
      for (int64_t i = 0; i < s.k; ++i) {
        const int64_t c = s.indices[b * s.k + i], at = b * cols + c;
        const double value = real(s.values, b * s.k + i);
        if (i >= left) {
          require(c == -1 && std::isinf(value) && value < 0, "a key beyond the last");
          continue;
        }
        require(c >= 0 && c < cols && !chosen[c] && !excluded_[at], "an index that may not be");
        require(i == 0 || value < last || (value == last && c > s.indices[b * s.k + i - 1]), "out of order");
        near("value", at, value, score_[at], tol_[at]);
        chosen[c] = 1;
        last = value;
        least = std::min(least, score_[at] + tol_[at]);
      }
      for (int64_t c = 0; s.k && c < cols; ++c)
        require(chosen[c] || excluded_[b * cols + c] || score_[b * cols + c] - tol_[b * cols + c] <= least,
                "one left out");
    }
  }

  void check_ranks() const {
    const int64_t cols = s.keys.rows;
    for (int64_t b = 0; cols && b < s.queries.rows; ++b) {
      const int64_t target = b * cols + s.targets[b];
      if (s.target_scores)
        require(std::abs((s.wide ? static_cast<const double*>(s.target_scores)[b]
                                 : static_cast<const float*>(s.target_scores)[b]) -
                         score_[target]) <= tol_[target],
                "a target's score");
      if (!s.greater) continue;
      int64_t surely = 0, maybe = 0, not_below = 0;
      for (int64_t at = b * cols; at < (b + 1) * cols; ++at) {
        if (at == target || excluded_[at]) continue;
        const double off = tol_[at] + tol_[target], by = score_[at] - score_[target];
        surely += by > off;
        maybe += by > -off;
        not_below += by >= -off;
      }
      require(s.greater[b] >= surely && s.greater[b] <= maybe, "a rank");
      require(s.equal[b] >= 0 && s.greater[b] + s.equal[b] <= not_below, "a rank's ties");
    }
  }

  // Gamma of a pair, and a bound on its error.
  void gamma(int64_t b, int64_t c, double& value, double& tol) const {
    const int64_t at = b * s.keys.rows + c;
    value = tol = 0;
    if (s.epilogue == Epilogue::store) {
      value = widened(s.matrix_dtype, static_cast<const char*>(s.matrix) +
                                          (b * s.matrix_row + c * s.matrix_col) * item_size(s.matrix_dtype));
      return;
    }
    if (s.epilogue == Epilogue::sigmoid) {
      if (excluded_[at]) return;
      const double x = score_[at];
      value = s.query_coefs[b] *
              (positive_[at] ? -activated(Activation::sigmoid, -x).y : activated(Activation::sigmoid, x).y);
      tol = s.query_coefs[b] * std::fmin(1, tol_[at]) + 8 * eps_ * std::fabs(value) + least_;
      return;
    }
    double parts = 0;
    const auto add = [&](double coef, double lse) {
      const double x = score_[at] - lse, part = coef * std::exp(x);
      value += part;
      parts += std::fabs(part);
      tol += std::fabs(part) * (std::expm1(tol_[at] + eps_ * (std::fabs(lse) + 8 + std::fabs(x))) + eps_);
    };
    const auto of = [&](const double* coefs, int64_t count, int64_t i) {
      const auto coef = [&](int which) { return coefs[which * count + i]; };
      if (!excluded_[at]) add(coef(kSoftmax), coef(kLse));
      if (positive_[at] && s.any) add(-coef(kPositive), coef(kPositiveLse));
      const double flat = (excluded_[at] ? 0 : coef(kSmoothing)) + (positive_[at] && !s.any ? coef(kPositive) : 0);
      value -= flat;
      parts += flat;
    };
    of(s.query_coefs, s.queries.rows, b);
    if (s.key_coefs) of(s.key_coefs, s.keys.rows, c);
    tol += 6 * eps_ * parts + least_;
  }

  void check_gradients() const {
    const int64_t rows = s.queries.rows, cols = s.keys.rows, n = s.terms;
    Reals d_queries(rows * n, 0), d_keys(cols * n, 0), d_bias(cols, 0);
    Reals queries_tol = d_queries, keys_tol = d_keys, bias_tol = d_bias;
    const double of_gamma = in_pairs_ ? 0x1.02p-8 : 0, flushed = in_pairs_ ? 4 * least_ : 0;
    const double in_k = eps_ * (static_cast<double>(cols) + slack()) + of_gamma + of_k_;
    const double in_a = eps_ * (static_cast<double>(rows) + slack()) + of_gamma + of_a_;
    double d_scale = 0, scale_tol = 0;
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t c = 0; c < cols; ++c) {
        double value, tol;
        gamma(b, c, value, tol);
        const double size = std::fabs(value);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t q = b * n + i, k = c * n + i;
          d_queries[q] += value * k_[k];
          queries_tol[q] += (tol + in_k * size) * k_size_[k] + flushed;
          d_keys[k] += value * a_[q];
          keys_tol[k] += (tol + in_a * size) * a_size_[q] + flushed;
        }
        d_bias[c] += value;
        bias_tol[c] += tol + 1e-12 * size;
        d_scale += value * dot_[b * cols + c];
      }
    for (int64_t q = 0; q < rows * n; ++q) {
      if (s.d_queries) near("gradient of queries", q, real(s.d_queries, q), d_queries[q], queries_tol[q]);
      scale_tol += a_size_[q] * (2 * queries_tol[q] + (slack() * eps_ + of_a_) * std::fabs(d_queries[q]));
    }
    for (int64_t k = 0; s.d_keys && k < cols * n; ++k)
      near("gradient of keys", k, real(s.d_keys, k), d_keys[k], keys_tol[k]);
    for (int64_t c = 0; s.d_key_bias && c < cols; ++c)
      near("gradient of key_bias", c, s.d_key_bias[c], d_bias[c], bias_tol[c]);
    if (s.d_scale) near("gradient of scale", 0, *s.d_scale, d_scale, scale_tol);
  }

  Scores s{};
  const uint32_t seed_;
  const bool whole_;  // operands are small integers ...
  bool exact_;        // ... and so are the products
  bool mixed_;
  DType dtype_;
  mutable const char* isa_ = "";
  double eps_, least_, of_a_ = 0, of_k_ = 0;  // of what a side loses as bf16
  bool in_pairs_ = false;
  std::vector<std::unique_ptr<Fenced>> fenced_;
  std::vector<Output> outputs_;
  Reals a_, a_size_, k_, k_size_, dot_, size_, offset_, score_, tol_;
  std::vector<char> positive_, excluded_;
};

}  // namespace native
