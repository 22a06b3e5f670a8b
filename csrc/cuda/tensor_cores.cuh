// The tensor-core kernels of low_rank_edit.cu: half precision and r ≥ 16, the same results within rounding.
// Included by low_rank_edit.cu; fragment layouts as cited in csrc/emulator/cuda_on_cpu.h. Emulator only, on no GPU yet.
// You should see mma.sync.aligned.m16n8k16 as the only arithmetic on rows.
//
// A product of matrices does not care in which order k runs, nor which column of the result is called n: both are
// chosen so that each lane loads 16 contiguous bytes and the accumulators of one product are the operand of the next,
// with no transpose through shared memory. Numbers in float (δ, u, and D and A when they are float) enter as two
// halves, high + low, whose products are added: the result is as good as with float operands, to about 2⁻¹⁶. In float16
// a δ or u beyond 65,504 has no halves and makes its row infinite or NaN, as it does in plain PyTorch's two products.
#pragma once
#include <cstring>
#include <type_traits>

#include "sum_products.cuh"

namespace minireft::MINIREFT_BACKEND {
namespace {

constexpr int MMA_ROWS = 32;    // rows of x that a block edits: two tiles of 16
constexpr int MMA_RANKS = 64;   // ranks it sums at once: eight tiles of 8
constexpr int MMA_MAX = 256;    // ranks at most, so that δ of a block's rows fits in 36 KB of shared memory
constexpr int MMA_STRIDE = 72;  // between rows of δ there: ranks 2t, 2t + 1 of rows g then fall in different banks
constexpr int MMA_TILE = MMA_ROWS * MMA_STRIDE;  // floats of δ for these rows and ranks
constexpr int SUM_RANKS = 32;   // ranks of a block of sum_products_mma: two tiles of 16
constexpr int SUM_STRIDE = 36;  // between rows of staged factors: rows 2t and ranks g then fall in different banks

// c (16, 8) += a (16, 16) b (16, 8), one warp.
template <class T>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] SITE) {
#if defined(MINIREFT_EMULATOR)
  emulator::mma<T>(c, a, b, wide AT);
#elif __CUDA_ARCH__ >= 800  // the launcher does not come here on older ones
  if constexpr (std::is_same<T, bf16>::value)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <class T>
DEVICE uint32_t pair(T low, T high) {
  const Pack<2, T> both{{low, high}};
  uint32_t word;
  memcpy(&word, &both, 4);
  return word;
}

// Two words of operands for two numbers in float: their halves, and what the halves left over.
struct Split {
  uint32_t high, low;
};

template <class T>
DEVICE Split split(float x, float y) {
  const T a = narrow<T>(x), b = narrow<T>(y);
  return {pair(a, b), pair(narrow<T>(x - wide(a)), narrow<T>(y - wide(b)))};
}

// Adds each warp's accumulators in order, in shared memory: elements e … e + E − 1 of unit u lie at place(u, e).
template <int E, int UNITS, class Place>
DEVICE void add_warps(const float (&mine)[UNITS][4], Place place) {
  for (int w = 0; w < WARPS; w++) {
    UNROLL for (int u = 0; u < UNITS && int(threadIdx.x / 32) == w; u++)
      UNROLL for (int e = 0; e < 4; e += E) {
        Pack<E, float> sum = w > 0 ? load<E>(place(u, e)) : Pack<E, float>{};
        UNROLL for (int k = 0; k < E; k++) sum.at[k] += mine[u][e + k];
        store(place(u, e), sum);
      }
    __syncthreads();
  }
}

// edit_rows for 32 rows: δ (32, r) = x Pᵀ by the warps on different columns, then x + δ Q by the warps on different
// columns. With g = lane / 4 and t = lane % 4 a lane holds rows g, g + 8, g + 16 and g + 24. Of a tile of at most 16
// rows, such as a batch row's 14, the upper half is left out.
template <class T, class W>
__global__ void __launch_bounds__(THREADS, 1) edit_rows_mma(Rows a) {
  constexpr bool exact = std::is_same<T, W>::value;  // P and Q are halves already
  SHARED(int64_t, tokens, MMA_ROWS);
  SHARED(int64_t, batch, MMA_ROWS);
  SHARED(int64_t, banks, MMA_ROWS);
  SHARED_DYNAMIC(float, factors, (a.e.r + MMA_RANKS - 1) / MMA_RANKS * MMA_TILE);  // (32, 64) for each 64 ranks
  const Tile here = locate<MMA_ROWS>(a, tokens, batch, banks);
  if (here.bank == a.e.K && blockIdx.y > 0) return;
  const int64_t C = a.e.C, n = here.n, bank = here.bank < 0 || here.bank == a.e.K ? 0 : here.bank;
  const int r = a.e.r, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int halves = here.rows > 16 ? 2 : 1;
  const W* first = static_cast<const W*>(a.first) + bank * r * C;
  const W* second = static_cast<const W*>(a.second) + bank * r * C;
  const W* bias = a.bias ? static_cast<const W*>(a.bias) + bank * r : nullptr;
  const T* x[4];
  UNROLL for (int i = 0; i < 4; i++) x[i] = row_of<const T>(a.x, load(batch + 8 * i + g), load(tokens + 8 * i + g));

  for (int j0 = 0; j0 < r; j0 += MMA_RANKS) {
    float sum[16][4] = {};  // tile (m, j) at m · 8 + j: rows 16 m …, ranks j0 + 8 j …
    for (int64_t c0 = warp * 32; c0 < C; c0 += WARPS * 32) {
      const int64_t c = c0 + 8 * t;  // of a lane's 8 columns, four are the k of one step and four of the next
      Pack<4, uint32_t> row[4];
      UNROLL for (int i = 0; i < 4; i++) {
        row[i] = {};
        if (!x[i] || c >= C) continue;
        const Pack<8, T> raw = load<8>(x[i] + c);
        if (a.copy && j0 == 0) store(static_cast<T*>(a.copy) + (n + 8 * i + g) * C + c, raw);
        memcpy(&row[i], &raw, 16);
      }
      UNROLL for (int j = 0; j < 8; j++) {
        if (j0 + 8 * j >= r) break;
        const int rank = j0 + 8 * j + g;
        const Floats<8> p = load_parameters<8>(first + rank * C, c, rank < r ? C : 0);
        UNROLL for (int step = 0; step < 2; step++) {
          const Split b0 = split<T>(p.at[4 * step], p.at[4 * step + 1]),
                      b1 = split<T>(p.at[4 * step + 2], p.at[4 * step + 3]);
          UNROLL for (int m = 0; m < 2; m++) {
            if (m == halves) break;
            const uint32_t k[4] = {row[2 * m].at[2 * step], row[2 * m + 1].at[2 * step], row[2 * m].at[2 * step + 1],
                                   row[2 * m + 1].at[2 * step + 1]};
            mma<T>(sum[m * 8 + j], k, {b0.high, b1.high});
            if (!exact) mma<T>(sum[m * 8 + j], k, {b0.low, b1.low});
          }
        }
      }
    }
    float* tile = factors + j0 / MMA_RANKS * MMA_TILE;
    add_warps<2>(sum, [&](int u, int e) { return tile + (u / 8 * 16 + e / 2 * 8 + g) * MMA_STRIDE + u % 8 * 8 + 2 * t; });
    const int rank = j0 + threadIdx.x % MMA_RANKS;
    const float b = bias && rank < r ? wide(load(bias + rank)) : 0;
    for (int row = threadIdx.x / MMA_RANKS; row < MMA_ROWS; row += THREADS / MMA_RANKS) {  // 0 where nothing is edited
      const int64_t token = load(tokens + row);
      float* at = tile + row * MMA_STRIDE + threadIdx.x % MMA_RANKS;
      float factor = here.bank < 0 ? NAN : load(at) + b;
      if (token < 0) factor = 0;
      store(at, factor);
      if (a.factors && rank < r && token != ELSEWHERE) store(a.factors + (n + row) * r + rank, factor);
    }
    __syncthreads();
  }
  if (!a.out.data) return;

  T* out[4];
  UNROLL for (int i = 0; i < 4; i++) out[i] = row_of<T>(a.out, load(batch + 8 * i + g), load(tokens + 8 * i + g));
  // Column n of tile j is c0 + 8 β(n) + j, β(n) = n / 2 + 4 (n % 2): a lane loads 8 columns of Q for as many tiles, and
  // of the result, whose columns it holds are n = 2t and 2t + 1, has 8 contiguous columns twice.
  for (int64_t c0 = warp * 64; c0 < C; c0 += WARPS * 64) {
    // Tile (m, j) at m · 8 + j; its element 2 · half + k: row 16 m + 8 half + g, column c0 + 32 k + 8 t + j.
    float sum[16][4];
    UNROLL for (int i = 0; i < 4; i++)
      UNROLL for (int k = 0; k < 2; k++) {
        const int64_t c = c0 + 32 * k + 8 * t;
        const Floats<8> eight = x[i] && c < C ? widen(load<8>(x[i] + c)) : all<8>(0);
        UNROLL for (int j = 0; j < 8; j++) sum[i / 2 * 8 + j][i % 2 * 2 + k] = eight.at[j];
      }
    for (int k0 = 0; k0 < r; k0 += 16) {
      const float* tile = factors + k0 / MMA_RANKS * MMA_TILE + k0 % MMA_RANKS;
      uint32_t high[2][4], low[2][4];  // δ, whose accumulators are this operand's layout
      UNROLL for (int m = 0; m < 2; m++)
        UNROLL for (int i = 0; i < 2; i++) {
          const float* at = tile + (16 * m + g) * MMA_STRIDE + 8 * i + 2 * t;
          const Pack<2, float> u = load<2>(at), v = load<2>(at + 8 * MMA_STRIDE);
          const Split upper = split<T>(u.at[0], u.at[1]), lower = split<T>(v.at[0], v.at[1]);
          high[m][2 * i] = upper.high, high[m][2 * i + 1] = lower.high;
          low[m][2 * i] = upper.low, low[m][2 * i + 1] = lower.low;
        }
      Floats<8> q[4];
      UNROLL for (int i = 0; i < 4; i++) {
        const int rank = k0 + 2 * t + i % 2 + i / 2 * 8;
        q[i] = load_parameters<8, 8>(second + rank * C, c0 + 8 * (g / 2 + g % 2 * 4), rank < r ? C : 0);
      }
      UNROLL for (int j = 0; j < 8; j++) {
        const Split b0 = split<T>(q[0].at[j], q[1].at[j]), b1 = split<T>(q[2].at[j], q[3].at[j]);
        UNROLL for (int m = 0; m < 2; m++) {
          if (m == halves) break;
          mma<T>(sum[m * 8 + j], high[m], {b0.high, b1.high});
          mma<T>(sum[m * 8 + j], low[m], {b0.high, b1.high});
          if (!exact) mma<T>(sum[m * 8 + j], high[m], {b0.low, b1.low});
        }
      }
    }
    UNROLL for (int i = 0; i < 4; i++)
      UNROLL for (int k = 0; k < 2; k++) {
        const int64_t c = c0 + 32 * k + 8 * t;
        Floats<8> eight;
        UNROLL for (int j = 0; j < 8; j++) eight.at[j] = sum[i / 2 * 8 + j][i % 2 * 2 + k];
        if (out[i] && c < C) a.last ? store_last(out[i] + c, narrow<T>(eight)) : store(out[i] + c, narrow<T>(eight));
      }
  }
}

// sum_products for 32 ranks × 64 columns a block, the warps on different rows, 16 at a time; 16 that are all another
// bank's, or not edited, are left out.
template <class T, class O>
__global__ void __launch_bounds__(THREADS, 1) sum_products_mma(Products a) {
  SHARED(float, sums, 16 * 32 * 4);
  SHARED(float, factors, CHUNK* SUM_STRIDE);
  SHARED(int64_t, offsets, CHUNK);
  const int job = 2 - blockIdx.z % 3, bank = blockIdx.z / 3, r = a.e.r, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rank_tiles = (r + SUM_RANKS - 1) / SUM_RANKS, j0 = blockIdx.x % rank_tiles * SUM_RANKS;
  const int64_t C = job == 2 ? 1 : a.e.C, column = blockIdx.x / rank_tiles * 64, c = column + 8 * (g / 2 + g % 2 * 4);
  if (column >= C) return;
  const bool last = j0 + SUM_RANKS >= r;  // of the blocks that read these columns
  const Stream& x = job == 1 ? a.g : a.h;
  const int64_t begin = share_of(a, blockIdx.y), end = share_of(a, blockIdx.y + 1);

  float sum[16][4] = {};  // tile (m, j) in parts: ranks j0 + 16 m …; see `order` below
  for (int64_t n0 = begin; n0 < end; n0 += CHUNK) {
    __syncthreads();
    stage<SUM_RANKS, SUM_STRIDE>(a, job, bank, j0, n0, end, x, factors, offsets);
    __syncthreads();
    const int k0 = threadIdx.x / 32 * 16;
    if (n0 + k0 >= end) continue;
    int64_t offset[4];
    int some = 0;
    UNROLL for (int i = 0; i < 4; i++) {
      offset[i] = load(offsets + k0 + 2 * t + i % 2 + i / 2 * 8);
      some |= offset[i] >= 0;
    }
    UNROLL for (int bit = 1; bit < 4; bit *= 2) some |= __shfl_xor_sync(ALL, some, bit);
    if (!some) continue;
    Pack<8, T> row[4];
    UNROLL for (int i = 0; i < 4; i++) {
      row[i] = narrow<T>(all<8>(offset[i] >= 0 && job == 2 ? 1 : 0));
      const T* at = static_cast<const T*>(x.data) + offset[i] + c;
      if (offset[i] >= 0 && job < 2 && c < C) row[i] = last ? load_last<8>(at) : load<8>(at);
    }
    UNROLL for (int m = 0; m < 2; m++) {
      uint32_t high[4], low[4];  // element i: ranks g + 8 (i % 2), rows 2t and 2t + 1, + 8 (i / 2)
      UNROLL for (int i = 0; i < 4; i++) {
        const float* at = factors + (k0 + 2 * t + i / 2 * 8) * SUM_STRIDE + m * 16 + g + i % 2 * 8;
        const Split both = split<T>(load(at), load(at + SUM_STRIDE));
        high[i] = both.high, low[i] = both.low;
      }
      UNROLL for (int j = 0; j < 8; j++) {
        const uint32_t b[2] = {pair(row[0].at[j], row[1].at[j]), pair(row[2].at[j], row[3].at[j])};
        mma<T>(sum[m * 8 + j], high, b);
        mma<T>(sum[m * 8 + j], low, b);
      }
    }
  }

  float order[16][4];  // unit (m, e, h): element e of tiles 4h … 4h + 3, that is four contiguous columns of a rank
  UNROLL for (int u = 0; u < 16; u++)
    UNROLL for (int k = 0; k < 4; k++) order[u][k] = sum[u / 8 * 8 + u % 2 * 4 + k][u / 2 % 4];
  __syncthreads();
  add_warps<4>(order, [&](int u, int) { return sums + (u * 32 + lane) * 4; });
  // A warp takes eight ranks' 128 bytes: whole sectors, no conflicts.
  for (int i = threadIdx.x; i < 16 * 32; i += THREADS) {
    const int h = i / 8 % 2, me = i / 64, holder = i / 16 % 4 * 8 + i % 8, e = me % 4;
    const int rank = j0 + me / 4 * 16 + holder / 4 + e / 2 * 8;
    const int64_t to = column + 8 * (holder % 4 + e % 2 * 4) + 4 * h;
    if (rank < r && to < C)
      write_sum<O, 4>(a, job, bank, rank, C, to, widen(load<4>(sums + ((me * 2 + h) * 32 + holder) * 4)));
  }
}

}  // namespace
}  // namespace minireft::MINIREFT_BACKEND
