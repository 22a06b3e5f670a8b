// Embedding rows with NEFTune's noise on the CPU: one pass, the noise a function of a counter (Philox4x32-10), not of a state.
// Each sum is formed in float, every operation rounded by itself: compile with -ffp-contract=off, as setup.py does.
// You should see the same bits as minireft.reference.noisy_embedding for uniform noise, on every machine.
#include <algorithm>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace minireft::cpu {
namespace {

constexpr int BLOCKS = lanes<float>;  // counters turned over together, each for four channels

typedef uint64_t vecu64 __attribute__((vector_size(VECTOR_BYTES)));
struct Words { vecu w[4]; };

// The high and the low halves of the 64-bit products of 32-bit numbers.
void multiply(vecu x, uint32_t by, vecu& high, vecu& low) {
  const vecu64 even = ((vecu64)x & 0xffffffff), odd = (vecu64)x >> 32;
#if defined(__AVX512F__)
  const vecu64 factor = vecu64{} + by, p = (vecu64)_mm512_mul_epu32((__m512i)even, (__m512i)factor),
               q = (vecu64)_mm512_mul_epu32((__m512i)odd, (__m512i)factor);
#elif defined(__AVX2__)
  const vecu64 factor = vecu64{} + by, p = (vecu64)_mm256_mul_epu32((__m256i)even, (__m256i)factor),
               q = (vecu64)_mm256_mul_epu32((__m256i)odd, (__m256i)factor);
#else
  const vecu64 p = even * by, q = odd * by;
#endif
  high = (vecu)((p >> 32) | (q & 0xffffffff00000000)), low = (vecu)((p & 0xffffffff) | (q << 32));
}

Words philox(uint32_t row_low, uint32_t row_high, uint32_t index, uint32_t block, uint32_t k0, uint32_t k1) {
  vecu c0 = vecu{} + row_low, c1 = vecu{} + row_high, c2 = vecu{} + index, c3;
  for (int j = 0; j < BLOCKS; ++j) c3[j] = block + j;
  for (int round = 0; round < 10; ++round) {
    vecu high0, low0, high2, low2;
    multiply(c0, 0xD2511F53, high0, low0), multiply(c2, 0xCD9E8D57, high2, low2);
    c0 = high2 ^ c1 ^ k0, c1 = low2, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// a[0], b[0], a[1], b[1], ...: the first half in low, the second in high.
template <int... I>
void interleave(vecf a, vecf b, vecf& low, vecf& high, std::integer_sequence<int, I...>) {
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * BLOCKS)...);
  high = __builtin_shufflevector(a, b, (I / 2 + BLOCKS / 2 + I % 2 * BLOCKS)...);
}

// ε for 4 · BLOCKS channels, in the order of the channels.
void uniform(const Words& x, float* eps) {
  vecf e[4], a, b, c, d;
  for (int i = 0; i < 4; ++i) e[i] = (__builtin_convertvector((veci)x.w[i] >> 8, vecf) + 0.5f) * 0x1p-23f;
  const auto order = std::make_integer_sequence<int, BLOCKS>{};
  interleave(e[0], e[2], a, b, order), interleave(e[1], e[3], c, d, order);
  interleave(a, c, e[0], e[1], order), interleave(b, d, e[2], e[3], order);
  for (int i = 0; i < 4; ++i) store(eps + i * BLOCKS, e[i]);
}

void gaussian(const Words& x, float* eps) {
  for (int j = 0; j < BLOCKS; ++j)
    for (int i = 0; i < 4; i += 2) {
      const float radius = std::sqrt(-2 * std::log(float((x.w[i][j] >> 8) + 1) * 0x1p-24f));
      const float angle = float(x.w[i + 1][j] >> 8) * float(2 * M_PI * 0x1p-24);
      eps[4 * j + i] = radius * std::cos(angle), eps[4 * j + i + 1] = radius * std::sin(angle);
    }
}

int64_t at(const Index& i, int64_t b, int64_t t) { return i.data[b * i.stride_b + t * i.stride_p]; }

template <class T>
void forward(const Noise& z, const NoiseForward& f) {
  using F = wide<T>;
  const int64_t C = z.C, N = z.B * z.T;
  constexpr int64_t PIECE = 16;
  parallel((N + PIECE - 1) / PIECE, [&](int64_t piece) {
    for (int64_t n = piece * PIECE; n < std::min(N, (piece + 1) * PIECE); ++n) {
      const int64_t b = n / z.T, t = n % z.T, index = z.index.data ? at(z.index, b, t) : t;
      const int64_t id = z.rows.data ? at(z.rows, b, t) : b;
      int64_t length = z.lengths.data ? at(z.lengths, b, t) : z.T;
      if (z.lengths.data && z.lengths.stride_p == 0 && (index < 0 || index >= length)) length = 0;
      const T* __restrict x = (const T*)f.weight + at(z.ids, b, t) * C;
      T* __restrict out = (T*)f.out + n * C;
      if (length <= 0) {
        std::memcpy(out, x, C * sizeof(T));
        continue;
      }
      const float scale = z.alpha / std::sqrt(float(length * C));
      for (int64_t c = 0; c < C; c += 4 * BLOCKS) {
        float eps[4 * BLOCKS];
        const Words words = philox(uint32_t(id), uint32_t(id >> 32), uint32_t(index), uint32_t(c / 4), uint32_t(z.seed[0]),
                                   uint32_t(z.seed[1]));
        z.normal ? gaussian(words, eps) : uniform(words, eps);
        const int64_t count = std::min<int64_t>(4 * BLOCKS, C - c);
        for (int64_t i = 0; i < count; ++i) {
          const float noise = scale * eps[i];
          narrow(widen(x[c + i]) + F(noise), out[c + i]);
        }
      }
    }
  });
}

// Every word's row is written once: zeros, or the sum over its tokens in their order. While one token's gradient is added, the
// next one's, which is anywhere, is asked into the second-level cache.
template <class T>
void backward(const Noise& z, const NoiseBackward& f) {
  using F = wide<T>;
  const int64_t N = z.B * z.T, C = z.C;
  std::vector<int64_t> starts(z.V + 1);  // the tokens of word v are starts[v] … starts[v + 1] − 1 of the order
  std::vector<const T*> g(N + 1);
  for (int64_t i = 0; i < N; ++i) {
    const int64_t b = f.order[i] / z.T, t = f.order[i] % z.T;
    ++starts[at(z.ids, b, t) + 1];
    g[i] = g[N] = (const T*)f.g.data + b * f.g.batch_stride + t * f.g.token_stride;
  }
  for (int64_t v = 0; v < z.V; ++v) starts[v + 1] += starts[v];
  const bool past = streams<T>({f.dweight, 0, C}, z.V, C);
  constexpr int64_t WORDS = 16, PIECES = 64;  // frequent words have neighbouring ids: the pieces get them in turn, 16 at a time
  parallel(PIECES, [&](int64_t piece) {
    std::vector<F> sum(C);
    const auto write_row = [&](T* out, int64_t begin, int64_t end) {
      if (begin == end) over_row<T>(C, [&](int64_t c, auto, auto store) { store(out + c, vec<T>{}, past); });
      for (int64_t i = begin; i < end; ++i)
        over_row<T>(C, [&, row = g[i], next = g[i + 1]](int64_t c, auto load, auto store) __attribute__((always_inline)) {
          __builtin_prefetch(next + c, 0, 2);
          const vec<T> total = (i == begin ? vec<T>{} : load(sum.data() + c)) + load(row + c);
          if (i + 1 == end) store(out + c, total, past);
          else store(sum.data() + c, total);
        });
    };
    for (int64_t first = piece * WORDS; first < z.V; first += PIECES * WORDS)
      for (int64_t v = first; v < std::min(first + WORDS, z.V); ++v) write_row((T*)f.dweight + v * C, starts[v], starts[v + 1]);
    fence();
  });
}

}  // namespace

const char* noisy_embedding(const Noise& z, const NoiseForward& f, void*) {
  with_type(z.dtype, [&](auto t) { forward<decltype(t)>(z, f); });
  return nullptr;
}

const char* noisy_embedding_backward(const Noise& z, const NoiseBackward& f, void*) {
  with_type(z.dtype, [&](auto t) { backward<decltype(t)>(z, f); });
  return nullptr;
}

int64_t noisy_embedding_workspace(const Noise&) { return 0; }

}  // namespace minireft::cpu
