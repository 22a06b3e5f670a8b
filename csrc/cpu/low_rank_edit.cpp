// h + Aᵀ(D h + b) on the CPU, forward and backward: the arithmetic behind LoReFT and DiReFT.
// Four rows at a time stay in cache between the two products; accumulators, 4 rows × 4 ranks or 4 rows × 4 vectors, stay in
// registers. You should see it outrun addmm(h, D h + b, A) where N·C leaves the cache; benchmarks/results says where not.
#include "parallel.h"
#include "rows.h"
#include "vector.h"

namespace minireft::cpu {
namespace {

constexpr int VECTORS = 4;     // vectors side by side in a block of columns

// ---- the two products -------------------------------------------------------------------------------------------------

constexpr int ROWS = 4;                                                  // rows × ranks of accumulators in dots:
template <class T> constexpr int ranks = lanes<T> >= 16 ? 4 : 2;           // as many as registers allow, and lanes to sum them

// out[i][k] = x[i] · W[k] for R rows and Q ranks.
template <class T, int R, int Q>
void dot_block(const T* const* x, const wide<T>* W, int64_t C, wide<T>* out, int64_t r) {
  constexpr int L = lanes<T>, MOST = ROWS * ranks<T>;
  vec<T> acc[MOST];
  for (int j = 0; j < MOST; ++j) acc[j] = vec<T>{};
  over_row<T>(C, [&](int64_t c, auto load, auto) __attribute__((always_inline)) {
    vec<T> xs[R];
    for (int i = 0; i < R; ++i) xs[i] = load(x[i] + c);
    for (int q = 0; q < Q; ++q) {
      vec<T> w = load(W + q * C + c);
      hold(w);
      for (int i = 0; i < R; ++i) acc[i * ranks<T> + q] += xs[i] * w;
    }
  });
  static_assert(MOST == L || MOST == 2 * L || 2 * MOST == L);
  wide<T> total[MOST + L];
  for (int j = 0; j < MOST; j += L) store(total + j, sums<vec<T>, L / 2>(acc + j));
  for (int i = 0; i < R; ++i)
    for (int q = 0; q < Q; ++q) out[i * r + q] = total[i * ranks<T> + q];
}

// body(first, n) over count things in groups of n = N, then in halves of that: n is a compile-time constant.
template <int N, class Body>
inline __attribute__((always_inline)) void in_groups(int64_t count, const Body& body, int64_t first = 0) {
  for (; first + N <= count; first += N) body(first, std::integral_constant<int, N>{});
  if constexpr (N > 1)
    if (first < count) in_groups<N / 2>(count, body, first);
}

// out[i][k] = x[i] · W[k] for all rows of a tile and all r ranks: each rank's weights are read once a tile.
template <class T>
void dots(const T* const* x, int64_t rows, const wide<T>* W, int64_t C, int64_t r, wide<T>* out) {
  in_groups<ranks<T>>(r, [&](int64_t k, auto Q) {
    in_groups<ROWS>(rows, [&](int64_t i, auto R) { dot_block<T, R, Q>(x + i, W + k * C, C, out + i * r + k, r); });
  });
}

// out[i][c] = x[i][c] + Σ_k f[i][k] W[k][c] for R rows and V vectors of columns. Meanwhile the rows that come next, if any,
// are asked into the second-level cache: memory would have nothing to do otherwise.
template <class T, int R, int V, class Load, class Store>
inline __attribute__((always_inline)) void add_block(const T* const* x, T* const* out, const wide<T>* f, const wide<T>* W,
                                                     int64_t C, int64_t r, int64_t c, Load load, Store store,
                                                     const T* const* next) {
  vec<T> acc[R][V];
  if (next)
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; v += 64 / (lanes<T> * sizeof(T))) __builtin_prefetch(next[i] + c + v * lanes<T>, 0, 2);
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = load(x[i] + c + v * lanes<T>);
  for (int64_t k = 0; k < r; ++k) {
    vec<T> w[V];
    for (int v = 0; v < V; ++v) w[v] = load(W + k * C + c + v * lanes<T>), hold(w[v]);
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] += f[i * r + k] * w[v];
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) store(out[i] + c + v * lanes<T>, acc[i][v]);
}

// The same for columns begin … end of R rows.
template <class T, int R>
void add_products(const T* const* x, T* const* out, const wide<T>* f, const wide<T>* W, int64_t C, int64_t r,
                  int64_t begin, int64_t end, const T* const* next = nullptr) {
  constexpr int64_t L = lanes<T>;
  const auto whole_load = [](auto* p) __attribute__((always_inline)) { return load(p); };
  const auto whole_store = [](auto* p, auto v) __attribute__((always_inline)) { store(p, v); };
  int64_t c = begin;
  for (; c + VECTORS * L <= end; c += VECTORS * L)
    add_block<T, R, VECTORS>(x, out, f, W, C, r, c, whole_load, whole_store, next);
  for (; c + L <= end; c += L) add_block<T, R, 1>(x, out, f, W, C, r, c, whole_load, whole_store, next);
  if (const int64_t n = end - c)
    add_block<T, R, 1>(x, out, f, W, C, r, c, [n](auto* p) { return load(p, n); },
                       [n](auto* p, auto v) { store(p, v, n); }, next);
}

// Weights of the backward pass, and the sums of their gradients, are packed so that what meets one vector of columns is
// contiguous: vector v of rank k at [(v * r + k) * lanes], zeros beyond the last column.
template <class F>
struct Packed {
  static int64_t size(int64_t C, int64_t r) { return (C + lanes<F> - 1) / lanes<F> * lanes<F> * r; }
  static int64_t at(int64_t c, int64_t k, int64_t r) { return (c / lanes<F> * r + k) * lanes<F> + c % lanes<F>; }
};

// One pass over columns begin … end of R rows: dh = g + Dᵀu, dD += u hᵀ, dA += δ gᵀ. D, dD and dA are packed.
template <class T, int R, bool WANT_H, bool WANT_WEIGHTS>
void gradients(const T* const* g, const T* const* h, T* const* dh, const wide<T>* u, const wide<T>* delta,
               const wide<T>* D, wide<T>* dD, wide<T>* dA, int64_t r, int64_t begin, int64_t end) {
  constexpr int64_t L = lanes<T>;
  D += begin * r, dD += begin * r, dA += begin * r;
  over_row<T>(end - begin, [&](int64_t c, auto load_row, auto store_row) __attribute__((always_inline)) {
    vec<T> gs[R], hs[R], acc[R];
    for (int i = 0; i < R; ++i) {
      acc[i] = gs[i] = load_row(g[i] + begin + c);
      if (WANT_WEIGHTS) hs[i] = load_row(h[i] + begin + c);
    }
    for (int64_t k = 0; k < r; ++k, D += L, dD += L, dA += L) {
      if (WANT_H) {
        vec<T> w = load(D);
        hold(w);
        for (int i = 0; i < R; ++i) acc[i] += u[i * r + k] * w;
      }
      if (WANT_WEIGHTS) {
        vec<T> down = load(dD), up = load(dA);
        for (int i = 0; i < R; ++i) down += u[i * r + k] * hs[i], up += delta[i * r + k] * gs[i];
        store(dD, down), store(dA, up);
      }
    }
    if (WANT_H)
      for (int i = 0; i < R; ++i) store_row(dh[i] + begin + c, acc[i]);
  });
}

// A weight in the arithmetic's type: itself, or a converted copy.
template <class F>
struct Wide {
  std::vector<F> copy;
  const F* data;
  Wide(const void* weight, Dtype dtype, int64_t count) {
    data = (const F*)weight;
    if (dtype == Dtype::f32 || dtype == Dtype::f64) return;
    copy.resize(count);
    with_type(dtype, [&](auto t) {
      for (int64_t i = 0; i < count; ++i) copy[i] = widen(((const decltype(t)*)weight)[i]);
    });
    data = copy.data();
  }
};

// ---- forward ----------------------------------------------------------------------------------------------------------

template <class T>
void forward(const Edit& e, const EditForward& f) {
  using F = wide<T>;
  const int64_t C = e.C, r = e.r, N = e.B * e.P;
  const Wide<F> D(f.down, e.weight_dtype, e.K * r * C), A(f.up, e.weight_dtype, e.K * r * C), b(f.bias, e.weight_dtype, e.K * r);
  const std::vector<Group> groups = group_rows(e);
  if (f.delta && (e.positions.data || e.tasks.data)) std::fill_n((F*)f.delta, N * r, F(0));
  // Four rows at a time while D and A fit in a core's cache, otherwise more rows share one reading of them.
  const int64_t tile = 2 * r * C * sizeof(F) <= (512 << 10) ? ROWS : 16, width = VECTORS * lanes<T>;
  for (const Group& group : groups) {
    const F *down = D.data + group.bank * r * C, *up = A.data + group.bank * r * C, *bias = b.data + group.bank * r;
    constexpr int64_t PIECE = 16;
    parallel((group.count + PIECE - 1) / PIECE, [&](int64_t piece) {
      std::vector<F> delta(tile * r);
      const int64_t end = std::min((piece + 1) * PIECE, group.count);
      for (int64_t begin = piece * PIECE; begin < end; begin += tile) {
        const T* x[PIECE];
        T* out[PIECE];
        const T* next[ROWS];
        const int64_t rows = std::min(tile, end - begin);
        for (int i = 0; i < ROWS; ++i) next[i] = row<T>(e, f.h, group[std::min(begin + ROWS + i, group.count - 1)]);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t n = group[begin + i];
          x[i] = row<T>(e, f.h, n), out[i] = row<T>(e, f.out, n);
          if (f.rows) std::memcpy((T*)f.rows + n * C, x[i], C * sizeof(T));
        }
        dots<T>(x, rows, down, C, r, delta.data());
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t k = 0; k < r; ++k) delta[i * r + k] += bias[k];
          if (f.delta) std::copy_n(&delta[i * r], r, (F*)f.delta + group[begin + i] * r);
        }
        const int64_t step = rows > ROWS ? width : C;
        for (int64_t c = 0; c < C; c += step)
          in_groups<ROWS>(rows, [&](int64_t i, auto R) {
            add_products<T, R>(x + i, out + i, &delta[i * r], up, C, r, c, std::min(c + step, C), rows > ROWS ? nullptr : next);
          });
      }
    });
  }
}

// ---- backward ---------------------------------------------------------------------------------------------------------

constexpr int WIDE_TILE = 64, GROUP = VECTOR_BYTES / 8;   // rows per tile at most; rows per pass: 8 with 32 registers, else 4

template <class T>
void backward(const Edit& e, const EditBackward& f) {
  using F = wide<T>;
  const int64_t C = e.C, r = e.r;
  const Wide<F> D(f.down, e.weight_dtype, e.K * r * C), A(f.up, e.weight_dtype, e.K * r * C);
  const bool want_weights = f.ddown, want_h = f.dh.data;
  if (want_weights)
    with_type(e.weight_dtype, [&](auto t) {
      using W = decltype(t);
      std::memset(f.ddown, 0, e.K * r * C * sizeof(W));
      std::memset(f.dup, 0, e.K * r * C * sizeof(W));
      std::memset(f.dbias, 0, e.K * r * sizeof(W));
    });
  // Where D, dD and dA fit in a core's cache, a tile is one pass over whole rows, read in memory's order; otherwise many rows
  // share a block of columns, whose weights then stay in cache.
  const bool small = 3 * r * C * sizeof(F) <= (512 << 10);
  const int64_t tile = small ? GROUP : WIDE_TILE, L = lanes<F>;
  const int64_t width = small ? C : std::max<int64_t>(4 * L, (64 << 10) / (r * sizeof(F)) / L * L);
  for (const Group& group : group_rows(e)) {
    const F *down = D.data + group.bank * r * C, *up = A.data + group.bank * r * C;
    const int64_t size = Packed<F>::size(C, r);
    std::vector<F> packed_down(want_h ? size : 0);
    if (want_h)
      for (int64_t k = 0; k < r; ++k)
        for (int64_t c = 0; c < C; ++c) packed_down[Packed<F>::at(c, k, r)] = down[k * C + c];
    // Pieces of rows, each with its own sums, added up in their order: the sizes alone decide how many.
    const int64_t stride = want_weights ? 2 * size + (r + L - 1) / L * L : 0, least = std::clamp<int64_t>(32 * r, 64, 256);
    const int64_t most = std::clamp<int64_t>((8 << 20) / (int64_t)(sizeof(F) * (stride + 1)), 1, 16);
    const int64_t pieces = std::clamp<int64_t>(group.count / least, 1, most);
    std::vector<F> sums(pieces * stride);
    parallel(pieces, [&](int64_t piece) {
      std::vector<F> u(tile * r), delta(tile * r);
      F *dD = sums.data() + piece * stride, *dA = dD + size, *db = dA + size;
      const int64_t end = group.count * (piece + 1) / pieces;
      for (int64_t begin = group.count * piece / pieces; begin < end; begin += tile) {
        const int64_t rows = std::min<int64_t>(tile, end - begin);
        const T *g[WIDE_TILE], *h[WIDE_TILE];
        T* dh[WIDE_TILE];
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t n = group[begin + i];
          g[i] = row<T>(e, f.g, n);
          h[i] = f.rows ? (const T*)f.rows + n * C : row<T>(e, f.h, n);
          if (want_h) dh[i] = row<T>(e, f.dh, n);
          std::copy_n((const F*)f.delta + n * r, r, &delta[i * r]);
        }
        dots<T>(g, rows, up, C, r, u.data());
        if (want_weights)
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = 0; k < r; ++k) db[k] += u[i * r + k];
        for (int64_t c = 0; c < C; c += width)
          in_groups<GROUP>(rows, [&](int64_t i, auto R) {
            const auto pass = [&](auto H, auto W) {
              gradients<T, R, H.value, W.value>(g + i, h + i, dh + i, &u[i * r], &delta[i * r], packed_down.data(), dD, dA, r,
                                                c, std::min(c + width, C));
            };
            if (want_h && want_weights) pass(std::true_type{}, std::true_type{});
            else if (want_h) pass(std::true_type{}, std::false_type{});
            else if (want_weights) pass(std::false_type{}, std::true_type{});
          });
      }
    });
    if (!want_weights) continue;
    for (int64_t piece = 1; piece < pieces; ++piece)
      for (int64_t i = 0; i < stride; ++i) sums[i] += sums[piece * stride + i];
    with_type(e.weight_dtype, [&](auto t) {
      using W = decltype(t);
      if constexpr (std::is_same_v<wide<W>, F>) {
        W *ddown = (W*)f.ddown + group.bank * r * C, *dup = (W*)f.dup + group.bank * r * C, *dbias = (W*)f.dbias + group.bank * r;
        for (int64_t k = 0; k < r; ++k) {
          for (int64_t c = 0; c < C; ++c) {
            narrow(sums[Packed<F>::at(c, k, r)], ddown[k * C + c]);
            narrow(sums[size + Packed<F>::at(c, k, r)], dup[k * C + c]);
          }
          narrow(sums[2 * size + k], dbias[k]);
        }
      }
    });
  }
}

}  // namespace

const char* low_rank_edit(const Edit& e, const EditForward& f, void*) {
  with_type(e.dtype, [&](auto t) { forward<decltype(t)>(e, f); });
  return nullptr;
}

const char* low_rank_edit_backward(const Edit& e, const EditBackward& f, void*) {
  with_type(e.dtype, [&](auto t) { backward<decltype(t)>(e, f); });
  return nullptr;
}

int64_t low_rank_edit_workspace(const Edit&) { return 0; }

}  // namespace minireft::cpu
