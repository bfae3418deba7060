// What the instruction sets with vectors of GCC and Clang share: the types, of FUSIONSUM_VECTOR_BYTES each. The
// arithmetic operators are the compiler's.
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
