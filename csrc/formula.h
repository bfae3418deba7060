// The mathematics, once: the product of operands with each of its partial derivatives, and the activations with theirs.
// Templated on the value type V: one number, or a vector of them in any instruction set.
//
// Included inside an instruction set's namespace (cpu/simd/<isa>.h), which supplies for its V: Scalar<V> and, by the
// names below, madd (a*b+c, fused where that is cheap), fused (a*b+c rounded once), abs, copysign, at_least, at_most,
// select, select_negative (by the sign of its first argument) and scaled (a * 2^n, rounded once, for the n of
// exp_of_negative). Errors are measured by tests/test_kernel.py.

#define FUSIONSUM_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__)
#define FUSIONSUM_UNROLL(count) FUSIONSUM_PRAGMA(unroll)
#else
#define FUSIONSUM_UNROLL(count) FUSIONSUM_PRAGMA(GCC unroll count)
#endif

// partial[k] = c * prod_{j != k} v[j], by prefixes and suffixes: dividing the product by v[k] would fail at zeros.
// Returns prod_j v[j], without c. Count N at compile time, or N = 0 and `count`.
template <int N, class V>
FUSIONSUM_INLINE V partial_products(V c, const V* v, V* partial, int count) {
  const int n = N ? N : count;
  V prefix = c;
  FUSIONSUM_UNROLL(8)
  for (int k = 0; k < n; ++k) {
    partial[k] = prefix;
    if (k + 1 < n) prefix = prefix * v[k];
  }
  V suffix = v[n - 1];
  FUSIONSUM_UNROLL(8)
  for (int k = n - 2; k >= 0; --k) {
    partial[k] = partial[k] * suffix;
    suffix = suffix * v[k];
  }
  return suffix;
}

template <class T>
struct Constants;
template <>
struct Constants<float> {
  static constexpr float ln2_hi = 0x1.63p-1f, ln2_lo = -0x1.bd0106p-13f, exp_lowest = -104.0f, round = 0x1.8p23f;
  static constexpr int exp_terms = 5, tail_terms = 11;
};
template <>
struct Constants<double> {
  static constexpr double ln2_hi = 0x1.62e42feep-1, ln2_lo = 0x1.a39ef35793c76p-33, exp_lowest = -746.0,
                          round = 0x1.8p52;
  static constexpr int exp_terms = 11, tail_terms = 23;
};

template <class V>
struct Exp {
  V e, em1;  // exp(x) and exp(x) - 1, each to its own last places
};

// For x <= 0. x = n ln 2 + r, |r| <= ln 2 / 2; p = exp(r) - 1 by its Taylor series, to below 0.1 ulp: 7 terms f32, 13
// f64.
template <class V>
FUSIONSUM_INLINE Exp<V> exp_of_negative(V x) {
  using T = Scalar<V>;
  using C = Constants<T>;
  constexpr double kInverseFactorial[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                          1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                          1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  x = at_least(x, V{} + T(C::exp_lowest));
  const V n = madd(x, V{} + T(1.4426950408889634), V{} + T(C::round)) - T(C::round);
  V r = madd(n, V{} - T(C::ln2_hi), x);
  r = madd(n, V{} - T(C::ln2_lo), r);
  V q = V{} + T(kInverseFactorial[C::exp_terms]);
  FUSIONSUM_UNROLL(16)
  for (int i = C::exp_terms - 1; i >= 0; --i) q = madd(q, r, V{} + T(kInverseFactorial[i]));
  const V p = madd(r * r, q, r);
  const V scale = scaled(V{} + T(1), n);
  return {scaled(p + T(1), n), madd(scale, p, scale - T(1))};
}

// Sums of exponentials are relative to a score seen before, which later ones exceed by so much at most: exp(kMargin)
// times the entries of a strip or tile is far from float32's largest number.
constexpr double kMargin = 30;

// exp(x) for x up to kMargin, and 0 below the least that stays normal when a coefficient multiplies it: subnormal
// numbers take dozens of times as long on some processors (all pairs at logit_scale 200: six times the whole), and no
// sum whose largest term is 1 or more sees them.
template <class V>
FUSIONSUM_INLINE V exp_or_zero(V x) {
  const V lowest = V{} + Scalar<V>(sizeof(Scalar<V>) == 8 ? -640 : -64);
  return select(x < lowest, V{}, exp_of_negative(at_least(x, lowest)).e);
}

template <class V>
struct Value {
  V y, dy;  // phi(x) and phi'(x); what a caller does not use is not computed
};

template <class V>
FUSIONSUM_INLINE Value<V> tanh_value(V x) {
  using T = Scalar<V>;
  const Exp<V> e = exp_of_negative(abs(x) * T(-2));
  const V q = T(1) / (e.em1 + T(2));
  return {copysign(e.em1 * q, x), e.e * q * (q * T(4))};
}

template <class V>
FUSIONSUM_INLINE Value<V> sigmoid_value(V x) {
  using T = Scalar<V>;
  const V e = exp_of_negative(abs(x) * T(-1)).e, q = T(1) / (e + T(1));
  return {select_negative(x, e * q, q), e * q * q};
}

template <class V>
FUSIONSUM_INLINE Value<V> relu_value(V x) {  // NaN stays NaN, with derivative 1, as in torch
  using T = Scalar<V>;
  return {select(x <= T(0), V{}, x), select(x <= T(0), V{}, V{} + T(1))};
}

template <class V>
FUSIONSUM_INLINE Value<V> silu_value(V x) {
  const Value<V> s = sigmoid_value(x);
  return {x * s.y, madd(x, s.dy, s.y)};
}

// The upper tail of the normal distribution, Q(a) = exp(-a^2/2) R(a), with (1 + a) R(a) a polynomial in t = (a - 4) /
// (a + 4): interpolation at Chebyshev points over 0 <= a <= 40, relative error 1.1e-8 (f32) and 6.2e-17 (f64). gelu(x)
// = x Q(-x). a^2 is kept to twice the precision, or its rounding would cost exp(-a^2/2) dozens of ulp.
template <class V>
FUSIONSUM_INLINE Value<V> gelu_value(V x) {
  using T = Scalar<V>;
  using C = Constants<T>;
  constexpr float kTail32[] = {0.4720532081f,   -0.09670346417f,  0.01399953672f,   0.028599866f,
                               -0.03219697117f, 0.01794094141f,   -0.005004060599f, -0.0003042061371f,
                               0.000691111046f, -6.308903807e-5f, -7.277767558e-5f};
  constexpr double kTail64[] = {
      0.472053206509844667,     -0.0967034773265253785,    0.0139996347244300788,    0.0286003640535058926,
      -0.0321978374283432612,   0.0179360974810393238,     -0.00500237858540405508,  -0.000285623116715999229,
      0.00069489704019318622,   -0.0000944301154801851677, -0.000087852749479550913, 0.0000212494552279693998,
      0.0000136250251939740466, -3.43069827716607437e-6,   -2.60783907980458132e-6,  4.02427481014322407e-7,
      5.4300399206059853e-7,    2.3513362577996062e-9,     -1.01046445695363609e-7,  -1.85385420835633131e-8,
      1.14008678657855824e-8,   4.23785422278937983e-9,    1.55134389059184233e-10};
  const V a = at_most(abs(x), V{} + T(40));
  const V inverse = T(1) / ((a + T(4)) * (a + T(1)));
  const V t = (a - T(4)) * (a + T(1)) * inverse;
  const auto coefficient = [&](int i) { return V{} + (sizeof(T) == 4 ? T(kTail32[i < 11 ? i : 0]) : T(kTail64[i])); };
  V r = coefficient(C::tail_terms - 1);
  FUSIONSUM_UNROLL(32)
  for (int i = C::tail_terms - 2; i >= 0; --i) r = madd(r, t, coefficient(i));
  const V square = a * a, error = fused(a, a, V{} - square);
  V e = exp_of_negative(square * T(-0.5)).e;
  e = madd(e, error * T(-0.5), e);
  const V sum = a + T(1), lost = a - (sum - T(1));
  const V reciprocal = (a + T(4)) * inverse;  // 1 / (1 + a), some roundings off: one step mends the quotient
  V ratio = r * reciprocal;
  ratio = madd(madd(V{} - ratio, lost, fused(V{} - ratio, sum, r)), reciprocal, ratio);
  const V tail = e * ratio, phi = select_negative(x, tail, T(1) - tail);
  // x - x Q(x) rounds once, and beyond 40 is x itself, infinity included.
  return {select_negative(x, x * tail, fused(V{} - a, tail, x)), madd(x, e * T(0.39894228040143267794), phi)};
}

// log(1 + exp(x)) = max(x, 0) + log1p(e), e = exp(-|x|) <= 1, by log1p(e) = 2 atanh(t), t = e / (2 + e) <= 1/3: its
// series in t^2 to below 0.1 ulp.
template <class V>
FUSIONSUM_INLINE V softplus(V x) {
  using T = Scalar<V>;
  constexpr int kTerms = sizeof(T) == 8 ? 17 : 8;
  const V e = exp_of_negative(abs(x) * T(-1)).e, t = e / (e + T(2)), square = t * t;
  V q = V{} + T(1. / (2 * kTerms - 1));
  FUSIONSUM_UNROLL(32)
  for (int i = kTerms - 2; i >= 0; --i) q = madd(q, square, V{} + T(1. / (2 * i + 1)));
  return madd(t * q, V{} + T(2), at_least(x, V{}));
}
