// exp, the logistic function and the normal distribution on vectors of floats, and the same on doubles for checking.
// Polynomials fitted here (least squares on Chebyshev nodes, reweighted towards the smallest largest relative error).
// You should see relative errors below 3e-7; gelu(x) = x Φ(x) and silu(x) = x σ(x) follow.
#pragma once
#include "vector.h"

namespace minireft::cpu {

// A vector of numbers that are all the same.
inline vecf splat(float x) { return vecf{} + x; }

inline vecf exp(vecf x) {  // 2ⁿ e^r with n = round(x / ln 2), |r| ≤ ln 2 / 2; flushed to 0 below −87, capped above 88
  x = x < -87.f ? splat(-87.f) : x;
  x = x > 88.f ? splat(88.f) : x;
  const float magic = 12582912.f;  // 1.5 · 2²³: adding it rounds to an integer, which then stands in the low bits
  const vecf shifted = x * 1.44269504f + magic, n = shifted - magic;
  const vecf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vecf p = r * 0.00137514f + 0.00836892f;
  p = p * r + 0.04166953f;
  p = p * r + 0.16666518f;
  p = p * r + 0.49999989f;
  p = p * (r * r) + r + 1.f;
  return p * (vecf)(((veci)shifted << 23) + 0x3f800000);
}
inline vec<double> exp(vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class V> V logistic(V x) { return 1 / (1 + exp(-x)); }

// Φ(x) and φ(x) of the normal distribution from one exponential: Φ(−a) = e^(−a²/2) Q(1 / (1 + a/4)) for a ≥ 0.
inline void normal(vecf x, vecf& cdf, vecf& density) {
  const vecf a = x < 0.f ? -x : x, e = exp(a * a * -0.5f), s = 1.f / (1.f + 0.25f * a);
  vecf q = s * 3.44778867e-2f - 1.99045964e-1f;
  q = q * s + 4.01717158e-1f;
  q = q * s - 3.42399966e-1f;
  q = q * s + 3.11909851e-1f;
  q = q * s - 2.43773381e-2f;
  q = q * s + 1.22956575e-1f;
  q = q * s + 9.45195608e-2f;
  q = q * s + 1.00265764e-1f;
  q = q * s - 2.35335364e-5f;
  const vecf tail = e * q;
  cdf = x < 0.f ? tail : 1.f - tail;
  density = e * 0.398942280f;
}
inline void normal(vec<double> x, vec<double>& cdf, vec<double>& density) {
  for (int i = 0; i < lanes<double>; ++i) {
    cdf[i] = 0.5 * std::erfc(-x[i] * std::sqrt(0.5));
    density[i] = std::exp(-0.5 * x[i] * x[i]) * 0.39894228040143267794;
  }
}

// f(x) and f′(x) of each activation that stands in front of a scale.
template <Activation A, class V>
void activate(V x, V& value, V& slope) {
  if constexpr (A == Activation::none) {
    value = x, slope = V{} + 1;
  } else if constexpr (A == Activation::gelu) {
    V cdf, density;
    normal(x, cdf, density);
    value = x * cdf, slope = cdf + x * density;
  } else if constexpr (A == Activation::gelu_tanh) {  // x σ(2 a (x + b x³)), since (1 + tanh y) / 2 = σ(2 y)
    constexpr double a = 0.79788456080286535588, b = 0.044715;
    using F = std::remove_reference_t<decltype(x[0])>;
    const V s = logistic(x * (F(2 * a) + F(2 * a * b) * (x * x)));
    value = x * s, slope = s + x * s * (1 - s) * (F(2 * a) + F(6 * a * b) * (x * x));
  } else {
    const V s = logistic(x);
    value = x * s, slope = s * (1 + x * (1 - s));
  }
}

}  // namespace minireft::cpu
