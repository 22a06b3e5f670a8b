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
template <class V> V choose(V x, V below, V otherwise) { return x < 0 ? below : otherwise; }
template <class V> V magnitude(V x) { return (V)((decltype(x < x))x & ~(decltype(x < x))-V{}); }  // −0 is the sign alone

inline vecf doubled(vecf x, vecf n) { return (vecf)((veci)x + ((veci)n << 23)); }  // x · 2ⁿ for the low bits of n; exponents begin at bit 23
template <bool COARSE> vecf reciprocal(vecf x) {
#ifdef __AVX512F__
  const vecf guess = (vecf)_mm512_rcp14_ps((__m512)x);
  return COARSE ? guess : guess * (2.f - x * guess);  // one step of Newton's doubles the 14 bits
#else
  return 1.f / x;
#endif
}

// N vectors side by side, each operation on all of them before the next: a processor looks ahead only so far, and one
// vector's thirty operations wait for one another. Two make a forward pass of gelu a twelfth faster, in bfloat16 four a fifth.
template <int N> struct many { vecf v[N]; };
template <class X> constexpr int count_of = 0;
template <int N> constexpr int count_of<many<N>> = N;
template <int N> vecf part(const many<N>& x, int i) { return x.v[i]; }
inline float part(float x, int) { return x; }
template <class F, int... I> inline __attribute__((always_inline)) many<sizeof...(I)> all_of(const F& f, std::integer_sequence<int, I...>) {
  return {{f(I)...}};
}
template <int N, class F> inline __attribute__((always_inline)) many<N> each(const F& f) {
  return all_of(f, std::make_integer_sequence<int, N>{});
}
#define MINIREFT_EACH(op)                                                                                     \
  template <class A, class B> requires(count_of<A> + count_of<B> > 0)                                           \
  inline __attribute__((always_inline)) auto operator op(const A& a, const B& b) {                              \
    return each<count_of<A> ? count_of<A> : count_of<B>>([&](int i) { return part(a, i) op part(b, i); });       \
  }
MINIREFT_EACH(+) MINIREFT_EACH(-) MINIREFT_EACH(*) MINIREFT_EACH(/)
template <int N> many<N> at_least(many<N> x, float bound) { return each<N>([&](int i) { return at_least(x.v[i], bound); }); }
template <int N> many<N> at_most(many<N> x, float bound) { return each<N>([&](int i) { return at_most(x.v[i], bound); }); }
template <int N> many<N> magnitude(many<N> x) { return each<N>([&](int i) { return magnitude(x.v[i]); }); }
template <int N> many<N> doubled(many<N> x, many<N> n) { return each<N>([&](int i) { return doubled(x.v[i], n.v[i]); }); }
template <bool COARSE, int N> many<N> reciprocal(many<N> x) { return each<N>([&](int i) { return reciprocal<COARSE>(x.v[i]); }); }
template <int N> many<N> choose(many<N> x, many<N> below, many<N> otherwise) {
  return each<N>([&](int i) { return choose(x.v[i], below.v[i], otherwise.v[i]); });
}

// e^−(times · x) for any x, as 2ⁿ 2^f with |f| ≤ ½; what would be smaller than e^−87 is e^−87. Where COARSE the power of two is
// rounded before it is split, which costs the digits that are not needed there.
template <bool COARSE, class V> inline __attribute__((always_inline)) V exp_minus(V x, float times = 1.f) {
  const float log2e = 1.44269504f, magic = 12582912.f;  // 1.5 · 2²³: adding it rounds to an integer
  const V y = at_least(x * (COARSE ? -log2e * times : -times), COARSE ? -87.f * log2e : -87.f);
  const V n = COARSE ? y + magic : y * log2e + magic, f = COARSE ? y - (n - magic) : y * log2e - (n - magic);
  const V p = COARSE ? polynomial(f, 1.f, 6.932829355e-01f, 2.422109725e-01f, 5.500888871e-02f)
                        : polynomial(f, 1.f, 6.931469776e-01f, 2.402224208e-01f, 5.550733760e-02f, 9.671512993e-03f,
                                     1.326472220e-03f);
  return doubled(p, n);
}

// σ(x) and 1 − σ(x), the second without cancellation.
template <bool COARSE, class V> inline __attribute__((always_inline)) void logistic(V x, V& s, V& rest) {
  const V e = exp_minus<COARSE>(at_least(x, -87.f));
  s = reciprocal<COARSE>(1.f + e), rest = e * s;
}
template <bool COARSE> void logistic(vec<double> x, vec<double>& s, vec<double>& rest) {
  for (int i = 0; i < lanes<double>; ++i) s[i] = 1 / (1 + std::exp(-x[i])), rest[i] = 1 / (1 + std::exp(x[i]));
}

// Φ(−a) and φ(a) of the normal distribution for a ≥ 0. Coarse from one exponential: Φ(−a) = e^(−a²/2) Q(1 / (1 + 0.3 a)).
// Otherwise Φ(−a) = ½ − a P(a²) / Q(a²), 0 beyond a = 5.5, with no exponential, which only the slope needs then; its error is
// absolute, below 2e-7, as that of ½ (1 − erf(a / √2)) in float32.
template <bool COARSE, class V> inline __attribute__((always_inline)) void normal(V a, V& tail, V& density) {
  const V e = exp_minus<COARSE>(a * a, 0.5f);
  density = e * 0.398942280f;
  if constexpr (COARSE) {
    tail = e * polynomial(reciprocal<true>(1.f + 0.3f * a), -1.359107242e-04f, 1.193691974e-01f, 1.340796043e-01f, 3.964107542e-02f,
                          2.071541697e-01f);
  } else {
    const V y = at_most(a * a, 30.25f);
    const V p = polynomial(y, 3.989422346e-01f, 3.385282264e-02f, 4.677271175e-03f, 1.688273900e-04f, 6.352122756e-06f,
                              2.274923208e-08f);
    const V q = polynomial(y, 1.f, 2.515223608e-01f, 2.864597163e-02f, 1.884454688e-03f, 7.364801218e-05f, 1.197500351e-06f);
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
  using F = std::conditional_t<std::is_same_v<V, vec<double>>, double, float>;
  if constexpr (A == Activation::none) {
    value = x, slope = V{} + 1;
  } else if constexpr (A == Activation::gelu) {
    const V a = magnitude(x);
    V tail, density;
    normal<COARSE>(a, tail, density);
    value = at_least(x, 0) - a * tail, slope = choose(x, tail, F(1) - tail) + x * density;  // Φ(x) = 1 − Φ(−x)
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
