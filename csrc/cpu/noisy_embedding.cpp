// Embedding rows with NEFTune's noise on the CPU: one pass, the noise a function of a counter (Philox4x32-10), not of a state.
// Each sum is formed in float, every operation rounded by itself: compile with -ffp-contract=off, as setup.py does.
// You should see the same bits as minireft.reference.noisy_embedding for uniform noise, on every machine.
#include <algorithm>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace minireft::cpu {
namespace {

constexpr int BLOCKS = 16;  // counters turned over together: channels c … c + 63

struct Words { uint32_t w[4][BLOCKS]; };

Words philox(uint32_t row_low, uint32_t row_high, uint32_t index, uint32_t block, uint32_t k0, uint32_t k1) {
  Words x;
  for (int j = 0; j < BLOCKS; ++j) x.w[0][j] = row_low, x.w[1][j] = row_high, x.w[2][j] = index, x.w[3][j] = block + j;
  for (int round = 0; round < 10; ++round) {
    for (int j = 0; j < BLOCKS; ++j) {
      const uint64_t p = uint64_t(0xD2511F53) * x.w[0][j], q = uint64_t(0xCD9E8D57) * x.w[2][j];
      const uint32_t a = uint32_t(q >> 32) ^ x.w[1][j] ^ k0, b = uint32_t(p >> 32) ^ x.w[3][j] ^ k1;
      x.w[0][j] = a, x.w[1][j] = uint32_t(q), x.w[2][j] = b, x.w[3][j] = uint32_t(p);
    }
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return x;
}

// ε for 64 channels, in the order of the channels.
void uniform(const Words& x, float* eps) {
  for (int j = 0; j < BLOCKS; ++j)
    for (int i = 0; i < 4; ++i) eps[4 * j + i] = (float(int32_t(x.w[i][j]) >> 8) + 0.5f) * 0x1p-23f;
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
      const T* x = (const T*)f.weight + at(z.ids, b, t) * C;
      T* out = (T*)f.out + n * C;
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

template <class T>
void backward(const Noise& z, const NoiseBackward& f) {
  using F = wide<T>;
  const int64_t N = z.B * z.T, C = z.C;
  const auto id = [&](int64_t i) { return at(z.ids, f.order[i] / z.T, f.order[i] % z.T); };
  std::vector<int64_t> starts;  // where each run of equal ids begins
  for (int64_t i = 0; i < N; ++i)
    if (i == 0 || id(i) != id(i - 1)) starts.push_back(i);
  starts.push_back(N);
  parallel((int64_t)starts.size() - 1, [&](int64_t run) {
    std::vector<F> sum(C);
    for (int64_t i = starts[run]; i < starts[run + 1]; ++i) {
      const int64_t n = f.order[i];
      const T* g = (const T*)f.g.data + n / z.T * f.g.batch_stride + n % z.T * f.g.token_stride;
      for (int64_t c = 0; c < C; ++c) sum[c] += widen(g[c]);
    }
    T* out = (T*)f.dweight + id(starts[run]) * C;
    for (int64_t c = 0; c < C; ++c) narrow(sum[c], out[c]);
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
