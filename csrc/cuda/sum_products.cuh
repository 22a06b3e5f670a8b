// The gradients of D and A, sums of products over rows, for every rank, width, dtype and alignment: sum_products.
// low_rank_edit.cu says what is computed; tensor_cores.cuh, which includes this, has the same for half precision, r ≥ 16.
// You should see columns shared out to blocks and rows to groups of lanes, and their sums added in a fixed order.
#pragma once
#include "low_rank_edit.cuh"

namespace minireft::MINIREFT_BACKEND {
namespace {

constexpr int LANES = 8;                 // lanes side by side along C: 128 bytes of a row
constexpr int GROUPS = THREADS / LANES;  // groups of lanes on different rows
constexpr int CHUNK = 128;               // rows whose factors are staged at once

struct Products {
  Edit e;
  const float *u, *delta;  // (N, r) each
  const int64_t* places;   // (N,)
  Stream h, g;
  bool vectors;            // delta may be read 16 bytes at a time
  bool h_by_position;      // h is the saved rows: row (b, p), not (b, token)
  void* out[3];            // dD, dA, db: (K, r, C), (K, r, C), (K, r)
  float* before[3];        // the same of the rows before `begin`, or null
  bool direct;             // what is written are the gradients, which this pass does not read again
  int64_t begin, end, split_stride;  // split i writes (and adds to) what lies i · split_stride elements further on
};

DEVICE int64_t share_of(const Products& a, int64_t split) {  // where a split's rows begin: an even number from `begin`
  return smaller(a.begin + split * ((a.end - a.begin + 2 * gridDim.y - 1) / (2 * gridDim.y) * 2), a.end);
}

// Brings to shared memory where the x of CHUNK rows from n0 lies (−1: not edited, or not this bank's, or beyond the end),
// and RANKS_HERE of these rows' factors s, rows STRIDE apart; of many banks, only those of this one.
// A row's r floats begin anywhere in a sector. So its L lanes read the whole sectors in which these ranks lie, 16 bytes
// each and the first two lanes 16 more, pass on what their neighbours need, and shift.
template <int RANKS_HERE, int STRIDE>
DEVICE void stage(const Products& a, int job, int64_t bank, int j0, int64_t n0, int64_t end, const Stream& x,
                  float* factors, int64_t* offsets) {
  if (threadIdx.x < CHUNK / 2) {
    const int64_t n1 = n0 + 2 * threadIdx.x;
    Pack<2, int64_t> two{};
    if (n1 + 1 < end) two = load<2>(a.places + n1);
    else if (n1 < end) two.at[0] = load(a.places + n1);
    UNROLL for (int e = 0; e < 2; e++) {
      const int64_t n = n1 + e, place = two.at[e], b = uint32_t(n) / uint32_t(a.e.P);
      const int64_t t = job == 0 && a.h_by_position ? n - b * a.e.P : place & 0xFFFFFFFF;
      const bool mine = n < end && place >= 0 && place >> 32 == bank;
      two.at[e] = mine ? b * x.batch_stride + t * x.token_stride : int64_t(-1);
    }
    store(offsets + 2 * threadIdx.x, two);
  }
  if (a.e.K > 1) __syncthreads();
  constexpr int L = RANKS_HERE / 4;
  const float* s = job == 1 ? a.delta : a.u;
  const int64_t r = a.e.r, floats = a.end * r;
  const int l = threadIdx.x % L, count = smaller(RANKS_HERE, r - j0);
  for (int i = 0; i < CHUNK; i += THREADS / L) {
    const int row = i + threadIdx.x / L;
    const bool wanted = a.e.K > 1 ? load(offsets + row) >= 0 : n0 + row < end;
    const int64_t first = (n0 + row) * r + j0;
    const int shift = first % 8;
    Floats<4> part[2] = {};  // of the sectors' L + 2 parts this lane reads l and, if l < 2, L + l
    UNROLL for (int k = 0; k < 2; k++) {
      const int p = k * L + l;
      const int64_t from = first - shift + 4 * p;
      if (!wanted || p >= L + 2 || p / 2 * 8 >= shift + count) continue;
      if (a.vectors && from + 4 <= floats) part[k] = widen(load<4>(s + from));
      else UNROLL for (int e = 0; e < 4; e++) part[k].at[e] = from + e < floats ? load(s + from + e) : 0;
    }
    float v[12];  // parts l, l + 1 and l + 2
    UNROLL for (int e = 0; e < 4; e++) {
      v[e] = part[0].at[e];
      v[4 + e] = __shfl_sync(ALL, l < 1 ? part[1].at[e] : part[0].at[e], threadIdx.x - l + (l + 1) % L);
      v[8 + e] = __shfl_sync(ALL, l < 2 ? part[1].at[e] : part[0].at[e], threadIdx.x - l + (l + 2) % L);
    }
    UNROLL for (int bit = 2; bit >= 0; bit--)
      UNROLL for (int e = 0; e < 8; e++) v[e] = shift >> bit & 1 ? v[e + (1 << bit)] : v[e];
    store(factors + row * STRIDE + 4 * l, Pack<4, float>{{v[0], v[1], v[2], v[3]}});
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
    a.direct ? store_last(out, narrow<O>(total)) : store(out, narrow<O>(total));
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
  const bool last = j0 + RANKS >= r;  // of the blocks that read these columns
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const int64_t c = column + q * V;
  const Stream& x = job == 1 ? a.g : a.h;
  const int64_t begin = share_of(a, blockIdx.y), end = share_of(a, blockIdx.y + 1);

  float sum[RANKS * V] = {};
  for (int64_t n0 = begin; n0 < end; n0 += CHUNK) {
    __syncthreads();
    stage<RANKS, RANKS>(a, job, bank, j0, n0, end, x, factors, offsets);
    __syncthreads();
    UNROLL_BY(4) for (int m = group; m < CHUNK; m += GROUPS) {
      const int64_t offset = load(offsets + m);
      if (offset < 0 || c >= C) continue;
      Floats<V> row = all<V>(1);
      const T* at = static_cast<const T*>(x.data) + offset + c;
      if (job < 2) row = widen(last ? load_last<V>(at) : load<V>(at));
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
