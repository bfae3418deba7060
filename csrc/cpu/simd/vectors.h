// What the instruction sets with vectors of GCC and Clang share: the types, of FUSIONSUM_VECTOR_BYTES each, and what
// needs no instruction of its own. The arithmetic operators are the compiler's.
//
// Included inside an instruction set's namespace (<isa>.h), which supplies the rest of the vocabulary.
typedef float F32 __attribute__((vector_size(FUSIONSUM_VECTOR_BYTES)));
typedef double F64 __attribute__((vector_size(FUSIONSUM_VECTOR_BYTES)));

template <class V>
struct ScalarOf;
template <>
struct ScalarOf<F32> {
  using type = float;
};
template <>
struct ScalarOf<F64> {
  using type = double;
};
template <class V>
using Scalar = typename ScalarOf<V>::type;

// 2^n is lifted into the normal range and dropped again, so that subnormal results round once. n is a whole number:
// adding 1.5 * 2^23 (2^52) leaves it in the low bits of the sum. A set that has an instruction overloads these.
template <class V>
V scaled(V a, V n);
template <>
inline F32 scaled(F32 a, F32 n) {
  typedef uint32_t Bits __attribute__((vector_size(FUSIONSUM_VECTOR_BYTES)));
  const Bits exponent = reinterpret_cast<Bits>(n + (0x1.8p23f + 127.0f + 64.0f));
  return a * reinterpret_cast<F32>(exponent << 23) * 0x1p-64f;
}
template <>
inline F64 scaled(F64 a, F64 n) {
  typedef uint64_t Bits __attribute__((vector_size(FUSIONSUM_VECTOR_BYTES)));
  const Bits exponent = reinterpret_cast<Bits>(n + (0x1.8p52 + 1023.0 + 512.0));
  return a * reinterpret_cast<F64>(exponent << 52) * 0x1p-512;
}
