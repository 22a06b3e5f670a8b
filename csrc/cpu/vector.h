// Vectors of floats for the CPU kernels, spelled with the compiler's vector types: what +, * and loads compile to is plain.
// A kernel is written once for T in {float, bf16, f16, double}; load and store convert, arithmetic is float (or double).
// Built with AVX-512 a vector holds 16 floats, otherwise 8.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../launchers.h"
#include "blocks.h"

namespace minireft::cpu {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct pair { bf16 low, high; };  // two bfloat16 in a lane: where the processor can, both products are added at once

#ifdef __AVX512F__
constexpr int VECTOR_BYTES = 64;
#else
constexpr int VECTOR_BYTES = 32;
#endif

template <class T> using wide = std::conditional_t<std::is_same_v<T, double>, double, float>;  // arithmetic happens in it
template <class F> struct VectorOf { typedef F type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using vec = typename VectorOf<wide<T>>::type;
template <class T> constexpr int lanes = VECTOR_BYTES / sizeof(wide<T>);

using vecf = vec<float>;
typedef uint32_t vecu __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t veci __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t half_bits __attribute__((vector_size(VECTOR_BYTES / 2)));

// Results of so many bytes are written past the caches, up to twice as fast; from here on their next reader loses no more by it.
constexpr int64_t STREAM_BYTES = 12 << 20;

// Memory that begins at a cache line: a vector that lies across two of them is two accesses. Large arrays are kept for the next
// call, for the pages of new ones would take longer to clear than many a kernel takes; what they hold at first is not cleared.
template <class X>
struct Lines {
  using value_type = X;
  Lines() = default;
  template <class Y> Lines(const Lines<Y>&) {}
  X* allocate(size_t n) {
    const size_t bytes = n * sizeof(X);
    void* p = bytes >= LEAST_BLOCK ? blocks().take(bytes) : ::operator new(bytes, std::align_val_t(64));
    return p ? (X*)p : throw std::bad_alloc();
  }
  void deallocate(X* p, size_t n) {
    n * sizeof(X) >= LEAST_BLOCK ? blocks().give(p) : ::operator delete(p, std::align_val_t(64));
  }
  void construct(X* p) { ::new (p) X; }
  template <class Y> bool operator==(const Lines<Y>&) const { return true; }
};
template <class X> using array = std::vector<X, Lines<X>>;

#ifdef __AVX512BF16__
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;
#endif

template <class V> V read(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> void write(void* p, V v) { std::memcpy(p, &v, sizeof v); }

// ---- one number ------------------------------------------------------------------------------------------------------

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { const uint32_t bits = uint32_t(x.bits) << 16; return read<float>(&bits); }
inline float widen(f16 x) { return float(read<_Float16>(&x)); }

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, f16& out) { const _Float16 y = _Float16(x); std::memcpy(&out, &y, 2); }
inline void narrow(float x, bf16& out) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = read<uint32_t>(&x);
  out.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- one vector ------------------------------------------------------------------------------------------------------

inline vecf load(const float* p) { return read<vecf>(p); }
inline vec<double> load(const double* p) { return read<vec<double>>(p); }
inline vecf load(const bf16* p) {
#ifdef __AVX512F__
  return (vecf)((vecu)_mm512_cvtepu16_epi32(read<__m256i>(p)) << 16);
#else
  return (vecf)(__builtin_convertvector(read<half_bits>(p), vecu) << 16);
#endif
}
inline vecf load(const f16* p) {
#if defined(__AVX512F__)
  return (vecf)_mm512_cvtph_ps(read<__m256i>(p));
#elif defined(__F16C__)
  return (vecf)_mm256_cvtph_ps(read<__m128i>(p));
#else
  vecf v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// v as it stands in memory, rounded to nearest.
template <class T> vec<T> encode(const T*, vec<T> v) { return v; }
inline half_bits encode(const bf16*, vecf v) {
#ifdef __AVX512BF16__  // numbers below 2⁻¹²⁶ become zeros here
  return (half_bits)_mm512_cvtneps_pbh((__m512)v);
#else
  const vecu bits = (vecu)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vecu result = v != v ? (vecu){} + 0x7fc0 : rounded;
#ifdef __AVX512F__
  return (half_bits)_mm512_cvtepi32_epi16((__m512i)result);
#else
  return __builtin_convertvector(result, half_bits);
#endif
#endif
}
inline half_bits encode(const f16*, vecf v) {
#if defined(__AVX512F__)
  return (half_bits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (half_bits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  f16 each[lanes<float>];
  for (int i = 0; i < lanes<float>; ++i) narrow(v[i], each[i]);
  return read<half_bits>(each);
#endif
}

template <class T> void store(T* p, vec<T> v) { write(p, encode(p, v)); }

// Past the caches: a line that is written whole need not be fetched first. p is aligned to what is written, and a fence follows.
template <class T> void stream(T* p, vec<T> v) {
  const auto bits = encode(p, v);
#ifdef __AVX512F__
  if constexpr (sizeof bits == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)bits);
  else return _mm256_stream_si256((__m256i*)p, (__m256i)bits);
#elif defined(__AVX__)
  if constexpr (sizeof bits == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)bits);
  else return _mm_stream_si128((__m128i*)p, (__m128i)bits);
#else
  write(p, bits);
#endif
}
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Are rows of C elements at `out` better written past the caches? Where they are many, and begin at cache lines.
template <class T>
bool streams(const Stream& out, int64_t rows, int64_t C) {
  const auto lines = [](int64_t bytes) { return bytes % 64 == 0; };
  return rows * C * (int64_t)sizeof(T) >= STREAM_BYTES && lines((int64_t)out.data) && lines(C * sizeof(T)) &&
         lines(out.batch_stride * sizeof(T)) && lines(out.token_stride * sizeof(T));
}

// The first n < lanes elements, for the end of a row: zeros beyond them, and nothing written there.
template <class T> vec<T> load(const T* p, int64_t n) {
  vec<T> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
}
template <class T> void store(T* p, vec<T> v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(v[i], p[i]);
}

// ---- products ----------------------------------------------------------------------------------------------------------

inline vecu load(const pair* p) { return read<vecu>(p); }
inline vecu load(const pair* p, int64_t n) { vecu v = {}; std::memcpy(&v, p, n * sizeof *p); return v; }

// acc + a · b in each lane, for a number or a vector a.
template <class A, class V> inline V add_product(V acc, A a, V b) { return acc + a * b; }
#ifdef __AVX512BF16__
inline vecf add_product(vecf acc, vecu a, vecu b) {
  return (vecf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
inline vecf add_product(vecf acc, pair a, vecu b) { return add_product(acc, vecu{} + read<uint32_t>(&a), b); }
#endif

// Rows that are multiplied in pairs are read and written a line of 32 columns at a time. weave(a, b) pairs the numbers of two
// lines (a's are the low ones) in the order that costs least: columns 0–3, 8–11, 16–19, 24–27 in the first vector, 4–7, 12–15, …
// in the second. weave(0, b) is b in float, and unweave rounds back to a line.
struct line { bf16 at[32]; };
template <class V> struct woven { V first, second; };
inline vecu load(const line* p) { return read<vecu>(p); }
inline vecu load(const line* p, int64_t n) { vecu v = {}; std::memcpy(&v, p, n * sizeof(bf16)); return v; }
#ifdef __AVX512BF16__
inline woven<vecu> weave(vecu a, vecu b) {
  return {(vecu)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b), (vecu)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b)};
}
inline __m512i unweave(woven<vecf> v) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);  // groups of four columns
  return _mm512_permutexvar_epi64(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)v.second, (__m512)v.first));
}
inline woven<vecf> in_order(woven<vecf> v) {  // columns 0–15 and 16–31
  return {__builtin_shufflevector(v.first, v.second, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
          __builtin_shufflevector(v.first, v.second, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31)};
}
inline void store(line* p, woven<vecf> v) { write(p, unweave(v)); }
inline void store(line* p, woven<vecf> v, int64_t n) { const __m512i bits = unweave(v); std::memcpy(p, &bits, n * sizeof(bf16)); }
inline void stream(line* p, woven<vecf> v) { _mm512_stream_si512((__m512i*)p, unweave(v)); }
#endif
inline pair join(float low, float high) { pair p; narrow(low, p.low), narrow(high, p.high); return p; }

// body(V, c, load, store) for columns begin … end: V vectors at a time, then G, then what is left of G; store(p, v, true) streams.
template <class T, int V, int G, class Body>
inline __attribute__((always_inline)) void in_vectors(int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t L = lanes<T>;
  constexpr std::integral_constant<int, G> few;
  const auto whole_load = [](auto* p) __attribute__((always_inline)) { return load(p); };
  const auto whole_store = [](auto* p, auto v, bool past = false) __attribute__((always_inline)) { past ? stream(p, v) : store(p, v); };
  int64_t c = begin;
  for (; c + V * L <= end; c += V * L) body(std::integral_constant<int, V>{}, c, whole_load, whole_store);
  if constexpr (G < V)
    for (; c + G * L <= end; c += G * L) body(few, c, whole_load, whole_store);
  if (const int64_t rest = end - c)
    body(few, c, [rest](auto* p) { return load(p, rest); }, [rest](auto* p, auto v, bool = false) { store(p, v, rest); });
}

// body(c, load, store) for each vector of a row of C elements.
template <class T, class Body>
inline __attribute__((always_inline)) void over_row(int64_t C, const Body& body) {
  in_vectors<T, 1, 1>(0, C, [&](auto, int64_t c, auto load, auto store) __attribute__((always_inline)) { body(c, load, store); });
}

// Says that v is to stay in a register: otherwise gcc may load it again for each use.
template <class V> inline __attribute__((always_inline)) void hold(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
}

// Lane m of the result is the sum of all lanes of v[m]: as many vectors as lanes, folded in halves, quarters, ...
template <class V, int S, int... I>
inline V fold(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / (2 * S) * 2 * S + I % S + (I % (2 * S) < S ? 0 : n))...) +
         __builtin_shufflevector(a, b, (I / (2 * S) * 2 * S + I % S + S + (I % (2 * S) < S ? 0 : n))...);
}
template <class V, int S>
inline __attribute__((always_inline)) V sums(V* v) {
  constexpr int n = sizeof(V) / sizeof(v[0][0]);
  for (int i = 0; i < S; ++i) v[i] = fold<V, S>(v[i], v[i + S], std::make_integer_sequence<int, n>{});
  if constexpr (S == 1) return v[0];
  else return sums<V, S / 2>(v);
}

// Calls body(T{}) for the C++ type of a dtype.
template <class Body>
void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32: return body(float{});
    case Dtype::f16: return body(f16{});
    case Dtype::bf16: return body(bf16{});
    case Dtype::f64: return body(double{});
  }
}

// Numbers first … first + count − 1 of a weight as the products take them: themselves, or a converted copy.
template <class W>
struct Weights {
  array<W> copy;
  const W* data;
  Weights(const void* weight, Dtype dtype, int64_t count, int64_t first = 0) {
    with_type(dtype, [&](auto t) {
      using From = decltype(t);
      const From* from = (const From*)weight + first;
      if constexpr (std::is_same_v<From, W>) data = from;
      else if constexpr (std::is_same_v<wide<From>, wide<W>>) {  // double goes with double alone
        copy.resize(count);
        data = copy.data();
        over_row<W>(count, [&](int64_t i, auto load, auto store) { store(copy.data() + i, load(from + i)); });
      }
    });
  }
};

}  // namespace minireft::cpu
