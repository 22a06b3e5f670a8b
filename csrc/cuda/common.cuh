// What the kernels share: number types, the few helpers that touch memory, sums over a warp, launching.
// Included by each .cu; nvcc compiles it for the GPU, g++ -DMINIREFT_EMULATOR for the emulator (csrc/emulator).
// You should see every access to memory in a kernel go through load or store: that is how the emulator counts them.
#pragma once
#include <cmath>
#include <cstdint>

#include "../launchers.h"

#if defined(MINIREFT_EMULATOR)
#include "../emulator/cuda_on_cpu.h"
#define MINIREFT_BACKEND emulated
#define UNROLL
#define UNROLL_BY(n)
#define SITE \
  , const char *file = __builtin_FILE(), int line = __builtin_LINE()  // the source line an access is counted at
#define AT , file, line
#define COUNT(what) (minireft::emulator::counting ? (void)minireft::emulator::kernel->what++ : (void)0)
#define SHARED(T, name, count) T* name = (T*)minireft::emulator::shared_array((count) * sizeof(T), __FILE__, __LINE__)
#define SHARED_DYNAMIC(T, name, count) SHARED(T, name, count)
#define LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  ((void)(stream), (void)(shared_bytes),                         \
   minireft::emulator::launch(#kernel, grid, threads, [=] { kernel(__VA_ARGS__); }))
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MINIREFT_BACKEND cuda
#define UNROLL _Pragma("unroll")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(n) PRAGMA(unroll n)
#define SITE
#define AT
#define COUNT(what) ((void)0)
#define SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define SHARED_DYNAMIC(T, name, count) extern __shared__ __align__(16) T name[]
#define LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                                       \
  ([&]() -> const char* {                                                                              \
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);           \
    cudaError_t error = cudaGetLastError();                                                            \
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);                                 \
  }())
#endif
#define DEVICE __device__ __forceinline__
#define TRY(launch)                              \
  do {                                           \
    if (const char* wrong = (launch)) return wrong; \
  } while (0)

namespace minireft::MINIREFT_BACKEND {

using bf16 = __nv_bfloat16;
using half = __half;
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr unsigned ALL = 0xFFFFFFFF;

// ---- numbers: half precision is for storage, arithmetic is in float ------------------------------------------------

DEVICE float wide(float x) { return x; }
DEVICE float wide(bf16 x) { return __bfloat162float(x); }
DEVICE float wide(half x) { return __half2float(x); }
template <class T> DEVICE T narrow(float x);
template <> DEVICE float narrow<float>(float x) { return x; }
template <> DEVICE bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> DEVICE half narrow<half>(float x) { return __float2half_rn(x); }

__host__ DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ DEVICE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

DEVICE float multiply_add(float a, float b, float c) {
  COUNT(fma);
  return a * b + c;  // nvcc contracts it
}

// ---- memory: V elements in one access, 16 bytes where V = fast<T>, one element where V = 1 -------------------------

template <class T> constexpr int fast = 16 / sizeof(T);

template <int V, class T>
struct alignas(V * sizeof(T)) Pack {
  T at[V];
};

template <int V, class T>
DEVICE Pack<V, T> load(const T* p SITE) {
#if defined(MINIREFT_EMULATOR)
  emulator::touch(p, V * sizeof(T), false, false AT);
#endif
  return *reinterpret_cast<const Pack<V, T>*>(p);
}

template <int V, class T>
DEVICE void store(T* p, const Pack<V, T>& value SITE) {
#if defined(MINIREFT_EMULATOR)
  emulator::touch(p, V * sizeof(T), true, false AT);
#endif
  *reinterpret_cast<Pack<V, T>*>(p) = value;
}

// The same for what this pass does not touch again: L2 lets it go first, and keeps what is still needed.
template <int V, class T>
DEVICE Pack<V, T> load_last(const T* p SITE) {
#if defined(MINIREFT_EMULATOR)
  emulator::touch(p, V * sizeof(T), false, true AT);
#else
  if constexpr (V * sizeof(T) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
    return reinterpret_cast<const Pack<V, T>&>(bits);
  }
#endif
  return *reinterpret_cast<const Pack<V, T>*>(p);
}

template <int V, class T>
DEVICE void store_last(T* p, const Pack<V, T>& value SITE) {
#if defined(MINIREFT_EMULATOR)
  emulator::touch(p, V * sizeof(T), true, true AT);
#else
  if constexpr (V * sizeof(T) == 16) {
    __stcs(reinterpret_cast<uint4*>(p), reinterpret_cast<const uint4&>(value));
    return;
  }
#endif
  *reinterpret_cast<Pack<V, T>*>(p) = value;
}

template <class T> DEVICE T load(const T* p SITE) { return load<1>(p AT).at[0]; }
template <class T> DEVICE void store(T* p, T value SITE) { store<1, T>(p, {{value}} AT); }

template <int V>
struct Floats {
  float at[V];
};

template <int V, class T>
DEVICE Floats<V> widen(const Pack<V, T>& x) {
  Floats<V> y;
  UNROLL for (int i = 0; i < V; i++) y.at[i] = wide(x.at[i]);
  return y;
}

template <class T, int V>
DEVICE Pack<V, T> narrow(const Floats<V>& x) {
  Pack<V, T> y;
  UNROLL for (int i = 0; i < V; i++) y.at[i] = narrow<T>(x.at[i]);
  return y;
}

template <int V>
DEVICE Floats<V> all(float x) {
  Floats<V> y;
  UNROLL for (int i = 0; i < V; i++) y.at[i] = x;
  return y;
}

// V parameters from row[c]; zeros from C on. Every lane of the warp calls; lanes that differ in BIT have the same row,
// and the upper one's c is the lower one's plus V. Float parameters beside half-precision activations are 32 bytes a
// lane, two accesses that would use half of each sector: so the two lanes read their 64 bytes in sector-wide pieces,
// and then swap.
template <int V, int BIT = 1, class W>
DEVICE Floats<V> load_parameters(const W* row, int64_t c, int64_t C SITE) {
  if constexpr (V * sizeof(W) <= 16) {
    return c < C ? widen(load<V>(row + c AT)) : all<V>(0);
  } else {
    static_assert(V == 8 && sizeof(W) == 4);
    const bool odd = threadIdx.x & BIT;
    const int64_t near = c - (odd ? 4 : 0), far = near + 8;  // of quarters 0 1 2 3: even reads 0 2, odd reads 1 3
    Floats<4> x = near < C ? widen(load<4>(row + near AT)) : all<4>(0);
    Floats<4> y = far < C ? widen(load<4>(row + far AT)) : all<4>(0);
    Floats<V> out;
    UNROLL for (int i = 0; i < 4; i++) {
      float got = __shfl_xor_sync(ALL, odd ? x.at[i] : y.at[i], BIT);
      out.at[i] = odd ? got : x.at[i], out.at[4 + i] = odd ? y.at[i] : got;
    }
    return out;
  }
}

// ---- sums in a fixed order -----------------------------------------------------------------------------------------

// Sums N numbers over the lanes that differ in the bits BIT … LOW of their index. At each step a lane keeps half of its
// numbers and gives the rest to its partner: N − 1 shuffles where summing one after another takes 5 N. In the end a
// lane holds N · LOW / (2 · BIT) sums (at least one), those at its bits' place in the list.
template <int N, int BIT, int LOW, int ALLOCATED>
DEVICE void scatter_sum(float (&v)[ALLOCATED]) {
  if constexpr (BIT >= LOW) {
    const bool upper = threadIdx.x & BIT;
    constexpr int keep = N / 2;
    if (keep == 0) v[0] += __shfl_xor_sync(ALL, v[0], BIT);
    UNROLL for (int i = 0; i < keep; i++) {
      float got = __shfl_xor_sync(ALL, upper ? v[i] : v[i + keep], BIT);
      v[i] = (upper ? v[i + keep] : v[i]) + got;
    }
    scatter_sum<(keep > 0 ? keep : 1), BIT / 2, LOW>(v);
  }
}

DEVICE int64_t at(const Index& index, int64_t b, int64_t p SITE) {
  return load(index.data + b * index.stride_b + p * index.stride_p AT);
}

// out[k, i] = Σ over s < count of partial[s · stride + i], of the s whose batch row s / per_row has task k (all,
// without tasks). A block sums 32 · E columns, warp w the s = w, w + 8, …; the warps' sums are added in order.
template <class O, int E>
__global__ void __launch_bounds__(THREADS) sum_partials(const float* partial, int64_t count, int64_t stride,
                                                        int64_t width, O* out, Index tasks, int64_t per_row) {
  SHARED(float, sums, WARPS * 32 * E);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i = (int64_t(blockIdx.x) * 32 + lane) * E;
  Floats<E> sum = all<E>(0);
  for (int64_t s = warp; s < count; s += WARPS) {
    if (i >= width || (tasks.data && at(tasks, s / per_row, 0) != blockIdx.y)) continue;
    Floats<E> x = widen(load<E>(partial + s * stride + i));
    UNROLL for (int e = 0; e < E; e++) sum.at[e] += x.at[e];
  }
  store(sums + threadIdx.x * E, narrow<float>(sum));
  __syncthreads();
  if (warp != 0 || i >= width) return;
  for (int w = 1; w < WARPS; w++) {
    Floats<E> x = widen(load<E>(sums + (w * 32 + lane) * E));
    UNROLL for (int e = 0; e < E; e++) sum.at[e] += x.at[e];
  }
  store(out + blockIdx.y * width + i, narrow<O>(sum));
}

// ---- choices a launcher makes --------------------------------------------------------------------------------------

// Calls f with a value of the activations' type and one of the parameters'; returns what f returns.
template <class F>
const char* by_dtype(Dtype dtype, Dtype weight_dtype, F f) {
  const bool same = dtype == weight_dtype;
  if (dtype == Dtype::f32 && same) return f(float{}, float{});
  if (dtype == Dtype::f16) return same ? f(half{}, half{}) : f(half{}, float{});
  if (dtype == Dtype::bf16) return same ? f(bf16{}, bf16{}) : f(bf16{}, float{});
  return "the CUDA kernels take float32, float16 and bfloat16";
}

inline bool aligned(const void* p, int64_t stride_bytes = 0) {  // good for 16-byte accesses; null always is
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0;
}

template <class T>
bool aligned(const Stream& s) {
  return !s.data || (aligned(s.data, s.batch_stride * sizeof(T)) && aligned(s.data, s.token_stride * sizeof(T)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class O>
const char* launch_sum_partials(const float* partial, int64_t count, int64_t stride, int64_t width, O* out, int64_t K,
                                Index tasks, int64_t per_row, void* stream) {
  const bool wide =
      width % 4 == 0 && aligned(partial, stride * 4) && reinterpret_cast<uintptr_t>(out) % (4 * sizeof(O)) == 0;
  const dim3 grid((width + (wide ? 128 : 32) - 1) / (wide ? 128 : 32), K);
  if (wide)
    return LAUNCH((sum_partials<O, 4>), grid, THREADS, 0, stream, partial, count, stride, width, out, tasks, per_row);
  return LAUNCH((sum_partials<O, 1>), grid, THREADS, 0, stream, partial, count, stride, width, out, tasks, per_row);
}

// Fills memory with zeros, in the stream's order.
inline const char* zeros(void* data, size_t bytes, void* stream) {
#if defined(MINIREFT_EMULATOR)
  memset(data, 0, bytes);
  return nullptr;
#else
  cudaError_t error = cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

// Has the GPU the tensor-core step that tensor_cores.cuh uses (compute capability 8.0 and later)?
inline bool has_mma() {
#if defined(MINIREFT_EMULATOR)
  return true;
#else
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 8;
#endif
}

// Bytes of L2, which decides how many rows a backward pass takes at a time; without a GPU, an RTX 3060's.
inline int64_t l2_size() {
#if defined(MINIREFT_EMULATOR)
  return emulator::l2.capacity;
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 3 << 20;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device) != cudaSuccess || bytes == 0) return 3 << 20;
  return bytes;
#endif
}

}  // namespace minireft::MINIREFT_BACKEND
