// h + Aᵀ(D h + b) on the CPU, forward: the arithmetic behind LoReFT and DiReFT; products.h has the products.
// A few rows at a time stay in cache between the two products. low_rank_edit_backward.cpp is its other half.
// You should see it outrun addmm(h, D h + b, A), most where N·C leaves the cache: it passes over memory twice for 5 times, and
// backward 3 times for 7. Least in bfloat16 at r = 64, where products are what counts, of which both do as many.
#include "parallel.h"
#include "products.h"
#include "rows.h"

namespace minireft::cpu {
namespace {

template <class T, class W>
void forward(const Edit& e, const EditForward& f) {
  using F = wide<T>;
  using M = multiplier<W>;
  const int64_t C = e.C, r = e.r, N = e.B * e.P, n_units = units<M>(r);
  if (f.delta && (e.positions.data || e.tasks.data)) std::fill_n((F*)f.delta, N * r, F(0));
  constexpr int64_t PIECES = 64, TILE = 16, width = VECTORS * lanes<T>;
  const bool past = f.out.data != f.h.data && streams<T>(f.out, N, C);
  for (const Group& group : group_rows(e)) {
    const int64_t first = group.bank * r * C;
    const Weights<W> D(f.down, e.weight_dtype, r * C, first), A(f.up, e.weight_dtype, r * C, first);
    const Weights<F> bias(f.bias, e.weight_dtype, r, group.bank * r);
    const Dots<T, W> dots(D.data, C, r, group.count);
    const array<M> up = packed<M>(A.data, C, r);
    // Four rows at a time; more, which share one reading of D and A, where these do not fit in a core's cache or are not read as
    // they lie, or where rows are narrow.
    const bool narrow = C * sizeof(T) <= 1024;
    const int64_t tile = narrow || dots.in_lanes() || 2 * r * C * sizeof(W) > (512 << 10) ? TILE : ROWS;
    const int64_t step = tile == ROWS || narrow ? C : width;
    const int64_t piece_rows = (group.count / PIECES + TILE) / TILE * TILE;
    parallel((group.count + piece_rows - 1) / piece_rows, [&](int64_t piece) {
      array<F> delta(tile * r);
      array<M> space(tile * n_units);
      const int64_t end = std::min((piece + 1) * piece_rows, group.count);
      for (int64_t begin = piece * piece_rows; begin < end; begin += tile) {
        const T* x[TILE];
        T* out[TILE];
        const T* next[TILE];
        const int64_t rows = std::min(tile, end - begin);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t n = group[begin + i];
          x[i] = row<T>(e, f.h, n), out[i] = row<T>(e, f.out, n);
          next[i] = row<T>(e, f.h, group[std::min(begin + tile + i, group.count - 1)]);
          if (f.rows) std::memcpy((T*)f.rows + n * C, x[i], C * sizeof(T));
        }
        dots(x, rows, delta.data());
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t k = 0; k < r; ++k) delta[i * r + k] += bias.data[k];
          if (f.delta) std::copy_n(&delta[i * r], r, (F*)f.delta + group[begin + i] * r);
        }
        const M* factors = of_ranks<M>(delta.data(), rows, r, space);
        for (int64_t c = 0; c < C; c += step)
          in_groups<ROWS>(rows, [&](int64_t i, auto R) {
            add_products<T, M, R>(x + i, out + i, factors + i * n_units, up.data(), n_units, c, std::min(c + step, C), next + i,
                                  past);
          });
      }
      if (past) fence();
    });
  }
}

}  // namespace

const char* low_rank_edit(const Edit& e, const EditForward& f, void*) {
  with_types(e, [&](auto t, auto w) { forward<decltype(t), decltype(w)>(e, f); });
  return nullptr;
}

int64_t low_rank_edit_workspace(const Edit&) { return 0; }

}  // namespace minireft::cpu
