// NEFTune: out[b, t] = weight[ids[b, t]] + α/√(length·C) ε in one pass, ε from a counter; and the gradient of weight.
// Compile with nvcc for a GPU, or with g++ -x c++ -DMINIREFT_EMULATOR. It has run in the emulator only, on no GPU yet.
// You should see the reference's bits for uniform noise, since every operation rounds by itself and in its order.
//
// A warp takes a token: it reads the id once, then gathers, draws and adds along the row. The gradient takes tokens
// sorted by id: where a run of equal ids starts, a warp sums the run in its order, so the same input gives the same
// bits.
#include "common.cuh"

namespace minireft::MINIREFT_BACKEND {
namespace {

struct Words {
  uint32_t at[4];
};

// Philox4x32-10, Salmon et al. 2011.
DEVICE Words philox(Words c, uint32_t k0, uint32_t k1) {
  UNROLL for (int round = 0; round < 10; round++) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c.at[0]), low0 = 0xD2511F53u * c.at[0];
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c.at[2]), low1 = 0xCD9E8D57u * c.at[2];
    c = {{high1 ^ c.at[1] ^ k0, low1, high0 ^ c.at[3] ^ k1, low0}};
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c;
}

// The noise of channels 4·block … 4·block + 3.
template <bool NORMAL>
DEVICE Floats<4> noise(int64_t row, int64_t index, uint32_t block, uint32_t k0, uint32_t k1) {
  const Words words = philox({{uint32_t(row), uint32_t(row >> 32), uint32_t(index), block}}, k0, k1);
  Floats<4> eps;
  if constexpr (NORMAL) {  // Box–Muller on two pairs
    UNROLL for (int i = 0; i < 4; i += 2) {
      COUNT(special);
      const float radius = sqrtf(-2 * logf(((words.at[i] >> 8) + 1.0f) * 0x1p-24f));
      const float half_turns = (words.at[i + 1] >> 8) * 0x1p-23f;
      eps.at[i] = radius * cospif(half_turns), eps.at[i + 1] = radius * sinpif(half_turns);
    }
  } else {  // (k + ½) 2⁻²³ with k the top 24 bits, signed: inside (−1, 1), symmetric, exact
    UNROLL for (int i = 0; i < 4; i++) eps.at[i] = (float(int32_t(words.at[i]) >> 8) + 0.5f) * 0x1p-23f;
  }
  return eps;
}

template <class T, int V, bool NORMAL>
__global__ void __launch_bounds__(THREADS) noisy_rows(Noise a, NoiseForward f) {
  const int64_t n = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (n >= a.B * a.T) return;
  const int64_t b = uint32_t(n) / uint32_t(a.T), t = n - b * a.T, id = at(a.ids, b, t);
  const int64_t index = a.index.data ? at(a.index, b, t) : t, row = a.rows.data ? at(a.rows, b, t) : b;
  int64_t length = a.lengths.data ? at(a.lengths, b, t) : a.T;
  if (a.lengths.data && a.lengths.stride_p == 0 && (index < 0 || index >= length)) length = 0;
  const uint32_t k0 = uint32_t(load(a.seed)), k1 = uint32_t(load(a.seed + 1));
  const float amount = __fdiv_rn(a.alpha, __fsqrt_rn(float(larger(length, 1) * a.C)));
  const bool exists = id >= 0 && id < a.V;
  const T* from = static_cast<const T*>(f.weight) + (exists ? id : 0) * a.C;
  T* to = static_cast<T*>(f.out) + n * a.C;
  for (int64_t c = threadIdx.x % 32 * V; c < a.C; c += 32 * V) {
    Floats<V> x = exists ? widen(load<V>(from + c)) : all<V>(NAN);
    if (length > 0) {
      UNROLL for (int i = 0; i < V; i += 4) {
        const Floats<4> eps = noise<NORMAL>(row, index, uint32_t((c + i) / 4), k0, k1);
        if constexpr (V == 1) {
          x.at[0] = __fadd_rn(x.at[0], __fmul_rn(amount, c % 4 == 0   ? eps.at[0]
                                                         : c % 4 == 1 ? eps.at[1]
                                                         : c % 4 == 2 ? eps.at[2]
                                                                      : eps.at[3]));
        } else {
          UNROLL for (int k = 0; k < 4; k++) x.at[i + k] = __fadd_rn(x.at[i + k], __fmul_rn(amount, eps.at[k]));
        }
      }
    }
    store(to + c, narrow<T>(x));
  }
}

// A block's 8 warps take 8 places in the sorted order; a warp whose place starts a run sums the run, over SPAN · 32 · V
// columns, so that reading the order and the ids is little beside reading g.
constexpr int SPAN = 4;

template <class T, int V>
__global__ void __launch_bounds__(THREADS) sum_runs(Noise a, NoiseBackward f) {
  const int64_t N = a.B * a.T, columns = SPAN * 32 * V, across = (a.C + columns - 1) / columns;
  int64_t i = blockIdx.x / across * WARPS + threadIdx.x / 32;
  const int64_t c0 = blockIdx.x % across * columns + threadIdx.x % 32 * V;
  if (i >= N) return;
  auto id_of = [&](int64_t n) { return at(a.ids, uint32_t(n) / uint32_t(a.T), uint32_t(n) % uint32_t(a.T)); };
  int64_t n = load(f.order + i);
  const int64_t id = id_of(n);
  if (id < 0 || id >= a.V || (i > 0 && id_of(load(f.order + i - 1)) == id)) return;
  Floats<V> sum[SPAN];
  UNROLL for (int s = 0; s < SPAN; s++) sum[s] = all<V>(0);
  for (bool more = true; more;) {
    const int64_t b = uint32_t(n) / uint32_t(a.T), t = n - b * a.T;
    const T* g = static_cast<const T*>(f.g.data) + b * f.g.batch_stride + t * f.g.token_stride;
    UNROLL for (int s = 0; s < SPAN; s++) {
      const int64_t c = c0 + s * 32 * V;
      const Floats<V> x = c < a.C ? widen(load<V>(g + c)) : all<V>(0);
      UNROLL for (int v = 0; v < V; v++) sum[s].at[v] += x.at[v];
    }
    more = ++i < N;
    if (more) n = load(f.order + i), more = id_of(n) == id;
  }
  UNROLL for (int s = 0; s < SPAN; s++) {
    const int64_t c = c0 + s * 32 * V;
    if (c < a.C) store(static_cast<T*>(f.dweight) + id * a.C + c, narrow<T>(sum[s]));
  }
}

const char* too_large(const Noise& a) {
  return a.B * a.T >= int64_t(1) << 31 ? "the CUDA kernels take up to 2^31 tokens" : nullptr;
}

}  // namespace

int64_t noisy_embedding_workspace(const Noise&) { return 0; }

const char* noisy_embedding(const Noise& a, const NoiseForward& f, void* stream) {
  TRY(too_large(a));
  if (a.B * a.T * a.C == 0) return nullptr;
  return by_dtype(a.dtype, a.dtype, [&](auto t, auto) -> const char* {
    using T = decltype(t);
    const dim3 grid(ceil_div(a.B * a.T, WARPS));
    const bool vectors = aligned(f.weight, a.C * sizeof(T)) && aligned(f.out);
    if (vectors && a.normal) return LAUNCH((noisy_rows<T, fast<T>, true>), grid, THREADS, 0, stream, a, f);
    if (vectors) return LAUNCH((noisy_rows<T, fast<T>, false>), grid, THREADS, 0, stream, a, f);
    if (a.normal) return LAUNCH((noisy_rows<T, 1, true>), grid, THREADS, 0, stream, a, f);
    return LAUNCH((noisy_rows<T, 1, false>), grid, THREADS, 0, stream, a, f);
  });
}

const char* noisy_embedding_backward(const Noise& a, const NoiseBackward& f, void* stream) {
  TRY(too_large(a));
  if (a.V * a.C == 0) return nullptr;
  return by_dtype(a.dtype, a.dtype, [&](auto t, auto) -> const char* {
    using T = decltype(t);
    TRY(zeros(f.dweight, a.V * a.C * sizeof(T), stream));  // most words of a vocabulary are in no batch
    if (a.B * a.T == 0) return nullptr;
    const bool vectors = aligned<T>(f.g) && aligned(f.dweight, a.C * sizeof(T));
    const dim3 grid(ceil_div(a.C, SPAN * 32 * (vectors ? fast<T> : 1)) * ceil_div(a.B * a.T, WARPS));
    if (vectors) return LAUNCH((sum_runs<T, fast<T>>), grid, THREADS, 0, stream, a, f);
    return LAUNCH((sum_runs<T, 1>), grid, THREADS, 0, stream, a, f);
  });
}

}  // namespace minireft::MINIREFT_BACKEND
