// A call of the library as a file: the problem, the bytes of its arrays, and the gradients expected.
//
// What lives here: which bytes a problem reaches, and the file's format. recorder.cpp writes such files, driver.cpp
// reads them; both are of one build, so the problem is stored as it lies in memory, its pointers too: they tell the
// alignment.
#pragma once
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "space.h"

namespace emulator {

using fusionsum::Operand;
using fusionsum::Problem;

enum class Role : int32_t { data, mask, grad, workspace };

// Bytes that a run may read or, for gradients and workspace, write. emulation.py mirrors this struct.
struct Span {
  int32_t operand;  // -1: the workspace
  Role role;
  char* begin;
  int64_t bytes;
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
    return {operand, role, static_cast<char*>(pointer(p)) + low, high - low};
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

using Bytes = std::vector<char>;

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

constexpr char kCaseMagic[] = "fusionsum case 1";

inline void write_case(const std::string& path, const Case& c) {
  std::ofstream file(path, std::ios::binary);
  file.write(kCaseMagic, sizeof kCaseMagic).write(reinterpret_cast<const char*>(&c.problem), sizeof c.problem);
  for (const auto* images : {&c.before, &c.after})
    for (const Bytes& image : *images) file.write(image.data(), static_cast<std::streamsize>(image.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

inline Case read_case(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char magic[sizeof kCaseMagic] = {};
  Case c;
  file.read(magic, sizeof magic).read(reinterpret_cast<char*>(&c.problem), sizeof c.problem);
  if (!file || std::string(magic) != kCaseMagic) throw std::runtime_error(path + " is not a case");
  for (auto* images : {&c.before, &c.after}) {
    for (const Array& array : arrays_of(c.problem)) {
      images->emplace_back(images == &c.after && array.role != Role::grad ? 0 : array.span(c.problem).bytes);
      file.read(images->back().data(), static_cast<std::streamsize>(images->back().size()));
    }
  }
  if (!file || file.peek() != std::ifstream::traits_type::eof())
    throw std::runtime_error(path + " has not the length it should");
  return c;
}

}  // namespace emulator
