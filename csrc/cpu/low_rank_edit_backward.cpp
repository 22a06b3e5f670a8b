// The gradients of h + Aᵀ(D h + b) on the CPU: u = A g, dh = g + Dᵀu, dD = Σ u hᵀ, dA = Σ δ gᵀ, db = Σ u over rows.
// One pass reads g and h and writes dh while the weights' sums stay in cache; pieces of rows add up in a fixed order.
// You should see the same bits on any number of threads.
#include "parallel.h"
#include "products.h"
#include "rows.h"

namespace minireft::cpu {
namespace {

constexpr int64_t WIDE_TILE = 64, GROUP = VECTOR_BYTES / 8;   // rows per tile at most; rows (or pairs) in registers: 8 of 32, else 4

template <class T, class W>
void backward(const Edit& e, const EditBackward& f) {
  using F = wide<T>;
  using M = multiplier<W>;
  constexpr int64_t ROWS_AT_ONCE = GROUP * per<M>;
  const int64_t C = e.C, r = e.r, n_units = units<M>(r);
  const bool want_weights = f.ddown, want_h = f.dh.data, past = want_h && streams<T>(f.dh, e.B * e.P, C);
  if (want_weights)
    with_type(e.weight_dtype, [&](auto t) {
      std::memset(f.ddown, 0, e.K * r * C * sizeof t);
      std::memset(f.dup, 0, e.K * r * C * sizeof t);
      std::memset(f.dbias, 0, e.K * r * sizeof t);
    });
  // Where D, dD and dA fit in a core's cache, a tile is one pass over whole rows, read in memory's order; otherwise many rows
  // share a block of columns, whose weights then stay in cache.
  const bool small = 3 * r * C * sizeof(F) <= (512 << 10);
  // Rows shorter than a page end before the processor's own prefetching has got going: where they come from memory, the next
  // tile's are asked for.
  const bool ahead = small && C * sizeof(T) <= 4096 && e.B * e.P * C * sizeof(T) >= (4 << 20);
  const int64_t tile = small ? ROWS_AT_ONCE : WIDE_TILE, L = lanes<F>;
  const int64_t width = small ? C : std::max<int64_t>(4 * L, (128 << 10) / (r * sizeof(F)) / at_once<M> * at_once<M>);
  for (const Group& group : group_rows(e)) {
    const int64_t first = group.bank * r * C;
    const Weights<W> D(f.down, e.weight_dtype, r * C, first), A(f.up, e.weight_dtype, r * C, first);
    const Dots<T, W> dots(A.data, C, r, group.count);
    const array<M> down = want_h ? packed<M>(D.data, C, r) : array<M>();
    // Pieces of rows, each with its own sums, added up in their order: the sizes alone decide how many.
    const int64_t size = packed_size<M>(C, r), stride = want_weights ? 2 * size + (r + L - 1) / L * L : 0;
    const int64_t least = std::clamp<int64_t>(32 * r, 64, 256);
    const int64_t most = std::clamp<int64_t>((8 << 20) / (int64_t)(sizeof(F) * (stride + 1)), 1, 16);
    const int64_t pieces = std::clamp<int64_t>(group.count / least, 1, most);
    array<F> sums(pieces * stride);
    parallel(pieces, [&](int64_t piece) {
      array<F> u(tile * r), delta(tile * r);
      array<M> by_rank(tile * n_units), by_row(tile * r), delta_by_row(tile * r);
      F *dD = sums.data() + piece * stride, *dA = dD + size, *db = dA + size;
      std::fill_n(dD, stride, F(0));
      const int64_t end = group.count * (piece + 1) / pieces;
      for (int64_t begin = group.count * piece / pieces; begin < end; begin += tile) {
        const int64_t rows = std::min<int64_t>(tile, end - begin);
        const T *g[WIDE_TILE], *h[WIDE_TILE], *next[2 * ROWS_AT_ONCE];
        T* dh[WIDE_TILE];
        const auto g_row = [&](int64_t n) -> const T* { return row<T>(e, f.g, n); };
        const auto h_row = [&](int64_t n) -> const T* { return f.rows ? (const T*)f.rows + n * C : row<T>(e, f.h, n); };
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t n = group[begin + i];
          g[i] = g_row(n), h[i] = h_row(n);
          if (want_h) dh[i] = row<T>(e, f.dh, n);
          if (ahead) {
            const int64_t m = group[std::min(begin + tile + i, group.count - 1)];
            next[2 * i] = g_row(m), next[2 * i + 1] = h_row(m);
          }
          std::copy_n((const F*)f.delta + n * r, r, &delta[i * r]);
        }
        dots(g, rows, u.data());
        if (want_weights)
          for (int64_t k = 0; k < r; ++k) {
            F sum = 0;
            for (int64_t i = 0; i < rows; ++i) sum += u[i * r + k];
            db[k] += sum;
          }
        const M *u_ranks = of_ranks<M>(u.data(), rows, r, by_rank), *u_rows = of_rows<M>(u.data(), rows, r, by_row);
        const M* delta_rows = of_rows<M>(delta.data(), rows, r, delta_by_row);
        for (int64_t c = 0; c < C; c += width) {
          const auto some = [&](int64_t i, auto R) {
            gradients<T, M, R>(g + i, h + i, want_h ? dh + i : nullptr, u_ranks + i * n_units, u_rows + i / per<M> * r,
                               delta_rows + i / per<M> * r, down.data(), want_weights ? dD : nullptr, dA, r, c,
                               std::min(c + width, C), ahead ? next + 2 * i : nullptr, past);
          };
          small ? in_groups<ROWS_AT_ONCE>(rows, some) : in_groups<GROUP>(rows, some);
        }
      }
      fence();
    });
    if (!want_weights) continue;
    for (int64_t piece = 1; piece < pieces; ++piece)
      for (int64_t i = 0; i < stride; ++i) sums[i] += sums[piece * stride + i];
    with_type(e.weight_dtype, [&](auto t) {
      using Weight = decltype(t);
      if constexpr (std::is_same_v<wide<Weight>, F>) {
        unpack<M>(sums.data(), (Weight*)f.ddown + group.bank * r * C, C, r);
        unpack<M>(sums.data() + size, (Weight*)f.dup + group.bank * r * C, C, r);
        for (int64_t k = 0; k < r; ++k) narrow(sums[2 * size + k], ((Weight*)f.dbias)[group.bank * r + k]);
      }
    });
  }
}

}  // namespace

const char* low_rank_edit_backward(const Edit& e, const EditBackward& f, void*) {
  with_types(e, [&](auto t, auto w) { backward<decltype(t), decltype(w)>(e, f); });
  return nullptr;
}

}  // namespace minireft::cpu
