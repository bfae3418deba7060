// The lists, each written once. Enums (sum.h), conversions and kernels by dtype, the table of instruction sets and the
// names that Python sees come from these; tests hold Python's own lists against them.
//
// X(enumerator, C++ type, name in NumPy and torch, bytes)
#define FUSIONSUM_DTYPES(X)    \
  X(f64, double, "float64", 8) \
  X(f32, float, "float32", 4)  \
  X(bf16, Bf16, "bfloat16", 2) \
  X(f16, F16, "float16", 2)

// X(enumerator), which is also the name in Python; formula.h has a <name>_value of each.
#define FUSIONSUM_ACTIVATIONS(X) X(tanh) X(sigmoid) X(relu) X(silu) X(gelu)

// X(name), best first: the namespace of cpu/isa_<name>.cpp, and what FUSIONSUM_ISA takes.
#define FUSIONSUM_ISAS(X) X(avx512_bf16) X(avx512) X(avx2) X(neon_bf16) X(neon) X(scalar)
