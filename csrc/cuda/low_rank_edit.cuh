// The edit itself, for every rank, width, dtype and alignment; tensor_cores.cuh has the same for half precision, r ≥ 16.
// low_rank_edit.cu says what is computed; sum_products.cuh, which includes this, has the other half of the backward pass.
// You should see one kernel, edit_rows: the forward pass, and half of the backward pass.
#pragma once
#include "common.cuh"

namespace minireft::MINIREFT_BACKEND {
namespace {

constexpr int RANKS = 8;          // ranks a thread sums at once
constexpr int MAX_RANK = 2048;    // δ of a block's rows fits in 48 KB of shared memory

struct Rows {
  Edit e;
  Stream x, out;
  const void *first, *second, *bias;  // P, Q (K, r, C), b (K, r) or null
  void* copy;                         // rows of x as read, (N, C), or null
  float* factors;                     // P x + b, (N, r), 0 where nothing is edited, or null
  int64_t* places;                    // (N,): bank << 32 | token, −1 where nothing is edited, or null
  int64_t begin, end;                 // the rows of this launch
  bool last;                          // `out` may leave L2 at once, which has to keep D and A, and the backward pass's g
};

// A tile is up to R rows that blocks edit at once: consecutive ones, and with tasks of one batch row, so that they take
// few banks, mostly one: 32 sequences × 14 positions, C 4096, r 64 and 4 banks in turn ask L2 for 82 MB, with a block for
// each row 980 MB (`minireft profile low_rank_edit_at --r 64 --tasks 4`). The number of row n's tile:
__host__ DEVICE uint32_t tile_of(const Edit& e, int R, uint32_t n) {
  const uint32_t run = e.tasks.data ? e.P : e.B * e.P, tiles = (run - 1) / R + 1;
  return n / run * tiles + n % run / R;
}

inline dim3 grid_of(const Rows& a, int R) {  // tiles × the banks that a tile's rows may take; one names none
  const bool mixed = a.e.tasks.data && a.e.tasks.stride_p != 0;
  return dim3(tile_of(a.e, R, a.end - 1) - tile_of(a.e, R, a.begin) + 1, mixed ? smaller(a.e.K + 1, R) : 1);
}

constexpr int64_t LEFT_ALONE = -1, ELSEWHERE = -2;  // tokens of rows that nobody edits, and that this block has not

struct Tile {
  int64_t n, bank;  // its first row; the bank of this block's rows (−1: their task names none), K if it has none
  int rows;
};

// Finds a block's tile, and the rows of it whose bank is the blockIdx.y-th among them: row n + i has its token or one of
// the above, and its batch row. Block 0 of a tile has those left alone, too. Eight lanes look at a row; the first warps
// do it (R ≤ 4: the first; R = 32: all eight). Synchronises.
template <int R>
DEVICE Tile locate(const Rows& a, int64_t* tokens, int64_t* batch, int64_t* banks) {
  const uint32_t run = a.e.tasks.data ? a.e.P : a.e.B * a.e.P, tiles = (run - 1) / R + 1;
  const uint32_t tile = tile_of(a.e, R, a.begin) + blockIdx.x, first = tile / tiles * run;
  const int64_t n0 = int64_t(first) + tile % tiles * R, stop = smaller(a.end, int64_t(first) + run);
  const int i = threadIdx.x / 8;
  if (i < (R + 3) / 4 * 4) {
    const int64_t n = n0 + i;
    const bool exists = i < R && n >= a.begin && n < stop;
    const int64_t b = exists ? uint32_t(n) / uint32_t(a.e.P) : 0, p = exists ? n - b * a.e.P : 0;
    int64_t token = exists ? p : ELSEWHERE, bank = 0;
    if (a.e.positions.data) {
      if (exists) token = at(a.e.positions, b, p);
      int again = 0;  // of equal positions the first counts
      for (int64_t q = threadIdx.x % 8; q < p; q += 8) again |= at(a.e.positions, b, q) == token;
      UNROLL for (int bit = 1; bit < 8; bit *= 2) again |= __shfl_xor_sync(ALL, again, bit);
      if (exists && (again || token < 0 || token >= a.e.T)) token = LEFT_ALONE;
    }
    if (a.e.tasks.data && exists) {
      bank = at(a.e.tasks, b, p);
      if (bank < 0) token = LEFT_ALONE;
      if (bank >= a.e.K) bank = -1;
    }
    if (i < R && threadIdx.x % 8 == 0) {
      store(tokens + i, token), store(batch + i, b), store(banks + i, bank);
      if (a.places && exists && blockIdx.y == 0)
        store(a.places + n, token >= 0 && bank >= 0 ? bank << 32 | token : int64_t(-1));
    }
  }
  __syncthreads();
  int64_t bank = a.e.tasks.data ? -2 : 0;
  for (int y = 0; a.e.tasks.data && y <= int(blockIdx.y); y++) {  // the next bank after `bank`
    int64_t next = a.e.K;
    for (int k = 0; k < R; k++)
      if (load(tokens + k) >= 0 && load(banks + k) > bank) next = smaller(next, load(banks + k));
    bank = next;
  }
  if (a.e.tasks.data) {
    __syncthreads();
    if (threadIdx.x < R && (load(tokens + threadIdx.x) < 0 ? blockIdx.y > 0 : load(banks + threadIdx.x) != bank))
      store(tokens + threadIdx.x, ELSEWHERE);
    __syncthreads();
  }
  return {n0, bank, int(smaller(stop - n0, R))};
}

template <class T>
DEVICE T* row_of(const Stream& s, int64_t b, int64_t token) {
  return s.data && token >= 0 ? static_cast<T*>(s.data) + b * s.batch_stride + token * s.token_stride : nullptr;
}

// A block edits R rows: sums P x over the columns, 8 ranks at a time; then adds Qᵀ of that to x, read a second time
// from L1. Threads are at most 256, one for each V columns.
template <class T, class W, int V, int R>
__global__ void __launch_bounds__(THREADS, 1) edit_rows(Rows a) {
  SHARED(float, partial, WARPS * R * RANKS);
  const int64_t C = a.e.C, stride = int64_t(blockDim.x) * V;
  const int r = a.e.r, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  SHARED_DYNAMIC(float, factors, R * a.e.r);
  SHARED(int64_t, tokens, R);
  SHARED(int64_t, batch, R);
  SHARED(int64_t, banks, R);
  const Tile here = locate<R>(a, tokens, batch, banks);
  if (here.bank == a.e.K && blockIdx.y > 0) return;
  const T* x[R];
  T* out[R];
  UNROLL for (int i = 0; i < R; i++) {
    x[i] = row_of<const T>(a.x, load(batch + i), load(tokens + i));
    out[i] = row_of<T>(a.out, load(batch + i), load(tokens + i));
  }
  const int64_t n = here.n, bank = here.bank < 0 || here.bank == a.e.K ? 0 : here.bank;
  const W* first = static_cast<const W*>(a.first) + bank * r * C;
  const W* second = static_cast<const W*>(a.second) + bank * r * C;

  for (int j0 = 0; j0 < r; j0 += RANKS) {
    float sum[R * RANKS] = {};
    for (int64_t c0 = 0; c0 < C; c0 += stride) {
      const int64_t c = c0 + threadIdx.x * V;
      Floats<V> row[R];
      UNROLL for (int i = 0; i < R; i++) {
        row[i] = all<V>(0);
        if (x[i] && c < C) {
          Pack<V, T> raw = load<V>(x[i] + c);
          if (a.copy && j0 == 0) store(static_cast<T*>(a.copy) + (n + i) * C + c, raw);
          row[i] = widen(raw);
        }
      }
      UNROLL for (int j = 0; j < RANKS; j++) {
        if (j0 + j >= r) break;
        Floats<V> p = load_parameters<V>(first + (j0 + j) * C, c, C);
        UNROLL for (int i = 0; i < R; i++) {
          float& s = sum[i * RANKS + j];
          UNROLL for (int v = 0; v < V; v++) s = multiply_add(row[i].at[v], p.at[v], s);
        }
      }
    }
    constexpr int N = R * RANKS;
    scatter_sum<N, 16, 1>(sum);
    if (lane % (32 / N) == 0) store(partial + warp * N + lane / (32 / N), sum[0]);
    __syncthreads();
    const int i = threadIdx.x / RANKS, j = j0 + threadIdx.x % RANKS;
    if (threadIdx.x < N && j < r) {
      float factor = 0;
      for (int w = 0; w < warps; w++) factor += load(partial + w * N + threadIdx.x);
      if (a.bias) factor += wide(load(static_cast<const W*>(a.bias) + bank * r + j));
      if (here.bank < 0) factor = NAN;
      if (load(tokens + i) < 0) factor = 0;
      store(factors + j * R + i, factor);  // ranks of the R rows side by side
      if (a.factors && load(tokens + i) != ELSEWHERE) store(a.factors + (n + i) * r + j, factor);
    }
    __syncthreads();
  }
  if (!a.out.data) return;

  for (int64_t c0 = 0; c0 < C; c0 += stride) {
    const int64_t c = c0 + threadIdx.x * V;
    Floats<V> row[R];
    UNROLL for (int i = 0; i < R; i++) row[i] = x[i] && c < C ? widen(load<V>(x[i] + c)) : all<V>(0);
    for (int j = 0; j < r; j++) {
      Floats<V> q = load_parameters<V>(second + j * C, c, C);
      const Floats<R> factor = widen(load<R>(factors + j * R));
      UNROLL for (int i = 0; i < R; i++)
        UNROLL for (int v = 0; v < V; v++) row[i].at[v] = multiply_add(factor.at[i], q.at[v], row[i].at[v]);
    }
    UNROLL for (int i = 0; i < R; i++)
      if (out[i] && c < C) a.last ? store_last(out[i] + c, narrow<T>(row[i])) : store(out[i] + c, narrow<T>(row[i]));
  }
}

}  // namespace
}  // namespace minireft::MINIREFT_BACKEND
