// out = h + Aᵀ(D h + b) on rows of h, at chosen positions or on all, and its gradients; see csrc/launchers.h for the rules.
// Compile with nvcc for a GPU, or with g++ -x c++ -DMINIREFT_EMULATOR. It has run in the emulator only, on no GPU yet.
// You should see each row read once and written once; of the rest, D and A live in L2. N rows, C width, r rank, K banks.
//
// Forward and backward share a kernel: out = x + Qᵀ(P x + b) is the edit with P = D, Q = A, and the gradient of h,
// dh = g + Dᵀ(A g), with P = A, Q = D, b = 0. The gradients of D and A are both sums of products over rows, Σ s xᵀ:
// dD = Σ u hᵀ, dA = Σ δ gᵀ, with u = A g; and db = Σ u is one with x = 1.
#include "common.cuh"

namespace minireft::MINIREFT_BACKEND {
namespace {

constexpr int RANKS = 8;          // ranks a thread sums at once
constexpr int MAX_RANK = 2048;    // δ of a block's rows fits in 48 KB of shared memory
constexpr int LANES = 8;          // lanes side by side along C in sum_products: 128 bytes of a row
constexpr int GROUPS = THREADS / LANES, CHUNK = 128;  // groups of lanes on different rows; rows whose factors are staged

struct Rows {
  Edit e;
  Stream x, out;
  const void *first, *second, *bias;  // P, Q (K, r, C), b (K, r) or null
  void* copy;                         // rows of x as read, (N, C), or null
  float* factors;                     // P x + b, (N, r), 0 where nothing is edited, or null
  int64_t* places;                    // (N,): bank << 32 | token, −1 where nothing is edited, or null
  int64_t begin, end;                 // the rows of this launch
};

// Where row n = (b, p) lies: its token or −1, and its bank or −1 if the task names none. The whole block calls.
struct Place {
  int64_t b, token, bank;
};

__device__ Place find(const Edit& e, int64_t n) {
  const int64_t b = uint32_t(n) / uint32_t(e.P), p = n - b * e.P;
  Place place{b, p, 0};
  if (e.positions.data) {
    place.token = at(e.positions, b, p);
    bool again = false;  // of equal positions the first counts
    for (int64_t q = threadIdx.x; q < p; q += blockDim.x) again |= at(e.positions, b, q) == place.token;
    if (__syncthreads_or(again) || place.token < 0 || place.token >= e.T) place.token = -1;
  }
  if (e.tasks.data) {
    place.bank = at(e.tasks, b, p);
    if (place.bank < 0) place.token = -1;
    if (place.bank >= e.K) place.bank = -1;
  }
  return place;
}

// A block edits R rows: sums P x over the columns, 8 ranks at a time; then adds Qᵀ of that to x, read a second time from
// L1. With tasks R = 1, since each row has its own bank. Threads are at most 256, one for each V columns.
template <class T, class W, int V, int R>
__global__ void __launch_bounds__(THREADS, 1) edit_rows(Rows a) {
  SHARED(float, partial, WARPS * R * RANKS);
  const int64_t C = a.e.C, stride = int64_t(blockDim.x) * V;
  const int r = a.e.r, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  SHARED_DYNAMIC(float, factors, R * a.e.r);
  const int64_t n = a.begin + int64_t(blockIdx.x) * R;
  const T* x[R];
  T* out[R];
  Place place[R];
  UNROLL for (int i = 0; i < R; i++) {
    place[i] = n + i < a.end ? find(a.e, n + i) : Place{0, -1, 0};
    const bool active = place[i].token >= 0;
    const int64_t b = place[i].b, t = place[i].token;
    x[i] = active ? static_cast<const T*>(a.x.data) + b * a.x.batch_stride + t * a.x.token_stride : nullptr;
    out[i] = active && a.out.data ? static_cast<T*>(a.out.data) + b * a.out.batch_stride + t * a.out.token_stride : nullptr;
    if (a.places && threadIdx.x == 0 && n + i < a.end)
      store(a.places + n + i, active && place[i].bank >= 0 ? place[i].bank << 32 | t : int64_t(-1));
  }
  const int64_t bank = R > 1 || place[0].bank < 0 ? 0 : place[0].bank;
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
        UNROLL for (int i = 0; i < R; i++)
          UNROLL for (int v = 0; v < V; v++) sum[i * RANKS + j] = multiply_add(row[i].at[v], p.at[v], sum[i * RANKS + j]);
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
      if (R == 1 && place[0].bank < 0) factor = NAN;  // a task that names no bank
      bool active = false;
      UNROLL for (int k = 0; k < R; k++) active |= k == i && x[k];
      if (!active) factor = 0;
      store(factors + i * r + j, factor);
      if (a.factors && n + i < a.end) store(a.factors + (n + i) * r + j, factor);
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
      UNROLL for (int i = 0; i < R; i++) {
        const float factor = load(factors + i * r + j);
        UNROLL for (int v = 0; v < V; v++) row[i].at[v] = multiply_add(factor, q.at[v], row[i].at[v]);
      }
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
  bool h_by_position;      // h is the saved rows: row (b, p), not (b, token)
  void* out[3];            // dD, dA, db: (K, r, C), (K, r, C), (K, r)
  float* before[3];        // the same of the rows before `begin`, or null
  int64_t begin, end, split_stride;  // split i writes (and adds to) what lies i · split_stride elements further on
};

// Σ s xᵀ over rows, into dD (job 0: s = u, x = h), dA (job 1: s = δ, x = g) or db (job 2: s = u, x = 1).
// A block owns 8 ranks × 8 V columns of one job of one bank, and one share of the rows (split); it writes float sums to be
// added by sum_partials, or the gradient itself. 32 groups of 8 lanes take different rows; their sums are added in order.
template <class T, class O, int V>
__global__ void __launch_bounds__(THREADS) sum_products(Products a) {
  constexpr int E = V < 4 ? V : 4, H = V / E, JG = RANKS / 4;  // numbers in a shared access; accesses and ranks of a lane
  SHARED(float, sums, WARPS * RANKS * LANES * V);
  SHARED(float, factors, CHUNK * RANKS);
  SHARED(int64_t, offsets, CHUNK);
  const int64_t C = blockIdx.z % 3 == 2 ? 1 : a.e.C, tile = LANES * V;
  const int job = blockIdx.z % 3, bank = blockIdx.z / 3, r = a.e.r;
  const int rank_tiles = (r + RANKS - 1) / RANKS, j0 = blockIdx.x % rank_tiles * RANKS;
  const int64_t column = blockIdx.x / rank_tiles * tile;
  if (column >= C) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const int64_t c = column + q * V;
  const float* s = job == 1 ? a.delta : a.u;
  const Stream& x = job == 1 ? a.g : a.h;
  const bool by_position = job == 0 && a.h_by_position;
  const int64_t share = (a.end - a.begin + gridDim.y - 1) / gridDim.y;
  const int64_t begin = a.begin + blockIdx.y * share, end = begin + share < a.end ? begin + share : a.end;

  float sum[RANKS * V] = {};
  for (int64_t n0 = begin; n0 < end; n0 += CHUNK) {
    __syncthreads();
    for (int i = threadIdx.x; i < CHUNK * RANKS / 4; i += THREADS) {  // four ranks of a row each
      const int64_t n = n0 + i / (RANKS / 4), j = j0 + i % (RANKS / 4) * 4;
      Pack<4, float> four{};
      if (n < end && r % 4 == 0 && j < r) four = load<4>(s + n * r + j);
      if (n < end && r % 4 != 0)
        for (int k = 0; k < 4; k++)
          if (j + k < r) four.at[k] = load(s + n * r + j + k);
      store(factors + i * 4, four);
    }
    if (threadIdx.x < CHUNK) {
      const int64_t n = n0 + threadIdx.x, place = n < end ? load(a.places + n) : -1;
      const int64_t b = uint32_t(n) / uint32_t(a.e.P), t = by_position ? n - b * a.e.P : place & 0xFFFFFFFF;
      const bool mine = place >= 0 && place >> 32 == bank;
      store(offsets + threadIdx.x, mine ? b * x.batch_stride + t * x.token_stride : int64_t(-1));
    }
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
  // Of the 8 warps' sums a thread adds E columns: chosen so that a warp writes whole sectors and reads without conflicts.
  const int column_part = threadIdx.x / LANES % H, j = threadIdx.x / (LANES * H);
  const int64_t to = column + q * V + column_part * E;
  if (j >= RANKS || j0 + j >= r || to >= C) return;
  Floats<E> total = all<E>(0);
  for (int w = 0; w < WARPS; w++) {
    const int slot = (w * JG * H + j % JG * H + column_part) * 32 + j / JG * LANES + q;
    Floats<E> some = widen(load<E>(sums + slot * E));
    UNROLL for (int e = 0; e < E; e++) total.at[e] += some.at[e];
  }
  const int64_t element = blockIdx.y * a.split_stride + (int64_t(bank) * r + j0 + j) * C + to;
  O* out = static_cast<O*>(a.out[job]) + element;
  if (job == 2) {
    store(out, narrow<O>(total.at[0] + (a.before[2] ? load(a.before[2] + element) : 0)));
  } else {
    Floats<E> before = a.before[job] ? widen(load<E>(a.before[job] + element)) : all<E>(0);
    UNROLL for (int e = 0; e < E; e++) total.at[e] += before.at[e];
    store(out, narrow<O>(total));
  }
}

// ---- the launchers -------------------------------------------------------------------------------------------------

const char* too_large(const Edit& e) {
  if (e.r > MAX_RANK) return "the CUDA kernels take ranks up to 2048";
  if (e.B * e.P >= int64_t(1) << 31) return "the CUDA kernels take up to 2^31 rows";
  return nullptr;
}

template <class T, class W>
const char* launch_rows(const Rows& a, void* stream) {
  if (a.begin == a.end) return nullptr;
  const int64_t C = a.e.C;
  const bool vectors = C % fast<T> == 0 && aligned<T>(a.x) && aligned<T>(a.out) && aligned(a.first, C * sizeof(W)) &&
                       aligned(a.second) && aligned(a.copy);
  const int rows = vectors && !a.e.tasks.data ? 4 : 1, wide = vectors ? fast<T> : 1;
  const int threads = smaller(THREADS, ceil_div(ceil_div(C, wide), 32) * 32);
  const dim3 grid(ceil_div(a.end - a.begin, rows));
  const size_t shared = rows * a.e.r * sizeof(float);
  if (rows == 4) return LAUNCH((edit_rows<T, W, fast<T>, 4>), grid, threads, shared, stream, a);
  if (vectors) return LAUNCH((edit_rows<T, W, fast<T>, 1>), grid, threads, shared, stream, a);
  return LAUNCH((edit_rows<T, W, 1, 1>), grid, threads, shared, stream, a);
}

template <class T, class O>
const char* launch_products(const Products& a, int splits, void* stream) {
  const int64_t C = a.e.C;
  const bool vectors = C % fast<T> == 0 && aligned<T>(a.h) && aligned<T>(a.g) && aligned(a.u) && aligned(a.delta) &&
                       aligned(a.out[0]) && aligned(a.out[1]);
  const dim3 grid(ceil_div(C, LANES * (vectors ? fast<T> : 1)) * ceil_div(a.e.r, RANKS), splits, 3 * a.e.K);
  if (vectors) return LAUNCH((sum_products<T, O, fast<T>>), grid, THREADS, 0, stream, a);
  return LAUNCH((sum_products<T, O, 1>), grid, THREADS, 0, stream, a);
}

// How the backward pass divides its N rows. Chunk by chunk, so that sum_products finds in L2 the g that edit_rows has just
// read; with what both need again (D, A, the sums) that must fit. Where it cannot, one chunk, and g is read twice.
struct Plan {
  int64_t chunk, sums;  // rows at a time; elements of dD, dA and db
  int splits;           // shares of a chunk's rows, to occupy the GPU: as many as add no more than 3 % to the traffic
};

Plan plan(const Edit& e) {
  const int64_t N = e.B * e.P, bytes = e.dtype == Dtype::f32 ? 4 : 2, weights = e.weight_dtype == Dtype::f32 ? 4 : 2;
  Plan p{N, e.K * (2 * e.r * e.C + e.r), 1};
  const int64_t blocks = ceil_div(e.C, LANES * 16 / bytes) * ceil_div(e.r, RANKS) * 2 * e.K;
  p.splits = larger(1, smaller(32, smaller(256 / blocks, N * bytes / (96 * e.r * e.K))));
  const int64_t room = l2_size() * 9 / 10 - 2 * e.K * e.r * e.C * weights - p.splits * p.sums * 4;
  const int64_t rows = room / (3 * e.C * bytes) / CHUNK * CHUNK;
  if (rows >= CHUNK) p.chunk = smaller(N, rows);
  return p;
}

}  // namespace

int64_t low_rank_edit_workspace(const Edit& e) {
  const int64_t N = e.B * e.P;
  const Plan p = plan(e);
  return ceil_div(N * e.r * 4, 16) * 16 + ceil_div(N * 8, 16) * 16 + p.splits * ceil_div(p.sums, 4) * 16;
}

const char* low_rank_edit(const Edit& e, const EditForward& f, void* stream) {
  TRY(too_large(e));
  Rows a{e, f.h, f.out, f.down, f.up, f.bias, f.rows, static_cast<float*>(f.delta), nullptr, 0, e.B * e.P};
  return by_dtype(e.dtype, e.weight_dtype, [&](auto t, auto w) { return launch_rows<decltype(t), decltype(w)>(a, stream); });
}

const char* low_rank_edit_backward(const Edit& e, const EditBackward& f, void* stream) {
  TRY(too_large(e));
  const int64_t N = e.B * e.P;
  const Plan p = plan(e);
  char* space = static_cast<char*>(f.workspace);
  float* u = reinterpret_cast<float*>(space);
  int64_t* places = reinterpret_cast<int64_t*>(space += ceil_div(N * e.r * 4, 16) * 16);
  float* sums = reinterpret_cast<float*>(space += ceil_div(N * 8, 16) * 16);
  Rows rows{e, f.g, f.dh, f.up, f.down, nullptr, nullptr, u, places, 0, N};
  const bool saved = f.rows != nullptr;
  Products products{e, u, static_cast<const float*>(f.delta), places,
                    saved ? Stream{const_cast<void*>(f.rows), e.P * e.C, e.C} : f.h, f.g, saved, {}, {}, 0, 0, 0};
  return by_dtype(e.dtype, e.weight_dtype, [&](auto t, auto w) -> const char* {
    using T = decltype(t);
    using W = decltype(w);
    if (!f.ddown) return launch_rows<T, W>(rows, stream);
    void* gradients[3] = {f.ddown, f.dup, f.dbias};
    float* partial[3] = {sums, sums + e.K * e.r * e.C, sums + 2 * e.K * e.r * e.C};
    products.split_stride = ceil_div(p.sums, 4) * 4;
    for (int64_t n = 0; n == 0 || n < N; n += p.chunk) {
      rows.begin = products.begin = n, rows.end = products.end = smaller(N, n + p.chunk);
      TRY((launch_rows<T, W>(rows, stream)));
      const bool last = rows.end == N, direct = last && p.splits == 1;  // then the gradients are written here
      for (int i = 0; i < 3; i++) products.before[i] = n > 0 ? partial[i] : nullptr;
      for (int i = 0; i < 3; i++) products.out[i] = direct ? gradients[i] : static_cast<void*>(partial[i]);
      TRY((direct ? launch_products<T, W>(products, 1, stream) : launch_products<T, float>(products, p.splits, stream)));
    }
    return nullptr;
  });
}

}  // namespace minireft::MINIREFT_BACKEND
