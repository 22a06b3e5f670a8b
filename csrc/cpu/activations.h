// exp, the logistic function and the normal distribution on vectors of floats, and the same on doubles for checking.
// Polynomials and a quotient of them fitted for this file (least squares on Chebyshev nodes, reweighted towards the smallest largest
// error). All is inlined: a call would load every constant anew, and compute slopes that a forward pass does not ask for.
// You should see relative errors below 3e-7, or below 3e-4 where COARSE: enough for results with the 8 bits of a bfloat16.
#pragma once
#include "vector.h"

namespace minireft::cpu {

inline vecf splat(float x) { return vecf{} + x; }

// Horner's scheme, highest power first.
template <class V> V polynomial(V x, float first) { return V{} + first; }
template <class V, class... F> V polynomial(V x, float low, F... higher) { return polynomial(x, higher...) * x + low; }

template <class V> V at_least(V x, float bound) { return x < bound ? V{} + bound : x; }  // NaN stays NaN
template <class V> V at_most(V x, float bound) { return x > bound ? V{} + bound : x; }
#ifdef __AVX512F__
inline vecf at_least(vecf x, float bound) { return (vecf)_mm512_max_ps((__m512)splat(bound), (__m512)x); }
inline vecf at_most(vecf x, float bound) { return (vecf)_mm512_min_ps((__m512)splat(bound), (__m512)x); }
#endif
template <class V> V magnitude(V x) { return (V)((decltype(x < x))x & ~(decltype(x < x))-V{}); }  // −0 is the sign alone

template <bool COARSE> vecf reciprocal(vecf x) {
#ifdef __AVX512F__
  const vecf guess = (vecf)_mm512_rcp14_ps((__m512)x);
  return COARSE ? guess : guess * (2.f - x * guess);  // one step of Newton's doubles the 14 bits
#else
  return 1.f / x;
#endif
}

// e^−(times · x) for any x, as 2ⁿ 2^f with |f| ≤ ½; what would be smaller than e^−87 is e^−87. Where COARSE the power of two is
// rounded before it is split, which costs the digits that are not needed there.
template <bool COARSE> inline __attribute__((always_inline)) vecf exp_minus(vecf x, float times = 1.f) {
  const float log2e = 1.44269504f, magic = 12582912.f;  // 1.5 · 2²³: adding it rounds to an integer
  const vecf y = at_least(x * (COARSE ? -log2e * times : -times), COARSE ? -87.f * log2e : -87.f);
  const vecf n = COARSE ? y + magic : y * log2e + magic, f = COARSE ? y - (n - magic) : y * log2e - (n - magic);
  const vecf p = COARSE ? polynomial(f, 1.f, 6.932829355e-01f, 2.422109725e-01f, 5.500888871e-02f)
                        : polynomial(f, 1.f, 6.931469776e-01f, 2.402224208e-01f, 5.550733760e-02f, 9.671512993e-03f,
                                     1.326472220e-03f);
  return (vecf)((veci)p + ((veci)n << 23));  // the low bits of n are the integer, the exponent begins at bit 23
}

// σ(x) and 1 − σ(x), the second without cancellation.
template <bool COARSE> inline __attribute__((always_inline)) void logistic(vecf x, vecf& s, vecf& rest) {
  const vecf e = exp_minus<COARSE>(at_least(x, -87.f));
  s = reciprocal<COARSE>(1.f + e), rest = e * s;
}
template <bool COARSE> void logistic(vec<double> x, vec<double>& s, vec<double>& rest) {
  for (int i = 0; i < lanes<double>; ++i) s[i] = 1 / (1 + std::exp(-x[i])), rest[i] = 1 / (1 + std::exp(x[i]));
}

// Φ(−a) and φ(a) of the normal distribution for a ≥ 0. Coarse from one exponential: Φ(−a) = e^(−a²/2) Q(1 / (1 + 0.3 a)).
// Otherwise Φ(−a) = ½ − a P(a²) / Q(a²), 0 beyond a = 5.5, with no exponential, which only the slope needs then; its error is
// absolute, below 2e-7, as that of ½ (1 − erf(a / √2)) in float32.
template <bool COARSE> inline __attribute__((always_inline)) void normal(vecf a, vecf& tail, vecf& density) {
  const vecf e = exp_minus<COARSE>(a * a, 0.5f);
  density = e * 0.398942280f;
  if constexpr (COARSE) {
    tail = e * polynomial(reciprocal<true>(1.f + 0.3f * a), -1.359107242e-04f, 1.193691974e-01f, 1.340796043e-01f, 3.964107542e-02f,
                          2.071541697e-01f);
  } else {
    const vecf y = at_most(a * a, 30.25f);
    const vecf p = polynomial(y, 3.989422346e-01f, 3.385282264e-02f, 4.677271175e-03f, 1.688273900e-04f, 6.352122756e-06f,
                              2.274923208e-08f);
    const vecf q = polynomial(y, 1.f, 2.515223608e-01f, 2.864597163e-02f, 1.884454688e-03f, 7.364801218e-05f, 1.197500351e-06f);
    tail = at_least(0.5f - a * p / q, 0.f);
  }
}
template <bool COARSE> void normal(vec<double> a, vec<double>& tail, vec<double>& density) {
  for (int i = 0; i < lanes<double>; ++i) {
    tail[i] = 0.5 * std::erfc(a[i] * std::sqrt(0.5));
    density[i] = std::exp(-0.5 * a[i] * a[i]) * 0.39894228040143267794;
  }
}

// f(x) and f′(x) of each activation that stands in front of a scale.
template <Activation A, bool COARSE, class V>
inline __attribute__((always_inline)) void activate(V x, V& value, V& slope) {
  using F = std::remove_reference_t<decltype(x[0])>;
  if constexpr (A == Activation::none) {
    value = x, slope = V{} + 1;
  } else if constexpr (A == Activation::gelu) {
    const V a = magnitude(x);
    V tail, density;
    normal<COARSE>(a, tail, density);
    value = at_least(x, 0) - a * tail, slope = (x < F(0) ? tail : F(1) - tail) + x * density;  // Φ(x) = 1 − Φ(−x)
  } else if constexpr (A == Activation::gelu_tanh) {  // x σ(2 a (x + b x³)), since (1 + tanh y) / 2 = σ(2 y)
    constexpr double a = 0.79788456080286535588, b = 0.044715;
    const V square = x * x;
    V s, rest;
    logistic<COARSE>(x * (F(2 * a * b) * square + F(2 * a)), s, rest);
    value = x * s, slope = s + value * rest * (F(6 * a * b) * square + F(2 * a));
  } else {
    V s, rest;
    logistic<COARSE>(x, s, rest);
    value = x * s, slope = s + value * rest;
  }
}

}  // namespace minireft::cpu
