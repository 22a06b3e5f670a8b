// The products of a low-rank edit on tiles of rows: x · Wᵀ forward, x + f W after it, and in backward both with the sums over
// rows that are the gradients of the weights. Accumulators, 4 rows × 4 ranks or 4 rows × 4 vectors, stay in registers.
// T is what rows are stored in; M, a multiplier, is float (or double), or a pair of bfloat16 where rows are such and the
// processor multiplies pairs: twice the products an instruction, each exact, added in float. The factors δ and u, and weights
// in float, are rounded to bfloat16 for it, as plain PyTorch rounds them for its two matrix products; what is saved is not.
#pragma once
#include <algorithm>
#include <vector>

#include "vector.h"

namespace minireft::cpu {

constexpr int ROWS = 4, VECTORS = 4;                                     // rows × ranks of accumulators in dots:
template <class T> constexpr int ranks = lanes<T> >= 16 ? 4 : 2;           // as many as registers allow, and lanes to sum them
template <class W> using multiplier = std::conditional_t<std::is_same_v<W, bf16>, pair, W>;
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

// out[i][k] = x[i] · W[k] for R rows and Q ranks; W is bfloat16 where pairs, neighbours in a row, are multiplied. Fewer ranks have
// more sums each, since a sum waits for its last product.
template <class T, class W, int R, int Q>
void dot_block(const T* const* x, const W* w, int64_t C, wide<T>* out, int64_t r) {
  constexpr bool PAIRS = std::is_same_v<W, bf16>;
  using X = std::conditional_t<PAIRS, pair, T>;
  using Y = std::conditional_t<PAIRS, pair, W>;
  constexpr int L = lanes<T>, MOST = ROWS * ranks<T>, S = ranks<T> / Q;
  vec<T> acc[MOST];
  for (int j = 0; j < MOST; ++j) acc[j] = vec<T>{};
  in_vectors<X, S, 1>(0, C / per<X>, [&](auto V, int64_t c, auto load, auto) __attribute__((always_inline)) {
    decltype(load((const X*)x[0])) xs[R][V];
#pragma GCC unroll 16  // or accumulators lie in memory
    for (int i = 0; i < R; ++i)
      for (int s = 0; s < V; ++s) xs[i][s] = load((const X*)x[i] + c + s * L), hold(xs[i][s]);
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q)
      for (int s = 0; s < V; ++s) {
        auto ws = load((const Y*)(w + q * C) + c + s * L);
        hold(ws);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) acc[(i * Q + q) * S + s] = add_product(acc[(i * Q + q) * S + s], xs[i][s], ws);
      }
  });
  static_assert(MOST == L || MOST == 2 * L || 2 * MOST == L);
  wide<T> total[MOST + L];
  for (int j = 0; j < MOST; j += L) store(total + j, sums<vec<T>, L / 2>(acc + j));
  for (int i = 0; i < R; ++i)
    for (int q = 0; q < Q; ++q) {
      out[i * r + q] = total[(i * Q + q) * S];
      for (int s = 1; s < S; ++s) out[i * r + q] += total[(i * Q + q) * S + s];
    }
  for (int i = 0; C % per<X> && i < R; ++i)
    for (int q = 0; q < Q; ++q) out[i * r + q] += widen(x[i][C - 1]) * widen(w[q * C + C - 1]);
}

// The same with ranks in lanes and a row's numbers broadcast: nothing is left to be added across lanes. W is in panels, one
// for each vector of ranks: number (or pair) j of a row's n meets what is at (k / lanes * n + j) * lanes. Adds numbers
// begin … end to out, or sets it for the first; of Q vectors of ranks `left` are real.
template <class M, int R, int Q, class F>
void rank_block(const M* const* x, const M* W, int64_t n, int64_t begin, int64_t end, F* out, int64_t r, int64_t left) {
  constexpr int64_t L = lanes<F>;
  vec<F> acc[R][Q] = {};
  for (int64_t j = begin; j < end; ++j) {
    decltype(load(W)) w[Q];
    for (int q = 0; q < Q; ++q) w[q] = load(W + (q * n + j) * L), hold(w[q]);
    for (int i = 0; i < R; ++i)
      for (int q = 0; q < Q; ++q) acc[i][q] = add_product(acc[i][q], x[i][j], w[q]);
  }
  for (int i = 0; i < R; ++i)
    for (int q = 0; q < Q; ++q) {
      F* to = out + i * r + q * L;
      const int64_t count = left - q * L;
      if (count >= L) store(to, begin ? load(to) + acc[i][q] : acc[i][q]);
      else store(to, begin ? load(to, count) + acc[i][q] : acc[i][q], count);
    }
}

// out[i][k] = x[i] · W[k] for all rows of a tile and all r ranks. Many ranks go in lanes, if as many rows as `count` pay for the
// panels, and rows need no conversion; few are read as they lie, each rank's weights once a tile.
template <class T, class W>
class Dots {
  using M = multiplier<W>;
  static constexpr bool DIRECT = std::is_same_v<T, W>;
  static constexpr int64_t L = lanes<T>, PART = 64;  // numbers in one sum: a long one would lose digits that plain PyTorch keeps
  const W* w_;
  int64_t C_, r_;
  array<M> panels_;

 public:
  Dots(const W* w, int64_t C, int64_t r, int64_t count) : w_(w), C_(C), r_(r) {
    if (!DIRECT || r < 2 * L || count < 256 || C % per<M>) return;
    const int64_t n = C / per<M>;
    panels_.resize((r + L - 1) / L * L * n, M{});
    for (int64_t k0 = 0; k0 < r; k0 += L)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t k = k0; k < std::min(k0 + L, r); ++k) panels_[k0 * n + j * L + k - k0] = read<M>(w + k * C + j * per<M>);
  }

  bool in_lanes() const { return !panels_.empty(); }

  void operator()(const T* const* x, int64_t rows, wide<T>* out) const {
    if constexpr (DIRECT)
      if (in_lanes()) {
        const int64_t n = C_ / per<M>;
        return in_groups<2>((r_ + L - 1) / L, [&](int64_t p, auto Q) {
          in_groups<ROWS * ranks<T> / Q>(rows, [&](int64_t i, auto R) {
            for (int64_t j = 0; j < n; j += PART)
              rank_block<M, R, Q>((const M* const*)x + i, &panels_[p * n * L], n, j, std::min(j + PART, n), out + i * r_ + p * L,
                                  r_, r_ - p * L);
          });
        });
      }
    in_groups<ranks<T>>(r_, [&](int64_t k, auto Q) {
      in_groups<ROWS>(rows, [&](int64_t i, auto R) { dot_block<T, W, R, Q>(x + i, w_ + k * C_, C_, out + i * r_ + k, r_); });
    });
  }
};

// ---- weights and factors as multipliers ----------------------------------------------------------------------------------

// Weights, and the sums of their gradients, are packed so that what meets one vector of columns (of pairs: a line, two woven
// vectors) is contiguous: for each, vector by vector, its columns of rank (or pair of ranks) 0, 1, …; zeros beyond the last column.
template <class T, class M> using columns = std::conditional_t<per<M> == 2, line, T>;       // what is read of a row at once
template <class M> constexpr int64_t at_once = per<M> * lanes<M>;                           // so many columns
template <class M> int64_t packed_size(int64_t C, int64_t n) { return (C + at_once<M> - 1) / at_once<M> * at_once<M> * n; }
template <class M> int64_t packed_at(int64_t c, int64_t v, int64_t n, int64_t k) {  // where vector v from column c on, rank k of n, is
  constexpr int64_t G = per<M>;
  return c * n + ((v - v % G) * n + k * G + v % G) * lanes<M>;
}

template <class M, class W>
array<M> packed(const W* w, int64_t C, int64_t r) {
  array<M> all(packed_size<M>(C, units<M>(r)));
  M* to = all.data();
  in_vectors<W, per<M>, per<M>>(0, C, [&](auto, int64_t c, auto load, auto) {
    for (int64_t k = 0; k < r; k += per<M>, to += at_once<M>) {
      const auto low = load((const columns<W, M>*)(w + k * C + c));
      if constexpr (per<M> == 2) write(to, weave(low, k + 1 < r ? load((const line*)(w + (k + 1) * C + c)) : vecu{}));
      else store(to, low);
    }
  });
  return all;
}

template <class M, class F, class W>
void unpack(const F* from, W* w, int64_t C, int64_t r) {
  constexpr int64_t size = at_once<M>;
  for (int64_t c = 0; c < C; c += size)
    for (int64_t k = 0; k < r; ++k, from += size) {
      F row[size];
      if constexpr (per<M> == 1) store(row, load(from));
      else write(row, in_order({load(from), load(from + lanes<M>)}));
      over_row<W>(std::min(size, C - c), [&](int64_t i, auto load, auto store) { store(w + k * C + c + i, load(row + i)); });
    }
}

// Factors (rows, r) as multipliers of weights, (rows, units), and of rows, (rows or pairs of rows, r).
template <class M, class F>
const M* of_ranks(const F* f, int64_t rows, int64_t r, array<M>& space) {
  if constexpr (per<M> == 1) return f;
  else {
    if (r % 2 == 0) over_row<bf16>(rows * r, [&](int64_t k, auto load, auto store) { store((bf16*)space.data() + k, load(f + k)); });
    else
      for (int64_t i = 0, j = 0; i < rows; ++i)
        for (int64_t k = 0; k < r; k += 2) space[j++] = join(f[i * r + k], k + 1 < r ? f[i * r + k + 1] : 0);
    return space.data();
  }
}
template <class M, class F>
const M* of_rows(const F* f, int64_t rows, int64_t r, array<M>& space) {
  if constexpr (per<M> == 1) return f;
  else {
    for (int64_t i = 0, j = 0; i < rows; i += 2)
      for (int64_t k = 0; k < r; ++k) space[j++] = join(f[i * r + k], i + 1 < rows ? f[(i + 1) * r + k] : 0);
    return space.data();
  }
}

// ---- x + f W -------------------------------------------------------------------------------------------------------------

// Asks V vectors of rows that come later, if there are any, into the second-level cache: memory would have nothing to do otherwise.
template <class T, int V>
inline __attribute__((always_inline)) void ask_for(const T* const* rows, int count, int64_t c) {
  constexpr int L = lanes<T>;
  for (int i = 0; rows && i < count; ++i)
    for (int v = 0; v < V; v += 64 / (L * sizeof(T))) __builtin_prefetch(rows[i] + c + v * L, 0, 2);
}

// out[i][c] = x[i][c] + Σ_k f[i][k] W[k][c] for R rows and V vectors of columns, W packed, n multipliers a row.
template <class T, class M, int R, int V, class Load, class Store>
inline __attribute__((always_inline)) void add_block(const T* const* x, T* const* out, const M* f, const M* W, int64_t n,
                                                     int64_t c, Load load_row, Store store_row, const T* const* next, bool past) {
  constexpr int L = lanes<T>;
  vec<T> acc[R][V];
  ask_for<T, V>(next, R, c);
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; v += per<M>)
      if constexpr (per<M> == 1) acc[i][v] = vec<T>{};
      else {  // x first: a result in bfloat16 loses nothing by it
        const auto [first, second] = weave(vecu{}, load_row((const line*)(x[i] + c + v * L)));
        acc[i][v] = (vecf)first, acc[i][v + 1] = (vecf)second;
      }
  for (int64_t k = 0; k < n; ++k) {
    decltype(load(W)) w[V];
    for (int v = 0; v < V; ++v) w[v] = load(W + packed_at<M>(c, v, n, k)), hold(w[v]);
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] = add_product(acc[i][v], f[i * n + k], w[v]);
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; v += per<M>)
      if constexpr (per<M> == 1) store_row(out[i] + c + v * L, load_row(x[i] + c + v * L) + acc[i][v], past);  // x last: rounded once
      else store_row((line*)(out[i] + c + v * L), woven<vecf>{acc[i][v], acc[i][v + 1]}, past);
}

// The same for columns begin … end of R rows, written past the caches or not.
template <class T, class M, int R>
void add_products(const T* const* x, T* const* out, const M* f, const M* W, int64_t n, int64_t begin, int64_t end,
                  const T* const* next, bool past) {
  in_vectors<T, VECTORS, per<M>>(begin, end, [&](auto V, int64_t c, auto load_row, auto store_row) __attribute__((always_inline)) {
    add_block<T, M, R, V>(x, out, f, W, n, c, load_row, store_row, next, past);
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------------

// sum[k] += Σ_i f[i][k] x[i] over R rows for all r ranks and V vectors of columns; sum is packed, f in multipliers of rows.
template <class T, class M, int R, int V, class Load>
inline __attribute__((always_inline)) void sum_block(const T* const* x, const M* f, wide<T>* sum, int64_t r, int64_t c, Load load_row) {
  constexpr int J = (R + per<M> - 1) / per<M>;                             // multipliers of rows: rows, or pairs of them
  decltype(load(f)) xs[J][V];
  for (int j = 0; j < J; ++j)
    for (int v = 0; v < V; v += per<M>) {
      const auto line_of = [&](int i) __attribute__((always_inline)) { return load_row((const columns<T, M>*)(x[i] + c + v * lanes<T>)); };
      if constexpr (per<M> == 1) xs[j][v] = line_of(j);
      else {
        const auto [first, second] = weave(line_of(2 * j), 2 * j + 1 < R ? line_of(2 * j + 1) : vecu{});
        xs[j][v] = first, xs[j][v + 1] = second;
      }
    }
  for (int64_t k = 0; k < r; ++k) {
    vec<T> acc[V];
    for (int v = 0; v < V; ++v) acc[v] = load(sum + packed_at<M>(c, v, r, k));
    for (int j = 0; j < J; ++j)
      for (int v = 0; v < V; ++v) acc[v] = add_product(acc[v], f[j * r + k], xs[j][v]);
    for (int v = 0; v < V; ++v) store(sum + packed_at<M>(c, v, r, k), acc[v]);
  }
}

// dh = g + Dᵀu, dD += u hᵀ, dA += δ gᵀ for R rows and columns begin … end; null dh or dD: not wanted. D, dD and dA are packed; u
// is given as multipliers of D's ranks and, like δ, as multipliers of rows; next has R rows of g and R of h. In pairs a line of
// each row at a time: rows that lie a power of two apart would throw a second one out of the cache before its turn.
template <class T, class M, int R>
void gradients(const T* const* g, const T* const* h, T* const* dh, const M* u_ranks, const M* u, const M* delta, const M* D,
               wide<T>* dD, wide<T>* dA, int64_t r, int64_t begin, int64_t end, const T* const* next, bool past) {
  in_vectors<T, per<M>, per<M>>(begin, end, [&](auto V, int64_t c, auto load_row, auto store_row) __attribute__((always_inline)) {
    ask_for<T, V>(next, 2 * R, c);
    if (dD) sum_block<T, M, R, V>(h, u, dD, r, c, load_row), sum_block<T, M, R, V>(g, delta, dA, r, c, load_row);
    if (dh)
      in_groups<ROWS * VECTORS / V>(R, [&](int64_t i, auto S) __attribute__((always_inline)) {
        add_block<T, M, S, V>(g + i, dh + i, u_ranks + i * units<M>(r), D, units<M>(r), c, load_row, store_row, nullptr, past);
      });
  });
}

// ---- types ---------------------------------------------------------------------------------------------------------------

// Calls body(T{}, W{}) for the type of an edit's rows and that of weights in its products: bf16 in pairs, or the arithmetic's.
template <class Body>
void with_types(const Edit& e, const Body& body) {
  with_type(e.dtype, [&](auto t) {
    using T = decltype(t);
    body(t, std::conditional_t<HAS_PAIRS && std::is_same_v<T, bf16>, bf16, wide<T>>{});
  });
}

}  // namespace minireft::cpu
