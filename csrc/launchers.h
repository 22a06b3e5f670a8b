// The launchers' signatures: what a kernel is given, as raw pointers and sizes. No torch here, so a kernel compiles in a
// second and reads like a book. Each backend (cpu, cuda, emulated) implements every function below, in its own namespace.
// You should see each name three times: csrc/cpu/*.cpp, csrc/cuda/*.cu, and the same .cu compiled by g++ for the emulator.
//
// Rules for all of them
//   - A launcher returns nullptr, or a text that says what is wrong; then nothing has been written.
//   - Strides and sizes are in elements, and 64 bits wide. The last stride of every tensor is 1. Pointers need no alignment
//     beyond their element's: a kernel that wants 16 bytes checks for them and has another path.
//   - Sums and products are formed in float (double for f64) and rounded once. Reductions run in an order that depends on
//     the sizes alone: same input, same bits, on any number of threads and in any order of blocks.
//   - Shapes, dtypes and devices were checked by the caller. On the CPU (and in the emulator) values were checked too:
//     positions, tasks and ids lie in range, positions are distinct within a row. On CUDA nobody can look without
//     waiting, so the kernels follow a rule: nothing outside a tensor is ever touched; a position outside −1 … T−1 counts
//     as −1; of equal positions in a row the first counts; a task or an id outside its range makes NaN of its rows.
//   - stream is the cudaStream_t; cpu and emulated ignore it. An empty problem launches nothing and succeeds, but
//     gradients of weights are still written (zeros).
#pragma once
#include <cstdint>

namespace minireft {

enum class Dtype : int { f32, f16, bf16, f64 };  // f64 exists on the CPU only

// A (B, T, C) tensor: element (b, t, c) is at data[b * batch_stride + t * token_stride + c]. Null data: there is none.
struct Stream {
  void* data;
  int64_t batch_stride, token_stride;
};

// One id per (b, p) or per b (stride_p = 0): element (b, p) is at data[b * stride_b + p * stride_p]. Null: there is none.
struct Index {
  const int64_t* data;
  int64_t stride_b, stride_p;
};

// ---- out = h + Aᵀ(D h + b) -----------------------------------------------------------------------------------------
// Row n of N = B·P is (b, p) = (n / P, n % P) and edits token t = positions(b, p), or t = p when positions is null (then
// P = T). It is inactive, and left alone, when t < 0 or when there are tasks and tasks(b, p) < 0. Otherwise it uses bank
// k = tasks(b, p) (0 without tasks) of down (K, r, C), up (K, r, C) and bias (K, r), all contiguous.

struct Edit {
  int64_t B, T, C, P, r, K;
  Index positions, tasks;
  Dtype dtype;         // of h, out, rows, g, dh
  Dtype weight_dtype;  // of down, up, bias and their gradients: f32, or the same as dtype
};

struct EditForward {
  Stream h, out;                  // out.data may be h.data (in place); only active rows of out are written
  const void *down, *up, *bias;
  void* rows;                     // (N, C) contiguous, dtype, or null: receives the active rows of h before the edit
  void* delta;                    // (N, r) contiguous, float (double for f64), or null: δ = D h + b, 0 at inactive rows
};

struct EditBackward {
  Stream g;                       // ∂L/∂out
  Stream h;                       // without positions: h as the forward pass read it (data null if rows is given)
  const void* rows;               // with positions: the rows that the forward pass saved, (N, C)
  const void* delta;              // (N, r) from the forward pass
  const void *down, *up;
  Stream dh;                      // apart from g, or null = not wanted; only active rows are written: g + Dᵀu, u = A g
  void *ddown, *dup, *dbias;      // shaped as the weights, weight_dtype, written whole; all three null = not wanted
  void* workspace;                // as many bytes as low_rank_edit_workspace says, 16-byte aligned
};

// ---- out = l ⊙ x,  l ⊙ gelu(x),  l ⊙ silu(x) ⊙ up -------------------------------------------------------------------
// Row (b, t) uses l (C,), or with tasks bank k = tasks(b) of l (K, C), or l = 1 when tasks(b) < 0 (its activation stays).

enum class Activation : int { none, gelu, gelu_tanh, swiglu };

struct Scale {
  int64_t B, T, K;
  Index tasks;         // stride_p = 0
  Activation activation;
  Dtype dtype;         // of x, up, out, g, dx, dup
  Dtype weight_dtype;  // of l and dl: f32, or the same as dtype
};

struct ScaleForward {
  int64_t C;
  Stream x, up, out;   // up only for swiglu
  const void* l;
};

struct ScaleBackward {
  int64_t C;
  Stream g, x, up, dx, dup;  // up and dup only for swiglu
  const void* l;
  void* dl;                  // as l, weight_dtype, written whole; null = not wanted
  void* workspace;           // as many bytes as scale_workspace says for this C, 16-byte aligned
};

// ---- out[b, t] = weight[ids[b, t]] + α/√(length·C) ε ---------------------------------------------------------------
// ε as in minireft/reference.py: Philox4x32-10, key = (seed, step), counter = (row low, row high, index, channel / 4);
// scale = alpha / sqrtf((float)(length * C)), then scale * ε, then x + that: each rounded to float, none contracted to FMA.

struct Noise {
  int64_t B, T, C, V;
  Index ids, lengths, rows, index;  // null lengths: T;  null rows: b;  null index: t
  const int64_t* seed;              // (2,) = (seed, step), on the device; the low 32 bits of each are the key
  float alpha;
  bool normal;                      // Gaussian by Box–Muller instead of uniform
  Dtype dtype;                      // of weight, out, g, dweight
};                                  // lengths with stride_p = 0 are a row's: noise only where 0 ≤ index < length;
                                    // otherwise they are each token's own document's, and 0 = no noise

struct NoiseForward {
  const void* weight;               // (V, C) contiguous
  void* out;                        // (B, T, C) contiguous
};

struct NoiseBackward {              // of Noise only B, T, C, V, ids and dtype are read
  Stream g;
  const int64_t* order;             // (B·T,) the tokens b·T + t, sorted by id, equal ids in their own order
  void* dweight;                    // (V, C) contiguous, written whole; sums run in that order
  void* workspace;                  // as many bytes as noisy_embedding_workspace says, 16-byte aligned
};

#define MINIREFT_LAUNCHERS(backend)                                                          \
  namespace backend {                                                                        \
  const char* low_rank_edit(const Edit&, const EditForward&, void* stream);                  \
  const char* low_rank_edit_backward(const Edit&, const EditBackward&, void* stream);        \
  int64_t low_rank_edit_workspace(const Edit&);                                              \
  /* count is 1, or 2 for keys and values in one launch: same sizes but C, both none */      \
  const char* scale(const Scale&, const ScaleForward*, int count, void* stream);             \
  const char* scale_backward(const Scale&, const ScaleBackward*, int count, void* stream);   \
  int64_t scale_workspace(const Scale&, int64_t C);                                          \
  const char* noisy_embedding(const Noise&, const NoiseForward&, void* stream);              \
  const char* noisy_embedding_backward(const Noise&, const NoiseBackward&, void* stream);    \
  int64_t noisy_embedding_workspace(const Noise&);                                           \
  }

MINIREFT_LAUNCHERS(cpu)
MINIREFT_LAUNCHERS(cuda)
MINIREFT_LAUNCHERS(emulated)

}  // namespace minireft
