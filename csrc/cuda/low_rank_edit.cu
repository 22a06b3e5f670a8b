// out = h + Aᵀ(D h + b) on rows of h, at chosen positions or on all, and its gradients; csrc/launchers.h has the rules.
// Compile with nvcc for a GPU, or with g++ -x c++ -DMINIREFT_EMULATOR. It has run in the emulator only, on no GPU yet.
// You should see each row read once and written once; D and A live in L2. N rows, C width, r rank, K banks.
//
// Forward and backward share a kernel: out = x + Qᵀ(P x + b) is the edit with P = D, Q = A, and the gradient of h,
// dh = g + Dᵀ(A g), with P = A, Q = D, b = 0. The gradients of D and A are both sums of products over rows, Σ s xᵀ:
// dD = Σ u hᵀ, dA = Σ δ gᵀ, with u = A g; and db = Σ u is one with x = 1.
#include "tensor_cores.cuh"

namespace minireft::MINIREFT_BACKEND {
namespace {

// ---- the launchers -------------------------------------------------------------------------------------------------

const char* too_large(const Edit& e) {
  if (e.r > MAX_RANK) return "the CUDA kernels take ranks up to 2048";
  if (e.B * e.P >= int64_t(1) << 31) return "the CUDA kernels take up to 2^31 rows";
  return nullptr;
}

// Tensor cores serve half precision from rank 16 on, banks too: multiply-adds outside them would take an H200 longer than
// the bytes, 7.0 against 4.1 µs for 448 rows in 4 banks at C 4096 and r 64, by the count.
bool by_mma(const Edit& e) { return e.dtype != Dtype::f32 && e.r >= 16 && e.r <= MMA_MAX && has_mma(); }

// Do D and A take more than half of L2? Then what is written must not push them out.
bool crowded(const Edit& e) {
  return 2 * e.K * e.r * e.C * (e.weight_dtype == Dtype::f32 ? 4 : 2) > l2_size() / 2;
}

template <class T, class W>
const char* launch_rows(const Rows& a, void* stream) {
  if (a.begin == a.end) return nullptr;
  const int64_t C = a.e.C;
  const bool vectors = C % fast<T> == 0 && aligned<T>(a.x) && aligned<T>(a.out) && aligned(a.first, C * sizeof(W)) &&
                       aligned(a.second) && aligned(a.copy);
  if constexpr (sizeof(T) == 2) {
    if (vectors && by_mma(a.e)) {
      const size_t shared = ceil_div(a.e.r, MMA_RANKS) * MMA_TILE * sizeof(float);
      return LAUNCH((edit_rows_mma<T, W>), grid_of(a, MMA_ROWS), THREADS, shared, stream, a);
    }
  }
  const int rows = vectors ? 4 : 1, threads = smaller(THREADS, ceil_div(ceil_div(C, vectors ? fast<T> : 1), 32) * 32);
  const size_t shared = rows * a.e.r * sizeof(float);
  if (vectors) return LAUNCH((edit_rows<T, W, fast<T>, 4>), grid_of(a, 4), threads, shared, stream, a);
  return LAUNCH((edit_rows<T, W, 1, 1>), grid_of(a, 1), threads, shared, stream, a);
}

template <class T, class O>
const char* launch_products(const Products& a, int splits, void* stream) {
  const int64_t C = a.e.C;
  const bool vectors = C % fast<T> == 0 && aligned<T>(a.h) && aligned<T>(a.g) &&
                       aligned(a.out[0]) && aligned(a.out[1]);
  if constexpr (sizeof(T) == 2) {
    if (vectors && by_mma(a.e)) {
      const dim3 grid(ceil_div(C, 64) * ceil_div(a.e.r, SUM_RANKS), splits, 3 * a.e.K);
      return LAUNCH((sum_products_mma<T, O>), grid, THREADS, 0, stream, a);
    }
  }
  const dim3 grid(ceil_div(C, LANES * (vectors ? fast<T> : 1)) * ceil_div(a.e.r, RANKS), splits, 3 * a.e.K);
  if (vectors) return LAUNCH((sum_products<T, O, fast<T>>), grid, THREADS, 0, stream, a);
  return LAUNCH((sum_products<T, O, 1>), grid, THREADS, 0, stream, a);
}

// How the backward pass divides its N rows. sum_products is to find in L2 the g that edit_rows has read, beside D and A:
// all rows at once if three quarters of g fit, else chunk by chunk. From one chunk to the next D, A and the sums have to
// stay; where these leave less than half of L2 to g, chunks would be so small that their launches, two each, take longer
// than to read g again: then all rows at once, too, and what does not fit of g is read twice.
struct Plan {
  int64_t chunk, sums;  // rows at a time; elements of dD, dA and db
  int splits;           // shares of a chunk's rows, to occupy the GPU: as many as add no more than 3 % to the traffic
  bool last;            // not all fits, so dh leaves L2 at once
};

Plan plan(const Edit& e) {
  const int64_t N = e.B * e.P, bytes = e.dtype == Dtype::f32 ? 4 : 2, weights = e.weight_dtype == Dtype::f32 ? 4 : 2;
  Plan p{larger(1, N), e.K * (2 * e.r * e.C + e.r), 1};
  const int64_t blocks = ceil_div(e.C, LANES * 16 / bytes) * ceil_div(e.r, by_mma(e) ? SUM_RANKS : RANKS) * 2 * e.K;
  p.splits = larger(1, smaller(32, smaller(256 / blocks, N * bytes / (96 * e.r * e.K))));
  const int64_t row = e.C * bytes + 2 * e.r * 4, sums = p.splits * p.sums * 4;  // bytes of a row's g, u and δ; of the sums
  const int64_t room = l2_size() * 7 / 8 - 2 * e.K * e.r * e.C * weights;
  const int64_t most = N * e.C * bytes / (32 * e.r);  // rows whose u, which leaves L2 for nothing, adds 4 % to the traffic
  const int64_t tile = by_mma(e) ? MMA_ROWS : 16;  // chunks begin at a sector of u and δ, whatever r
  const int64_t rows = smaller(most, (room - sums) / row) / tile * tile;
  if (rows > 0 && room - sums >= l2_size() / 2 && (N > most || N * row * 3 / 4 > room))
    p.chunk = ceil_div(ceil_div(N, ceil_div(N, rows)), tile) * tile;
  p.last = N * (row + 2 * e.C * bytes) + sums > room;
  return p;
}

int64_t padded(int64_t bytes) { return ceil_div(bytes, 128) * 128; }  // so that parts of a workspace start at sectors

}  // namespace

int64_t low_rank_edit_workspace(const Edit& e) {
  const Plan p = plan(e);
  return padded(p.chunk * e.r * 4) + padded(p.chunk * 8) + p.splits * padded(p.sums * 4);
}

const char* low_rank_edit(const Edit& e, const EditForward& f, void* stream) {
  TRY(too_large(e));
  Rows a{e, f.h, f.out, f.down, f.up, f.bias, f.rows, static_cast<float*>(f.delta), nullptr, 0, e.B * e.P, crowded(e)};
  return by_dtype(e.dtype, e.weight_dtype,
                  [&](auto t, auto w) { return launch_rows<decltype(t), decltype(w)>(a, stream); });
}

const char* low_rank_edit_backward(const Edit& e, const EditBackward& f, void* stream) {
  TRY(too_large(e));
  const int64_t N = e.B * e.P;
  const Plan p = plan(e);
  char* space = static_cast<char*>(f.workspace);
  float* u = reinterpret_cast<float*>(space);
  int64_t* places = reinterpret_cast<int64_t*>(space += padded(p.chunk * e.r * 4));
  float* sums = reinterpret_cast<float*>(space += padded(p.chunk * 8));
  Rows rows{e, f.g, f.dh, f.up, f.down, nullptr, nullptr, nullptr, nullptr, 0, N, f.ddown ? p.last : crowded(e)};
  const bool saved = f.rows != nullptr;
  const Stream h = saved ? Stream{const_cast<void*>(f.rows), e.P * e.C, e.C} : f.h;
  Products products{e, u, static_cast<const float*>(f.delta), places, h, f.g, aligned(f.delta), saved, {}, {}, false, 0, 0, 0};
  return by_dtype(e.dtype, e.weight_dtype, [&](auto t, auto w) -> const char* {
    using T = decltype(t);
    using W = decltype(w);
    if (!f.ddown) return launch_rows<T, W>(rows, stream);
    void* gradients[3] = {f.ddown, f.dup, f.dbias};
    float* partial[3] = {sums, sums + e.K * e.r * e.C, sums + 2 * e.K * e.r * e.C};
    if (sizeof(W) == 4 && p.splits == 1)  // float gradients hold the sums themselves
      for (int i = 0; i < 3; i++) partial[i] = static_cast<float*>(gradients[i]);
    products.split_stride = padded(p.sums * 4) / 4;
    for (int64_t n = 0; n == 0 || n < N; n += p.chunk) {
      rows.begin = products.begin = n, rows.end = products.end = smaller(N, n + p.chunk);
      products.u = rows.factors = u - n * e.r;  // row n's at the start: the next chunk finds the last one's place in L2
      products.places = rows.places = places - n;
      TRY((launch_rows<T, W>(rows, stream)));
      const bool last = rows.end == N, direct = last && p.splits == 1;  // then the gradients are written here
      for (int i = 0; i < 3; i++) products.before[i] = n > 0 ? partial[i] : nullptr;
      for (int i = 0; i < 3; i++) products.out[i] = direct ? gradients[i] : static_cast<void*>(partial[i]);
      products.direct = direct;
      TRY((direct ? launch_products<T, W>(products, 1, stream)
                  : launch_products<T, float>(products, p.splits, stream)));
    }
    const int64_t sizes[3] = {e.K * e.r * e.C, e.K * e.r * e.C, e.K * e.r};
    for (int i = 0; i < 3 && p.splits > 1; i++)
      TRY(launch_sum_partials(partial[i], p.splits, products.split_stride, sizes[i], static_cast<W*>(gradients[i]), 1,
                              {}, 1, stream));
    return nullptr;
  });
}

}  // namespace minireft::MINIREFT_BACKEND
