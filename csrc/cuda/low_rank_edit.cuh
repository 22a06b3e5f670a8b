// The scalar kernels of low_rank_edit.cu, for every rank, width, dtype and alignment: edits of rows, sums of products.
// Included by low_rank_edit.cu, which says what is computed; tensor_cores.cuh has the same for half precision, r ≥ 16.
// You should see two kernels: edit_rows, forward and half of the backward pass, and sum_products, the other half.
#pragma once
#include "common.cuh"

namespace minireft::MINIREFT_BACKEND {
namespace {

constexpr int RANKS = 8;          // ranks a thread sums at once
constexpr int MAX_RANK = 2048;    // δ of a block's rows fits in 48 KB of shared memory
constexpr int LANES = 8;          // lanes side by side along C in sum_products: 128 bytes of a row
constexpr int GROUPS = THREADS / LANES;  // groups of lanes on different rows
constexpr int CHUNK = 128;               // rows whose factors are staged at once

struct Rows {
  Edit e;
  Stream x, out;
  const void *first, *second, *bias;  // P, Q (K, r, C), b (K, r) or null
  void* copy;                         // rows of x as read, (N, C), or null
  float* factors;                     // P x + b, (N, r), 0 where nothing is edited, or null
  int64_t* places;                    // (N,): bank << 32 | token, −1 where nothing is edited, or null
  int64_t begin, end;                 // the rows of this launch
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
      if (out[i] && c < C) store(out[i] + c, narrow<T>(row[i]));
  }
}

struct Products {
  Edit e;
  const float *u, *delta;  // (N, r) each
  const int64_t* places;   // (N,)
  Stream h, g;
  bool vectors;            // u and delta may be read 16 bytes at a time
  bool h_by_position;      // h is the saved rows: row (b, p), not (b, token)
  void* out[3];            // dD, dA, db: (K, r, C), (K, r, C), (K, r)
  float* before[3];        // the same of the rows before `begin`, or null
  int64_t begin, end, split_stride;  // split i writes (and adds to) what lies i · split_stride elements further on
};

DEVICE int64_t share_of(const Products& a, int64_t split) {  // where a split's rows begin
  return smaller(a.begin + split * ((a.end - a.begin + gridDim.y - 1) / gridDim.y), a.end);
}

// Brings to shared memory where the x of CHUNK rows from n0 lies (−1: not edited, or not this bank's, or beyond the end),
// and RANKS_HERE of these rows' factors s, STRIDE apart, E in one access; of many banks, only those of this one.
template <int RANKS_HERE, int STRIDE, int E>
DEVICE void stage(const Products& a, int job, int64_t bank, int j0, int64_t n0, int64_t end, const Stream& x,
                  float* factors, int64_t* offsets) {
  const float* s = job == 1 ? a.delta : a.u;
  if (threadIdx.x < CHUNK) {
    const int64_t n = n0 + threadIdx.x, place = n < end ? load(a.places + n) : -1, b = uint32_t(n) / uint32_t(a.e.P);
    const int64_t t = job == 0 && a.h_by_position ? n - b * a.e.P : place & 0xFFFFFFFF;
    const bool mine = place >= 0 && place >> 32 == bank;
    store(offsets + threadIdx.x, mine ? b * x.batch_stride + t * x.token_stride : int64_t(-1));
  }
  if (a.e.K > 1) __syncthreads();
  for (int i = threadIdx.x; i < CHUNK * RANKS_HERE / E; i += THREADS) {
    const int row = i / (RANKS_HERE / E), j = i % (RANKS_HERE / E) * E;
    const bool wanted = a.e.K > 1 ? load(offsets + row) >= 0 : n0 + row < end;
    store(factors + row * STRIDE + j, wanted && j0 + j < a.e.r ? load<E>(s + (n0 + row) * a.e.r + j0 + j) : Pack<E, float>{});
  }
}

// E columns of a sum, from `to` on: added to what earlier rows gave, and written as partial sum or gradient.
template <class O, int E>
DEVICE void write_sum(const Products& a, int job, int64_t bank, int rank, int64_t C, int64_t to, Floats<E> total) {
  const int64_t element = blockIdx.y * a.split_stride + (bank * a.e.r + rank) * C + to;
  O* out = static_cast<O*>(a.out[job]) + element;
  if (job == 2) {  // one column
    store(out, narrow<O>(total.at[0] + (a.before[2] ? load(a.before[2] + element) : 0)));
  } else {
    const Floats<E> before = a.before[job] ? widen(load<E>(a.before[job] + element)) : all<E>(0);
    UNROLL for (int e = 0; e < E; e++) total.at[e] += before.at[e];
    store(out, narrow<O>(total));
  }
}

// Σ s xᵀ over rows, into dD (job 0: s = u, x = h), dA (job 1: s = δ, x = g) or db (job 2: s = u, x = 1).
// A block owns 8 ranks × 8 V columns of one job of one bank, and one share of the rows (split); it writes float sums to
// be added by sum_partials, or the gradient itself. 32 groups of 8 lanes take different rows; their sums are added in
// order.
template <class T, class O, int V>
__global__ void __launch_bounds__(THREADS) sum_products(Products a) {
  constexpr int E = V < 4 ? V : 4, H = V / E,
                JG = RANKS / 4;  // numbers in a shared access; accesses and ranks of a lane
  SHARED(float, sums, WARPS * RANKS * LANES * V);
  SHARED(float, factors, CHUNK * RANKS);
  SHARED(int64_t, offsets, CHUNK);
  const int job = 2 - blockIdx.z % 3, bank = blockIdx.z / 3, r = a.e.r;  // g before h: most of it is in L2 yet
  const int64_t C = job == 2 ? 1 : a.e.C, tile = LANES * V;
  const int rank_tiles = (r + RANKS - 1) / RANKS, j0 = blockIdx.x % rank_tiles * RANKS;
  const int64_t column = blockIdx.x / rank_tiles * tile;
  if (column >= C) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const int64_t c = column + q * V;
  const Stream& x = job == 1 ? a.g : a.h;
  const int64_t begin = share_of(a, blockIdx.y), end = share_of(a, blockIdx.y + 1);

  float sum[RANKS * V] = {};
  for (int64_t n0 = begin; n0 < end; n0 += CHUNK) {
    __syncthreads();
    if (a.vectors && r % 4 == 0)
      stage<RANKS, RANKS, 4>(a, job, bank, j0, n0, end, x, factors, offsets);
    else
      stage<RANKS, RANKS, 1>(a, job, bank, j0, n0, end, x, factors, offsets);
    __syncthreads();
    UNROLL_BY(4) for (int m = group; m < CHUNK; m += GROUPS) {
      const int64_t offset = load(offsets + m);
      if (offset < 0 || c >= C) continue;
      Floats<V> row = all<V>(1);
      if (job < 2) row = widen(load<V>(static_cast<const T*>(x.data) + offset + c));
      UNROLL for (int k = 0; k < RANKS; k += 4) {
        Floats<4> factor = widen(load<4>(factors + m * RANKS + k));
        UNROLL for (int i = 0; i < 4 * V; i++)
          sum[k * V + i] = multiply_add(factor.at[i / V], row.at[i % V], sum[k * V + i]);
      }
    }
  }

  scatter_sum<RANKS * V, 16, 8>(sum);  // over the warp's four groups: group i is left with ranks i · JG …
  UNROLL for (int i = 0; i < JG * V; i += E) {
    Pack<E, float> some;
    UNROLL for (int k = 0; k < E; k++) some.at[k] = sum[i + k];
    store(sums + ((warp * JG * H + i / E) * 32 + lane) * E, some);
  }
  __syncthreads();
  // Of the 8 warps' sums a thread adds E columns: chosen so that a warp writes whole sectors and reads without
  // conflicts.
  const int column_part = threadIdx.x / LANES % H, j = threadIdx.x / (LANES * H);
  const int64_t to = column + q * V + column_part * E;
  if (j >= RANKS || j0 + j >= r || to >= C) return;
  Floats<E> total = all<E>(0);
  for (int w = 0; w < WARPS; w++) {
    const int slot = (w * JG * H + j % JG * H + column_part) * 32 + j / JG * LANES + q;
    Floats<E> some = widen(load<E>(sums + slot * E));
    UNROLL for (int e = 0; e < E; e++) total.at[e] += some.at[e];
  }
  write_sum<O, E>(a, job, bank, j0 + j, C, to, total);
}

}  // namespace
}  // namespace minireft::MINIREFT_BACKEND
