// exp, the logistic function and the normal distribution on vectors of floats, and the same on doubles for checking.
// Polynomials fitted for this file (least squares on Chebyshev nodes, reweighted towards the smallest largest relative error).
// You should see relative errors below 3e-7, or below 3e-4 where COARSE: enough for results with the 8 bits of a bfloat16.
#pragma once
#include "vector.h"

namespace minireft::cpu {

inline vecf splat(float x) { return vecf{} + x; }

// Horner's scheme, highest power first.
template <class V> V polynomial(V x, float first) { return V{} + first; }
template <class V, class... F> V polynomial(V x, float low, F... higher) { return polynomial(x, higher...) * x + low; }

#ifdef __AVX512F__
inline vecf at_least(vecf x, float bound) { return (vecf)_mm512_max_ps((__m512)splat(bound), (__m512)x); }  // NaN stays NaN
inline vecf times_power_of_2(vecf x, vecf n) { return (vecf)_mm512_scalef_ps((__m512)x, (__m512)n); }
#else
inline vecf at_least(vecf x, float bound) { return x < bound ? splat(bound) : x; }
inline vecf times_power_of_2(vecf x, vecf n) { return x * (vecf)((__builtin_convertvector(n, veci) + 127) << 23); }
#endif

template <bool COARSE> vecf reciprocal(vecf x) {
#ifdef __AVX512F__
  const vecf guess = (vecf)_mm512_rcp14_ps((__m512)x);
  return COARSE ? guess : guess * (2.f - x * guess);  // one step of Newton's doubles the 14 bits
#else
  return 1.f / x;
#endif
}

// e^−x for any x ≥ −87, as 2ⁿ 2^f with |f| ≤ ½; what would be smaller than e^−87 is e^−87.
template <bool COARSE> vecf exp_minus(vecf x) {
  const vecf y = at_least(-x, -87.f);
  const float log2e = 1.44269504f, magic = 12582912.f;  // 1.5 · 2²³: adding it rounds to an integer
  const vecf n = (y * log2e + magic) - magic, f = y * log2e - n;
  const vecf p = COARSE ? polynomial(f, 1.f, 6.932829355e-01f, 2.422109725e-01f, 5.500888871e-02f)
                        : polynomial(f, 1.f, 6.931469776e-01f, 2.402224208e-01f, 5.550733760e-02f, 9.671512993e-03f,
                                     1.326472220e-03f);
  return times_power_of_2(p, n);
}

// σ(x) and 1 − σ(x), the second without cancellation.
template <bool COARSE> void logistic(vecf x, vecf& s, vecf& rest) {
  const vecf e = exp_minus<COARSE>(at_least(x, -87.f));
  s = reciprocal<COARSE>(1.f + e), rest = e * s;
}
template <bool COARSE> void logistic(vec<double> x, vec<double>& s, vec<double>& rest) {
  for (int i = 0; i < lanes<double>; ++i) s[i] = 1 / (1 + std::exp(-x[i])), rest[i] = 1 / (1 + std::exp(x[i]));
}

// Φ(x) and φ(x) of the normal distribution from one exponential: Φ(−a) = e^(−a²/2) Q(1 / (1 + 0.3 a)) for a ≥ 0.
template <bool COARSE> void normal(vecf x, vecf& cdf, vecf& density) {
  const vecf a = (vecf)((veci)x & 0x7fffffff), e = exp_minus<COARSE>(x * x * 0.5f), s = reciprocal<COARSE>(1.f + 0.3f * a);
  const vecf q = COARSE ? polynomial(s, -1.359107242e-04f, 1.193691974e-01f, 1.340796043e-01f, 3.964107542e-02f,
                                     2.071541697e-01f)
                        : polynomial(s, 6.853820544e-06f, 1.194930468e-01f, 1.218821860e-01f, 9.483242220e-02f,
                                     1.421864581e-01f, -7.600175239e-02f, 2.282193013e-01f, -1.689529719e-01f,
                                     3.833448473e-02f);
  const vecf tail = e * q;
  cdf = x < 0.f ? tail : 1.f - tail;
  density = e * 0.398942280f;
}
template <bool COARSE> void normal(vec<double> x, vec<double>& cdf, vec<double>& density) {
  for (int i = 0; i < lanes<double>; ++i) {
    cdf[i] = 0.5 * std::erfc(-x[i] * std::sqrt(0.5));
    density[i] = std::exp(-0.5 * x[i] * x[i]) * 0.39894228040143267794;
  }
}

// f(x) and f′(x) of each activation that stands in front of a scale.
template <Activation A, bool COARSE, class V>
void activate(V x, V& value, V& slope) {
  using F = std::remove_reference_t<decltype(x[0])>;
  if constexpr (A == Activation::none) {
    value = x, slope = V{} + 1;
  } else if constexpr (A == Activation::gelu) {
    V cdf, density;
    normal<COARSE>(x, cdf, density);
    value = x * cdf, slope = cdf + x * density;
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
