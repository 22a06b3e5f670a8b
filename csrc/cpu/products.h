// The products of a low-rank edit on tiles of rows: x · Wᵀ forward, x + f W after it, and in backward both with the sums over
// rows that are the gradients of the weights. Accumulators, 4 rows × 4 ranks or 4 rows × 4 vectors, stay in registers.
// T is what rows are stored in; M, a multiplier, is float (or double), or a pair of bfloat16 where rows and weights are such
// and the processor multiplies pairs: twice the products an instruction, each exact, added in float. Only the factors δ and u
// are rounded to bfloat16 for it, as plain PyTorch rounds them between its two matrix products.
#pragma once
#include <algorithm>
#include <vector>

#include "vector.h"

namespace minireft::cpu {

constexpr int ROWS = 4, VECTORS = 4;                                     // rows × ranks of accumulators in dots:
template <class T> constexpr int ranks = lanes<T> >= 16 ? 4 : 2;           // as many as registers allow, and lanes to sum them
template <class M> constexpr int per = std::is_same_v<M, pair> ? 2 : 1;    // numbers in a multiplier
template <class M> int64_t units(int64_t r) { return (r + per<M> - 1) / per<M>; }

// body(first, n) over count things in groups of n = N, then in halves of that: n is a compile-time constant.
template <int N, class Body>
inline __attribute__((always_inline)) void in_groups(int64_t count, const Body& body, int64_t first = 0) {
  for (; first + N <= count; first += N) body(first, std::integral_constant<int, N>{});
  if constexpr (N > 1)
    if (first < count) in_groups<N / 2>(count, body, first);
}

// ---- x · Wᵀ ------------------------------------------------------------------------------------------------------------

// out[i][k] = x[i] · W[k] for R rows and Q ranks; W is bfloat16 where pairs, neighbours in a row, are multiplied.
template <class T, class W, int R, int Q>
void dot_block(const T* const* x, const W* w, int64_t C, wide<T>* out, int64_t r) {
  constexpr bool PAIRS = std::is_same_v<W, bf16>;
  using X = std::conditional_t<PAIRS, pair, T>;
  using Y = std::conditional_t<PAIRS, pair, W>;
  constexpr int L = lanes<T>, MOST = ROWS * ranks<T>;
  vec<T> acc[MOST];
  for (int j = 0; j < MOST; ++j) acc[j] = vec<T>{};
  over_row<X>(C / per<X>, [&](int64_t c, auto load, auto) __attribute__((always_inline)) {
    decltype(load((const X*)x[0])) xs[R];
    for (int i = 0; i < R; ++i) xs[i] = load((const X*)x[i] + c), hold(xs[i]);
    for (int q = 0; q < Q; ++q) {
      auto ws = load((const Y*)(w + q * C) + c);
      hold(ws);
      for (int i = 0; i < R; ++i) acc[i * ranks<T> + q] = add_product(acc[i * ranks<T> + q], xs[i], ws);
    }
  });
  static_assert(MOST == L || MOST == 2 * L || 2 * MOST == L);
  wide<T> total[MOST + L];
  for (int j = 0; j < MOST; j += L) store(total + j, sums<vec<T>, L / 2>(acc + j));
  for (int i = 0; i < R; ++i)
    for (int q = 0; q < Q; ++q) {
      out[i * r + q] = total[i * ranks<T> + q];
      if (C % per<X>) out[i * r + q] += widen(x[i][C - 1]) * widen(w[q * C + C - 1]);
    }
}

// out[i][k] = x[i] · W[k] for all rows of a tile and all r ranks: each rank's weights are read once a tile.
template <class T, class W>
void dots(const T* const* x, int64_t rows, const W* w, int64_t C, int64_t r, wide<T>* out) {
  in_groups<ranks<T>>(r, [&](int64_t k, auto Q) {
    in_groups<ROWS>(rows, [&](int64_t i, auto R) { dot_block<T, W, R, Q>(x + i, w + k * C, C, out + i * r + k, r); });
  });
}

// ---- weights and factors as multipliers ----------------------------------------------------------------------------------

// Weights, and the sums of their gradients, are packed so that what meets one vector of columns is contiguous: element c of
// rank (or pair of ranks) k of n is at [(c / lanes * n + k) * lanes + c % lanes], zeros beyond the last column.
template <class M> int64_t packed_size(int64_t C, int64_t n) { return (C + lanes<M> - 1) / lanes<M> * lanes<M> * n; }

template <class M, class W>
std::vector<M> packed(const W* w, int64_t C, int64_t r) {
  std::vector<M> all(packed_size<M>(C, units<M>(r)));
  M* to = all.data();
  over_row<W>(C, [&](int64_t c, auto load, auto store) {
    for (int64_t k = 0; k < r; k += per<M>, to += lanes<M>) {
      const W* low = w + k * C + c;
      if constexpr (per<M> == 2) write(to, join(load(low), k + 1 < r ? load(low + C) : vec<W>{}));
      else store(to, load(low));
    }
  });
  return all;
}

template <class F, class W>
void unpack(const F* from, W* w, int64_t C, int64_t r) {
  over_row<W>(C, [&](int64_t c, auto, auto store) {
    for (int64_t k = 0; k < r; ++k, from += lanes<F>) store(w + k * C + c, load(from));
  });
}

// Factors (rows, r) as multipliers of weights, (rows, units), and of rows, (rows or pairs of rows, r).
template <class M, class F>
const M* of_ranks(const F* f, int64_t rows, int64_t r, std::vector<M>& space) {
  if constexpr (per<M> == 1) return f;
  else {
    for (int64_t i = 0, j = 0; i < rows; ++i)
      for (int64_t k = 0; k < r; k += 2) space[j++] = join(f[i * r + k], k + 1 < r ? f[i * r + k + 1] : 0);
    return space.data();
  }
}
template <class M, class F>
const M* of_rows(const F* f, int64_t rows, int64_t r, std::vector<M>& space) {
  if constexpr (per<M> == 1) return f;
  else {
    for (int64_t i = 0, j = 0; i < rows; i += 2)
      for (int64_t k = 0; k < r; ++k) space[j++] = join(f[i * r + k], i + 1 < rows ? f[(i + 1) * r + k] : 0);
    return space.data();
  }
}

// ---- x + f W -------------------------------------------------------------------------------------------------------------

// out[i][c] = x[i][c] + Σ_k f[i][k] W[k][c] for R rows and V vectors of columns, W packed, n multipliers a row. Meanwhile the
// rows that come next, if any, are asked into the second-level cache: memory would have nothing to do otherwise.
template <class T, class M, int R, int V, class Load, class Store>
inline __attribute__((always_inline)) void add_block(const T* const* x, T* const* out, const M* f, const M* W, int64_t n,
                                                     int64_t c, Load load_row, Store store_row, const T* const* next) {
  constexpr int L = lanes<T>;
  vec<T> acc[R][V];
  if (next)
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; v += 64 / (L * sizeof(T))) __builtin_prefetch(next[i] + c + v * L, 0, 2);
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = load_row(x[i] + c + v * L);
  W += c * n;
  for (int64_t k = 0; k < n; ++k) {
    decltype(load(W)) w[V];
    for (int v = 0; v < V; ++v) w[v] = load(W + (v * n + k) * L), hold(w[v]);
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] = add_product(acc[i][v], f[i * n + k], w[v]);
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) store_row(out[i] + c + v * L, acc[i][v]);
}

// The same for columns begin … end of R rows, written past the caches or not.
template <class T, class M, int R>
void add_products(const T* const* x, T* const* out, const M* f, const M* W, int64_t n, int64_t begin, int64_t end,
                  const T* const* next, bool past) {
  constexpr int64_t L = lanes<T>;
  const auto whole_load = [](auto* p) __attribute__((always_inline)) { return load(p); };
  const auto whole_store = [past](auto* p, auto v) __attribute__((always_inline)) { past ? stream(p, v) : store(p, v); };
  int64_t c = begin;
  for (; c + VECTORS * L <= end; c += VECTORS * L)
    add_block<T, M, R, VECTORS>(x, out, f, W, n, c, whole_load, whole_store, next);
  for (; c + L <= end; c += L) add_block<T, M, R, 1>(x, out, f, W, n, c, whole_load, whole_store, next);
  if (const int64_t rest = end - c)
    add_block<T, M, R, 1>(x, out, f, W, n, c, [rest](auto* p) { return load(p, rest); },
                          [rest](auto* p, auto v) { store(p, v, rest); }, next);
}

// ---- backward ------------------------------------------------------------------------------------------------------------

// One pass over columns begin … end of R rows: dh = g + Dᵀu, dD += u hᵀ, dA += δ gᵀ. D, dD and dA are packed; u is given
// as multipliers of D's ranks and, like δ, as multipliers of rows.
template <class T, class M, int R, bool WANT_H, bool WANT_WEIGHTS>
void gradients(const T* const* g, const T* const* h, T* const* dh, const M* u_ranks, const M* u, const M* delta, const M* D,
               wide<T>* dD, wide<T>* dA, int64_t r, int64_t begin, int64_t end, bool past) {
  constexpr int64_t L = lanes<T>, J = (R + per<M> - 1) / per<M>;           // multipliers of rows: rows, or pairs of them
  const int64_t n = units<M>(r);
  D += begin * n, dD += begin * r, dA += begin * r;
  const auto rows_of = [](const vec<T>* x, int j) __attribute__((always_inline)) {
    if constexpr (per<M> == 1) return x[j];
    else return join(x[2 * j], 2 * j + 1 < R ? x[2 * j + 1] : vec<T>{});
  };
  over_row<T>(end - begin, [&](int64_t c, auto load_row, auto store_row) __attribute__((always_inline)) {
    vec<T> gs[R], hs[R];
    for (int i = 0; i < R; ++i) {
      gs[i] = load_row(g[i] + begin + c);
      if (WANT_WEIGHTS) hs[i] = load_row(h[i] + begin + c);
    }
    if (WANT_WEIGHTS) {
      decltype(rows_of(gs, 0)) gj[J], hj[J];
      for (int j = 0; j < J; ++j) gj[j] = rows_of(gs, j), hj[j] = rows_of(hs, j);
#pragma GCC unroll 2  // up to a third faster where bfloat16 rows are converted, the same elsewhere
      for (int64_t k = 0; k < r; ++k, dD += L, dA += L) {
        vec<T> down = load(dD), up = load(dA);
        for (int j = 0; j < J; ++j) down = add_product(down, u[j * r + k], hj[j]), up = add_product(up, delta[j * r + k], gj[j]);
        store(dD, down), store(dA, up);
      }
    }
    if (WANT_H) {
#pragma GCC unroll 2
      for (int64_t k = 0; k < n; ++k, D += L) {
        auto w = load(D);
        hold(w);
        for (int i = 0; i < R; ++i) gs[i] = add_product(gs[i], u_ranks[i * n + k], w);
      }
      for (int i = 0; i < R; ++i) store_row(dh[i] + begin + c, gs[i], past);
    }
  });
}

// ---- types ---------------------------------------------------------------------------------------------------------------

template <>
struct Wide<bf16> {  // weights that are multiplied in pairs, as they are
  const bf16* data;
  Wide(const void* weight, Dtype, int64_t) : data((const bf16*)weight) {}
};

// Calls body(T{}, W{}) for the types of rows and of weights, W as the products take it: bf16 in pairs, or the arithmetic's.
template <class Body>
void with_types(Dtype rows, Dtype weights, const Body& body) {
  if constexpr (HAS_PAIRS)
    if (rows == Dtype::bf16 && weights == Dtype::bf16) return body(bf16{}, bf16{});
  with_type(rows, [&](auto t) { body(t, wide<decltype(t)>{}); });
}
template <class W> using multiplier = std::conditional_t<std::is_same_v<W, bf16>, pair, W>;

}  // namespace minireft::cpu
