// The contract: what crosses from the bindings to the kernels. Plain data, no functions, nothing but <cstdint> and the
// lists.
//
// A fusion sum, its gradient, and the gradient of that are one thing: a product of operands over a loop space, of which
// some operands ask for the derivative. Operand 0 is grad_output u, then the weights if any, then the factors. The
// derivative of operand k is
//     grad_k = sum over the dims that k does not have of  phi_k'(z_k) * prod_{j != k} phi_j(z_j),
// and the forward pass is the derivative with respect to u, at u = 1. So planner and kernels know one loop only.
// Each dim is had by the weights or by a factor, for they make the loop space: kernels rely on it.
//
// What lives elsewhere: the arithmetic (formula.h), the order of loops (cpu/sum/plan.h, cuda/sum/plan.h), the choice of
// instruction set (cpu/dispatch.h).
#pragma once
#if !defined(__GNUC__) || __SIZEOF_POINTER__ != 8 || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fusionsum's native module needs GCC or Clang and a 64-bit little-endian processor; without it NumPy is used"
#endif
#include <cstdint>

#include "lists.h"

namespace fusionsum {

#define ENUMERATOR(name, ...) name,
enum class DType : uint8_t { FUSIONSUM_DTYPES(ENUMERATOR) };
enum class Activation : uint8_t { none, FUSIONSUM_ACTIVATIONS(ENUMERATOR) };
#undef ENUMERATOR

constexpr int kMaxFactors = 8;
constexpr int kMaxOperands = kMaxFactors + 2;
constexpr int kMaxDims = 12;  // a call with so many dims of size > 1, or more, goes to the reference

struct Operand {
  const void* data;     // null: the constant 1 (u in the forward pass)
  const uint8_t* mask;  // one byte per entry, 0 where the operand is absent; null: present everywhere
  void* grad;           // where the derivative goes; null: not asked for
  DType dtype;          // of data and of grad
  Activation activation;
  uint32_t dims;  // bit d: the operand has an extent along dim d; elsewhere it is broadcast, its derivative summed
  int64_t stride[kMaxDims], mask_stride[kMaxDims], grad_stride[kMaxDims];  // in elements
};

struct Problem {
  int ndim, sum_dim, operands;
  int64_t size[kMaxDims];
  Operand operand[kMaxOperands];
  bool wide;      // accumulate in float64, else in float32
  double absent;  // what an absent operand counts as: 1 or 0
};

}  // namespace fusionsum
