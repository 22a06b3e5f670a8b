// v5: a thread keeps its columns of the four rows in registers between the two phases, so h is read once.
// Cost removed: the second reading of h: the least that is possible is left, one reading and one writing, and D and A from L2.
// Predicted: sectors of h as least. The price: registers, 4 rows × 4 floats × C / 1024 a thread, so C has an end (here 4,096).
#include "ladder.h"

namespace minireft::MINIREFT_BACKEND {
namespace {

constexpr int RANKS = 8, ROWS = 4;

// K accesses of V floats cover a thread's share of a row.
template <int V, int K>
__global__ void edit(Problem p) {
  SHARED(float, partial, WARPS * ROWS * RANKS);
  SHARED(float, delta, ROWS * RANKS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = int64_t(blockIdx.x) * ROWS, rows = smaller(ROWS, p.N - n);
  Floats<V> h[K][ROWS], x[K][ROWS];  // as read, and edited so far
  UNROLL for (int k = 0; k < K; k++)
    UNROLL for (int i = 0; i < ROWS; i++) {
      const int64_t c = (k * THREADS + threadIdx.x) * V;
      x[k][i] = h[k][i] = i < rows && c < p.C ? widen(load<V>(p.h + (n + i) * p.C + c)) : all<V>(0);
    }
  for (int j0 = 0; j0 < p.r; j0 += RANKS) {
    const int ranks = smaller(RANKS, p.r - j0);
    float sum[ROWS * RANKS] = {};
    UNROLL for (int k = 0; k < K; k++) {
      const int64_t c = (k * THREADS + threadIdx.x) * V;
      UNROLL for (int j = 0; j < RANKS; j++) {
        if (j >= ranks || c >= p.C) break;
        const Floats<V> d = widen(load<V>(p.down + (j0 + j) * p.C + c));
        UNROLL for (int i = 0; i < ROWS; i++)
          UNROLL for (int v = 0; v < V; v++) sum[i * RANKS + j] = multiply_add(h[k][i].at[v], d.at[v], sum[i * RANKS + j]);
      }
    }
    UNROLL for (int s = 0; s < ROWS * RANKS; s++) {
      const float total = over_warp(sum[s]);
      if (lane == 0) store(partial + warp * ROWS * RANKS + s, total);
    }
    __syncthreads();  // all shares are there, and all have done with the δ before
    if (threadIdx.x < ROWS * RANKS) {
      const int j = j0 + threadIdx.x % RANKS;
      float total = j < p.r ? load(p.bias + j) : 0;
      for (int w = 0; w < WARPS; w++) total += load(partial + w * ROWS * RANKS + threadIdx.x);
      store(delta + threadIdx.x, total);
    }
    __syncthreads();  // δ is there, and nobody reads the shares any more
    UNROLL for (int k = 0; k < K; k++) {
      const int64_t c = (k * THREADS + threadIdx.x) * V;
      UNROLL for (int j = 0; j < RANKS; j++) {
        if (j >= ranks || c >= p.C) break;
        const Floats<V> a = widen(load<V>(p.up + (j0 + j) * p.C + c));
        UNROLL for (int i = 0; i < ROWS; i++) {
          const float d = load(delta + i * RANKS + j);
          UNROLL for (int v = 0; v < V; v++) x[k][i].at[v] = multiply_add(d, a.at[v], x[k][i].at[v]);
        }
      }
    }
  }
  UNROLL for (int k = 0; k < K; k++)
    UNROLL for (int i = 0; i < ROWS; i++) {
      const int64_t c = (k * THREADS + threadIdx.x) * V;
      if (i < rows && c < p.C) store(p.out + (n + i) * p.C + c, narrow<float>(x[k][i]));
    }
}

}  // namespace

const char* run(const Problem& p, void* stream) {
  const dim3 grid(ceil_div(p.N, ROWS));
  if (by_fours(p) && p.C <= 1 * 1024) return LAUNCH((edit<4, 1>), grid, THREADS, 0, stream, p);
  if (by_fours(p) && p.C <= 4 * 1024) return LAUNCH((edit<4, 4>), grid, THREADS, 0, stream, p);
  if (p.C <= 8 * 256) return LAUNCH((edit<1, 8>), grid, THREADS, 0, stream, p);
  return "v5 keeps its rows in registers: C up to 4,096, or 2,048 where it is no multiple of 4";
}

}  // namespace minireft::MINIREFT_BACKEND
