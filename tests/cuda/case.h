// A call of the library as a file: the problem, the bytes of its arrays, and the gradients expected.
//
// What lives here: which bytes a problem reaches, and the file's format. recorder.cpp writes such files, driver.cpp
// reads them; both are of one build, so the problem is stored as it lies in memory, its pointers too: they tell the
// alignment.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/scores/chunk.h"
#include "space.h"

namespace emulator {

using fusionsum::Chunk;
using fusionsum::Operand;
using fusionsum::Problem;
using fusionsum::Step;

enum class Role : int32_t { data, mask, grad, workspace, state };  // state: what a step adds to

// Bytes that a run may read or, for gradients and workspace, write. emulation.py mirrors this struct.
struct Span {
  int32_t operand;  // -1: the workspace
  Role role;
  char* begin;
  int64_t bytes;
  const void *before, *after;  // of a step's array: copies of what was there, and of what is
};

// One array of a problem: a mask may vary along dims that its operand does not have.
struct Array {
  int operand;
  Role role;
  int64_t item;
  uint32_t dims;
  const int64_t* stride;

  bool has(const Problem& p, int d) const { return d < p.ndim && (dims >> d & 1); }

  void* pointer(const Problem& p) const {
    const Operand& o = p.operand[operand];
    return role == Role::grad ? o.grad : const_cast<void*>(role == Role::data ? o.data : o.mask);
  }
  void point_to(Problem& p, void* to) const {
    Operand& o = p.operand[operand];
    if (role == Role::data) o.data = to;
    if (role == Role::mask) o.mask = static_cast<const uint8_t*>(to);
    if (role == Role::grad) o.grad = to;
  }

  Span span(const Problem& p) const {
    int64_t low = 0, high = item;
    for (int d = 0; d < p.ndim; ++d) {
      if (!has(p, d)) continue;
      if (p.size[d] == 0) high = low = 0;
      if (p.size[d] == 0) break;
      const int64_t reach = (p.size[d] - 1) * stride[d] * item;
      (reach < 0 ? low : high) += reach;
    }
    return {operand, role, static_cast<char*>(pointer(p)) + low, high - low, nullptr, nullptr};
  }

  // Calls use(offset in bytes from the pointer) for each entry.
  template <class Use>
  void for_each_entry(const Problem& p, Use use, int d = 0, int64_t offset = 0) const {
    if (d == p.ndim) return use(offset);
    for (int64_t i = 0; i < (has(p, d) ? p.size[d] : 1); ++i) {
      for_each_entry(p, use, d + 1, offset + (has(p, d) ? i * stride[d] * item : 0));
    }
  }
};

// In the order of a file's arrays. Strides point into the problem.
inline std::vector<Array> arrays_of(const Problem& p) {
  std::vector<Array> arrays;
  for (int k = 0; k < p.operands; ++k) {
    const Operand& o = p.operand[k];
    if (o.data) arrays.push_back({k, Role::data, fusionsum::item_size(o.dtype), o.dims, o.stride});
    if (o.mask) arrays.push_back({k, Role::mask, 1, ~0u, o.mask_stride});
    if (o.grad) arrays.push_back({k, Role::grad, fusionsum::item_size(o.dtype), o.dims, o.grad_stride});
  }
  return arrays;
}

// The arrays of a step of scores. Where Gamma takes the products' place, they are one array of two pointers.
struct StepArray {
  Role role;                     // data or state
  std::vector<size_t> pointers;  // where in the chunk they lie
  int64_t bytes;

  char* begin(const Chunk& c) const {
    char* to;
    std::memcpy(&to, reinterpret_cast<const char*>(&c) + pointers[0], sizeof to);
    return to;
  }
  void point_to(Chunk& c, char* to) const {
    for (size_t at : pointers) std::memcpy(reinterpret_cast<char*>(&c) + at, &to, sizeof to);
  }
};

inline std::vector<StepArray> arrays_of(const Chunk& c) {
  std::vector<StepArray> arrays;
  const auto put = [&](Role role, const void* pointer, size_t at, int64_t entries, int64_t item) {
    if (pointer && entries) arrays.push_back({role, {at}, entries * item});
  };
#define PUT(role, field, entries, item) put(Role::role, c.field, offsetof(Chunk, field), entries, item)
  const auto reach = [](int64_t rows, int64_t row, int64_t cols, int64_t col) {
    return rows && cols ? (rows - 1) * row + (cols - 1) * col + 1 : 0;
  };
  const int64_t item = fusionsum::item_size(c.dtype), long_item = 8;
  const fusionsum::Values values = fusionsum::values_of(c.step);
  const bool in_place = c.gamma == c.products;
  const int64_t matrix = reach(c.rows, c.stride, c.cols, 1);
  put(in_place || c.step == Step::leave_out ? Role::state : Role::data, c.products, offsetof(Chunk, products), matrix,
      item);
  if (in_place && !arrays.empty()) arrays.back().pointers.push_back(offsetof(Chunk, gamma));
  if (!in_place) PUT(state, gamma, matrix, fusionsum::item_size(c.gamma_dtype));
  PUT(data, scale_at, 1, long_item);
  PUT(data, bias_at, 1, long_item);
  PUT(data, key_bias, reach(1, 0, c.all_cols, c.key_bias_stride), fusionsum::item_size(c.key_bias_dtype));
  PUT(data, query_labels, c.all_rows, long_item);
  PUT(data, key_labels, c.all_cols, long_item);
  PUT(data, query_ids, c.all_rows, long_item);
  PUT(data, key_ids, c.all_cols, long_item);
  PUT(data, exclude, reach(c.all_rows, c.exclude_row, c.all_cols, c.exclude_col), 1);
  PUT(data, places, c.places_count, long_item);
  PUT(state, of_rows, values.of_row * c.all_rows, long_item);
  PUT(state, of_cols, values.of_col * c.all_cols, long_item);
  PUT(state, of_all, values.of_all, long_item);
  PUT(state, diagonal, c.all_rows, long_item);
  PUT(data, row_coefs, (c.step == Step::sigmoid ? 1 : fusionsum::kSoftmaxCoefs) * c.all_rows, long_item);
  PUT(data, col_coefs, fusionsum::kSoftmaxCoefs * c.all_cols, long_item);
  PUT(state, best, c.all_rows * c.k, 2 * item);
  PUT(state, values, c.all_rows * c.k, item);
  PUT(state, indices, c.all_rows * c.k, long_item);
  PUT(data, target_scores, c.all_rows, item);
  PUT(data, targets, c.all_rows, long_item);
#undef PUT
  return arrays;
}

using Bytes = std::vector<char>;

// A step as a file: the chunk as it lies in memory, and the bytes of its arrays before and after.
struct StepCase {
  Chunk chunk;
  std::vector<Bytes> before, after;

  static std::vector<Bytes> images(const Chunk& chunk) {
    std::vector<Bytes> all;
    for (const StepArray& array : arrays_of(chunk))
      all.emplace_back(array.begin(chunk), array.begin(chunk) + array.bytes);
    return all;
  }
};

struct Case {
  Problem problem;
  std::vector<Bytes> before, after;  // of each array's span; after the run, of gradients only

  // One of the two, as it is in memory.
  std::vector<Bytes> images(bool is_after) const {
    std::vector<Bytes> all;
    for (const Array& array : arrays_of(problem)) {
      const Span span = array.span(problem);
      all.emplace_back(span.begin, span.begin + (is_after && array.role != Role::grad ? 0 : span.bytes));
    }
    return all;
  }
};

// The parts of a case: the words that its file begins with, what is called, and how many bytes of the images of an
// array are kept.
struct OfSums {
  static constexpr char magic[] = "fusionsum case 1";
  static Problem& called(Case& c) { return c.problem; }
  static int64_t bytes(const Array& array, const Problem& problem, bool is_after) {
    return is_after && array.role != Role::grad ? 0 : array.span(problem).bytes;
  }
};
struct OfSteps {
  static constexpr char magic[] = "fusionsum step 1";
  static Chunk& called(StepCase& c) { return c.chunk; }
  static int64_t bytes(const StepArray& array, const Chunk&, bool) { return array.bytes; }
};
inline OfSums parts_of(const Case&) { return {}; }
inline OfSteps parts_of(const StepCase&) { return {}; }

template <class C>
void write_case(const std::string& path, C c) {
  using Of = decltype(parts_of(c));
  std::ofstream file(path, std::ios::binary);
  file.write(Of::magic, sizeof Of::magic).write(reinterpret_cast<const char*>(&Of::called(c)), sizeof Of::called(c));
  for (const auto* images : {&c.before, &c.after})
    for (const Bytes& image : *images) file.write(image.data(), static_cast<std::streamsize>(image.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

// False for the file of another kind of case.
template <class C>
bool read_case(const std::string& path, C& c) {
  using Of = decltype(parts_of(c));
  std::ifstream file(path, std::ios::binary);
  char magic[sizeof Of::magic] = {};
  auto& called = Of::called(c);
  file.read(magic, sizeof magic).read(reinterpret_cast<char*>(&called), sizeof called);
  if (!file || std::string(magic) != Of::magic) return false;
  for (auto* images : {&c.before, &c.after}) {
    for (const auto& array : arrays_of(called)) {
      images->emplace_back(static_cast<size_t>(Of::bytes(array, called, images == &c.after)));
      file.read(images->back().data(), static_cast<std::streamsize>(images->back().size()));
    }
  }
  if (!file || file.peek() != std::ifstream::traits_type::eof())
    throw std::runtime_error(path + " has not the length it should");
  return true;
}

}  // namespace emulator
