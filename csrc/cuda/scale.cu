// (IA)³: out = l ⊙ x, l ⊙ gelu(x) or l ⊙ silu(x) ⊙ up, and their gradients; see csrc/launchers.h for the rules.
// Compile with nvcc for a GPU, or with g++ -x c++ -DMINIREFT_EMULATOR. It has run in the emulator only, on no GPU yet.
// You should see each tensor read once and written once. N rows, C width, K tasks.
//
// A thread owns V columns, whose l stay in registers, and walks down rows; the activation is computed again in the
// backward pass rather than kept. dl is summed by each thread over its rows, by the block over its warps, and by
// sum_partials over the blocks, always in the same order.
#include <type_traits>

#include "common.cuh"

namespace minireft::MINIREFT_BACKEND {
namespace {

constexpr int ROWS = 64;  // rows of a block: eight for each of its warps

struct Job {              // one tensor of the launch; keys and values are two
  int64_t C;
  Stream x, up, out;      // backward: out is g
  Stream dx, dup;         // backward only
  const void* l;
  float* dl;              // (tiles, C) sums to be added by sum_partials, or null
};

struct Jobs {
  Scale s;
  int64_t group, tiles;   // rows that share a task, and in how many tiles they are cut
  Job of[2];
};

// What a thread works on: columns c … c + V − 1 of rows first, first + 8, … before last.
struct Tile {
  int64_t c, first, last, index;
  float keep;             // 1 normally; without a task 0 (l counts as 1); with a task that names none NaN
  int64_t bank;
};

template <int V>
DEVICE Tile tile_of(const Jobs& a) {
  const int64_t columns = 32 * V, across = (larger(a.of[0].C, a.of[1].C) + columns - 1) / columns;
  Tile t{};
  t.index = blockIdx.x / across;
  const int64_t group = t.index / a.tiles, row = group * a.group + t.index % a.tiles * ROWS;
  t.c = blockIdx.x % across * columns + threadIdx.x % 32 * V;
  t.first = row + threadIdx.x / 32;
  t.last = smaller(row + ROWS, (group + 1) * a.group);
  t.keep = 1;
  if (a.s.tasks.data) {
    const int64_t task = at(a.s.tasks, group, 0);
    t.bank = task < 0 || task >= a.s.K ? 0 : task;
    t.keep = task < 0 ? 0 : task >= a.s.K ? NAN : 1;
  }
  return t;
}

template <int V, class W>
DEVICE Floats<V> vector_of(const Job& job, const Tile& t) {
  Floats<V> l = load_parameters<V>(static_cast<const W*>(job.l) + t.bank * job.C, t.c, job.C);
  UNROLL for (int i = 0; i < V; i++) l.at[i] = t.keep == 1 ? l.at[i] : t.keep == 0 ? 1.0f : NAN;
  return l;
}

template <int V, class T>
DEVICE T* pointer(const Jobs& a, const Stream& s, int64_t n, int64_t c) {
  const int64_t b = uint32_t(n) / uint32_t(a.s.T), token = n - b * a.s.T;
  return static_cast<T*>(s.data) + b * s.batch_stride + token * s.token_stride + c;
}

// The activation's value y and slope dy/dx.
struct Point {
  float y, slope;
};

template <Activation A>
DEVICE Point activate(float x) {
  if constexpr (A == Activation::none) {
    return {x, 1};
  } else if constexpr (A == Activation::swiglu) {
    COUNT(special);
    const float sigmoid = 1 / (1 + expf(-x));
    return {x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))};
  } else if constexpr (A == Activation::gelu) {
    COUNT(special);
    const float cdf = 0.5f * (1 + erff(x * 0.70710678f));
    return {x * cdf, cdf + x * 0.39894228f * expf(-0.5f * x * x)};
  } else {
    COUNT(special);
    const float a = 0.79788456f, b = 0.044715f;
    const float tanh = tanhf(a * (x + b * x * x * x)), cdf = 0.5f * (1 + tanh);
    return {x * cdf, cdf + 0.5f * x * (1 - tanh * tanh) * a * (1 + 3 * b * x * x)};
  }
}

template <class T, class W, int V, Activation A>
__global__ void __launch_bounds__(THREADS) scale_forward(Jobs a) {
  const Job& job = a.of[blockIdx.y];
  const Tile t = tile_of<V>(a);
  const Floats<V> l = vector_of<V, W>(job, t);
  if (t.c >= job.C) return;
  UNROLL_BY(4) for (int64_t n = t.first; n < t.last; n += WARPS) {
    Floats<V> y = widen(load<V>(pointer<V, const T>(a, job.x, n, t.c)));
    Floats<V> up = all<V>(1);
    if (A == Activation::swiglu) up = widen(load<V>(pointer<V, const T>(a, job.up, n, t.c)));
    UNROLL for (int i = 0; i < V; i++) {
      y.at[i] = activate<A>(y.at[i]).y * l.at[i];
      if (A == Activation::swiglu) y.at[i] *= up.at[i];
    }
    store(pointer<V, T>(a, job.out, n, t.c), narrow<T>(y));
  }
}

template <class T, class W, int V, Activation A>
__global__ void __launch_bounds__(THREADS) scale_backward_rows(Jobs a) {
  constexpr int E = V < 4 ? V : 4, H = V / E;  // numbers in a shared access, accesses of a lane
  SHARED(float, sums, WARPS * 32 * V);
  const Job& job = a.of[blockIdx.y];
  const Tile t = tile_of<V>(a);
  const Floats<V> l = vector_of<V, W>(job, t);
  Floats<V> dl = all<V>(0);
  UNROLL_BY(2) for (int64_t n = t.first; n < t.last; n += WARPS) {
    if (t.c >= job.C) break;
    const Floats<V> g = widen(load<V>(pointer<V, const T>(a, job.out, n, t.c)));
    const Floats<V> x = widen(load<V>(pointer<V, const T>(a, job.x, n, t.c)));
    Floats<V> up = all<V>(1), dx, dup;
    if (A == Activation::swiglu) up = widen(load<V>(pointer<V, const T>(a, job.up, n, t.c)));
    UNROLL for (int i = 0; i < V; i++) {
      const Point p = activate<A>(x.at[i]);
      dx.at[i] = g.at[i] * l.at[i] * p.slope * up.at[i];
      dup.at[i] = g.at[i] * l.at[i] * p.y;
      dl.at[i] = multiply_add(g.at[i] * p.y, up.at[i], dl.at[i]);
    }
    if (job.dx.data) store(pointer<V, T>(a, job.dx, n, t.c), narrow<T>(dx));
    if (A == Activation::swiglu && job.dup.data) store(pointer<V, T>(a, job.dup, n, t.c), narrow<T>(dup));
  }
  if (!job.dl) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  UNROLL for (int i = 0; i < V; i += E) {
    Pack<E, float> some;
    UNROLL for (int e = 0; e < E; e++) some.at[e] = dl.at[i + e];
    store(sums + ((warp * H + i / E) * 32 + lane) * E, some);
  }
  __syncthreads();
  // A thread adds E columns of the 8 warps: chosen so that a warp writes whole sectors and reads without conflicts.
  const int part = threadIdx.x / 8 % H, source = threadIdx.x / (8 * H) * 8 + threadIdx.x % 8;
  const int64_t c = t.c - lane * V + source * V + part * E;
  if (source >= 32 || c >= job.C) return;
  Floats<E> total = all<E>(0);
  for (int w = 0; w < WARPS; w++) {
    Floats<E> some = widen(load<E>(sums + ((w * H + part) * 32 + source) * E));
    UNROLL for (int e = 0; e < E; e++) total.at[e] += some.at[e];
  }
  store(job.dl + t.index * job.C + c, narrow<float>(total));
}

// ---- the launchers -------------------------------------------------------------------------------------------------

Jobs jobs_of(const Scale& s) {
  Jobs a{};
  a.s = s;
  a.group = s.tasks.data ? s.T : s.B * s.T;
  a.tiles = ceil_div(a.group, ROWS);
  return a;
}

int64_t tiles_of(const Jobs& a) { return a.s.tasks.data ? a.s.B * a.tiles : a.tiles; }

template <class T, class W>
bool vectors_of(const Jobs& a, int count) {
  bool good = true;
  for (int i = 0; i < count; i++) {
    const Job& j = a.of[i];
    good = good && j.C % fast<T> == 0 && aligned(j.l, j.C * sizeof(W)) && aligned(j.dl) && aligned<T>(j.x) &&
           aligned<T>(j.up) && aligned<T>(j.out) && aligned<T>(j.dx) && aligned<T>(j.dup);
  }
  return good;
}

template <class T, class W, int V, Activation A>
const char* launch_one(const Jobs& a, int count, bool backward, void* stream) {
  const dim3 grid(ceil_div(larger(a.of[0].C, a.of[1].C), 32 * V) * tiles_of(a), count);
  if (backward) return LAUNCH((scale_backward_rows<T, W, V, A>), grid, THREADS, 0, stream, a);
  return LAUNCH((scale_forward<T, W, V, A>), grid, THREADS, 0, stream, a);
}

const char* launch(const Jobs& a, int count, bool backward, void* stream) {
  if (a.s.B * a.s.T >= int64_t(1) << 31) return "the CUDA kernels take up to 2^31 rows";
  if (a.s.B * a.s.T == 0 || larger(a.of[0].C, a.of[1].C) == 0) return nullptr;
  return by_dtype(a.s.dtype, a.s.weight_dtype, [&](auto t, auto w) -> const char* {
    using T = decltype(t);
    using W = decltype(w);
    auto go = [&](auto activation) {
      constexpr Activation A = decltype(activation)::value;
      return vectors_of<T, W>(a, count) ? launch_one<T, W, fast<T>, A>(a, count, backward, stream)
                                        : launch_one<T, W, 1, A>(a, count, backward, stream);
    };
    switch (a.s.activation) {
      case Activation::none: return go(std::integral_constant<Activation, Activation::none>{});
      case Activation::gelu: return go(std::integral_constant<Activation, Activation::gelu>{});
      case Activation::gelu_tanh: return go(std::integral_constant<Activation, Activation::gelu_tanh>{});
      default: return go(std::integral_constant<Activation, Activation::swiglu>{});
    }
  });
}

}  // namespace

int64_t scale_workspace(const Scale& s, int64_t C) { return ceil_div(tiles_of(jobs_of(s)) * C, 4) * 16; }

const char* scale(const Scale& s, const ScaleForward* f, int count, void* stream) {
  Jobs a = jobs_of(s);
  for (int i = 0; i < count; i++) a.of[i] = {f[i].C, f[i].x, f[i].up, f[i].out, {}, {}, f[i].l, nullptr};
  return launch(a, count, false, stream);
}

const char* scale_backward(const Scale& s, const ScaleBackward* f, int count, void* stream) {
  Jobs a = jobs_of(s);
  for (int i = 0; i < count; i++)
    a.of[i] = {f[i].C,  f[i].x,   f[i].up, f[i].g,
               f[i].dx, f[i].dup, f[i].l,  f[i].dl ? static_cast<float*>(f[i].workspace) : nullptr};
  TRY(launch(a, count, true, stream));
  return by_dtype(s.dtype, s.weight_dtype, [&](auto, auto w) -> const char* {
    for (int i = 0; i < count; i++)
      if (f[i].dl && f[i].C > 0)
        TRY(launch_sum_partials(a.of[i].dl, tiles_of(a), f[i].C, f[i].C, static_cast<decltype(w)*>(f[i].dl),
                                s.tasks.data ? s.K : 1, s.tasks, larger(a.tiles, 1), stream));
    return nullptr;
  });
}

}  // namespace minireft::MINIREFT_BACKEND
