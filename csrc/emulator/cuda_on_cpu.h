// CUDA on a CPU: the vocabulary of csrc/cuda/*.cu, so that the same sources compile with g++ and run thread by thread.
// Compile a .cu with `g++ -x c++ -std=c++17 -DMINIREFT_EMULATOR`; README.md here shows how to step through one.
// You should see the reference's numbers in every order; a divergent barrier or a misaligned access is an error.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "counters.h"
#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace minireft::emulator {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;

enum class Order : int { forward, reverse, random };
inline Order order = [] {  // MINIREFT_EMULATOR_ORDER=forward|reverse|random; set_order() changes it
  const char* name = getenv("MINIREFT_EMULATOR_ORDER");
  return !name || name[0] == 'f' ? Order::forward : !strcmp(name, "reverse") ? Order::reverse : Order::random;
}();
inline uint64_t seed = 1;

enum class State { ready, at_barrier, at_warp, done, failed };

struct Thread {
  Stack stack;
  State state;
  const char* what;  // the barrier or warp operation it waits at
  const char* file;
  int line, id;
};

struct Warp {
  int waiting, turn;              // lanes that have arrived; which half of the slots is in use
  uint64_t slot[2][WARP][6];      // what each lane brought: two halves, since a fast lane may already write the next
  std::vector<Access> log[WARP];  // accesses since the lanes last met
};

struct SharedArray {
  const char* file;
  int line;
  size_t bytes;
  void* memory;  // from malloc, so that AddressSanitizer sees its end
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<SharedArray> shared;
  int waiting, turn, any[2];
  Thread* current = nullptr;
  std::string error;
};
inline Block block;
inline std::function<void()> run_thread;
inline std::mutex one_launch_at_a_time;

inline std::string place(const Thread& t) {
  return "thread " + std::to_string(t.id) + " of block (" + std::to_string(blockIdx.x) + ", " +
         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

inline void pause(State state) {
  Thread* me = block.current;
  me->state = state;
  switch_stack(me->stack, caller);
}

inline void fail(const std::string& what, const char* file, int line) {
  block.error = what + " at " + file + ":" + std::to_string(line) + ", " + place(*block.current);
  pause(State::failed);
}

inline void release(State from, int first, int count) {
  for (int i = first; i < first + count; i++)
    if (block.threads[i].state == from) block.threads[i].state = State::ready;
}

// All lanes of the warp meet here, at one line.
inline void meet_warp(const char* what, const char* file, int line) {
  Thread* me = block.current;
  Warp& warp = block.warps[me->id / WARP];
  me->what = what, me->file = file, me->line = line;
  me->state = State::at_warp;
  if (++warp.waiting == WARP) {
    int first = me->id / WARP * WARP;
    for (int i = first; i < first + WARP; i++)
      if (block.threads[i].line != line || block.threads[i].what != what)
        return fail(std::string("divergent ") + what + ": " + place(block.threads[i]) + " is at line " +
                    std::to_string(block.threads[i].line) + ", another lane", file, line);
    warp.waiting = 0, warp.turn ^= 1;
    if (counting) count_warp(warp.log, WARP);
    release(State::at_warp, first, WARP);
    me->state = State::ready;
  }
  pause(me->state);
}

inline int meet_block(int predicate, const char* file, int line) {
  Thread* me = block.current;
  me->what = "__syncthreads", me->file = file, me->line = line;
  if (trace) trace->push_back({blockIdx.x, me->id, line, 0, 0, 0, 0});
  me->state = State::at_barrier;
  int turn = block.turn;
  block.any[turn] |= predicate != 0;
  if (++block.waiting == int(block.threads.size())) {
    for (Thread& t : block.threads)
      if (t.line != line)
        return fail("divergent barrier: " + place(t) + " is at line " + std::to_string(t.line), file, line), 0;
    block.waiting = 0, block.turn ^= 1, block.any[block.turn] = 0;
    if (counting) {
      kernel->barriers++;
      for (Warp& warp : block.warps) count_warp(warp.log, WARP);
    }
    release(State::at_barrier, 0, block.threads.size());
  }
  pause(me->state);
  return block.any[turn];
}

inline void finish_thread() {
  run_thread();
  pause(State::done);
}

// Shared memory arrives full of 0xFF: NaN in every floating type, −1 in every integer.
inline void* shared_array(size_t bytes, const char* file, int line) {
  for (SharedArray& s : block.shared)
    if (s.line == line && s.file == file) return s.memory;
  void* memory = aligned_alloc(128, (bytes + 127) / 128 * 128);
  memset(memory, 0xFF, bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(static_cast<char*>(memory) + bytes, (bytes + 127) / 128 * 128 - bytes);
#endif
  block.shared.push_back({file, line, bytes, memory});
  return memory;
}

inline void touch(const void* p, int bytes, bool store, bool last, const char* file, int line) {
  uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (address % bytes) fail("misaligned access of " + std::to_string(bytes) + " bytes", file, line);
  if (!counting && !trace) return;
  bool shared = false;
  for (SharedArray& s : block.shared) {
    uintptr_t start = reinterpret_cast<uintptr_t>(s.memory);
    shared |= address >= start && address < start + s.bytes;
  }
  int id = block.current->id;
  if (trace) trace->push_back({blockIdx.x, id, line, store, shared, int64_t(address), bytes});
  if (counting) block.warps[id / WARP].log[id % WARP].push_back({file, line, store, last, shared, address, bytes, id % WARP});
}

inline void run_block() {
  block.waiting = block.turn = block.any[0] = block.any[1] = 0, block.error.clear();
  int count = block.threads.size();
  static std::vector<char> stacks;
  if (stacks.size() < count * STACK) stacks.resize(count * STACK);
  for (int i = 0; i < count; i++) {
    Thread& t = block.threads[i];
    t.state = State::ready, t.id = i, t.what = "its end", t.file = "", t.line = 0;
    new_fiber(t.stack, &stacks[i * STACK], STACK);
  }
  for (Warp& warp : block.warps) {
    warp.waiting = warp.turn = 0;
    for (auto& log : warp.log) log.clear();
  }
  std::vector<int> turns(count);
  for (int i = 0; i < count; i++) turns[i] = order == Order::reverse ? count - 1 - i : i;
  for (int done = 0; done < count;) {
    if (order == Order::random)
      for (int i = count - 1; i > 0; i--) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;  // xorshift64
        std::swap(turns[i], turns[seed % (i + 1)]);
      }
    bool moved = false;
    for (int i : turns) {
      Thread& t = block.threads[i];
      if (t.state != State::ready) continue;
      moved = true, block.current = &t, threadIdx = dim3(i, 0, 0);
      switch_stack(caller, t.stack);
      if (t.state == State::failed) return;
      done += t.state == State::done;
    }
    if (!moved && done < count) {  // someone waits for a thread that will not come
      Thread *waits = nullptr, *missing = nullptr;
      for (Thread& t : block.threads) {
        if (t.state != State::done && !waits) waits = &t;
        if (t.state == State::done || (waits && t.line != waits->line)) missing = &t;
      }
      block.error = std::string("divergent barrier: ") + place(*waits) + " waits at " + waits->what + ", " +
                    waits->file + ":" + std::to_string(waits->line) + ", which " +
                    (missing ? place(*missing) : "another lane") +
                    (missing && missing->state != State::done
                         ? " does not reach: it waits at line " + std::to_string(missing->line)
                         : " never reaches");
      return;
    }
  }
  if (counting)
    for (Warp& warp : block.warps) count_warp(warp.log, WARP);
}

// Runs every block of the grid, one after another; returns nullptr or what went wrong.
inline const char* launch(const char* name, dim3 grid, int threads, std::function<void()> run) {
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  static std::string error;
  if (threads % WARP || threads < 1 || threads > 1024 || grid.y > 65535 || grid.z > 65535)
    return error = std::string(name) + ": a launch of " + std::to_string(threads) + " threads, grid y " +
                   std::to_string(grid.y) + ", z " + std::to_string(grid.z) + " is not possible", error.c_str();
#if defined(__SANITIZE_ADDRESS__)
  __asan_set_error_report_callback([](const char*) { fprintf(stderr, "in %s\n", place(*block.current).c_str()); });
#endif
  run_thread = std::move(run), body = finish_thread;
  block.threads.resize(threads), block.warps.resize(threads / WARP);
  gridDim = grid, blockDim = dim3(threads);
  if (counting) {
    std::string plain(name);  // "(kernel<T, V>)" counts as "kernel"
    plain = plain.substr(plain[0] == '(', plain.find('<') - (plain[0] == '('));
    kernel = &kernels[plain];
    kernel->launches++, kernel->blocks += int64_t(grid.x) * grid.y * grid.z, kernel->threads = threads;
  }
  error.clear();
  for (unsigned z = 0; z < grid.z && error.empty(); z++)
    for (unsigned y = 0; y < grid.y && error.empty(); y++)
      for (unsigned x = 0; x < grid.x && error.empty(); x++) {
        blockIdx = dim3(x, y, z);
        run_block();
        for (SharedArray& s : block.shared) {
#if defined(__SANITIZE_ADDRESS__)
          __asan_unpoison_memory_region(s.memory, (s.bytes + 127) / 128 * 128);
#endif
          free(s.memory);
        }
        block.shared.clear();
        if (!block.error.empty()) error = std::string(name) + ": " + block.error;
      }
  return error.empty() ? nullptr : error.c_str();
}

// Each lane brings a value of up to 48 bytes and may then look at any lane's.
template <class T>
struct Exchange {
  Warp& warp;
  int turn;
  Exchange(const T& mine, const char* what, const char* file, int line)
      : warp(block.warps[block.current->id / WARP]), turn(warp.turn) {
    static_assert(sizeof(T) <= sizeof(warp.slot[0][0]));
    memcpy(warp.slot[turn][block.current->id % WARP], &mine, sizeof(T));
    meet_warp(what, file, line);
  }
  T of(int lane) const {
    T value;
    memcpy(&value, warp.slot[turn][lane], sizeof(T));
    return value;
  }
};

template <class T>
T shuffle(T value, int from, const char* file, int line) {
  if (counting && block.current->id % WARP == 0) kernel->shuffles++;
  return Exchange<T>(value, "a shuffle", file, line).of(from & (WARP - 1));
}

// mma.sync.aligned.m16n8k16.row.col: c (16, 8) += a (16, 16) b (16, 8); a and b half precision, two a register, low first.
// Fragments by the PTX manual (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"), with
// group = lane / 4 and t = lane % 4, element i of a lane's:
//   a  row group + 8·[i & 2 ≠ 0], column 2t + (i & 1) + 8·[i ≥ 4]
//   b  row 2t + (i & 1) + 8·[i ≥ 2], column group
//   c  row group + 8·[i ≥ 2], column 2t + (i & 1)
struct Fragments {
  float a[8], b[4];
};

template <class Half>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*wide)(Half), const char* file,
         int line) {
  auto number = [&](uint32_t word, int high) {
    uint16_t bits = uint16_t(word >> 16 * high);
    Half h;
    memcpy(&h, &bits, 2);
    return wide(h);
  };
  Fragments mine;
  for (int i = 0; i < 8; i++) mine.a[i] = number(a[i / 2], i % 2);
  for (int i = 0; i < 4; i++) mine.b[i] = number(b[i / 2], i % 2);
  if (counting && block.current->id % WARP == 0) kernel->mma++;
  Exchange<Fragments> all(mine, "mma", file, line);
  int group = block.current->id % WARP / 4, t = block.current->id % 4;
  for (int k = 0; k < 16; k++) {
    int holder = k % 8 / 2, i = k % 2 + k / 8 * 4;  // of this k: which t holds it, and where in a
    for (int j = 0; j < 2; j++) {
      float bk = all.of((2 * t + j) * 4 + holder).b[k % 2 + k / 8 * 2];
      for (int half = 0; half < 2; half++) c[half * 2 + j] += all.of(group * 4 + holder).a[i + 2 * half] * bk;
    }
  }
}

}  // namespace minireft::emulator

#define __syncthreads() ((void)minireft::emulator::meet_block(0, __FILE__, __LINE__))
#define __syncthreads_or(predicate) minireft::emulator::meet_block(predicate, __FILE__, __LINE__)
#define __syncwarp() minireft::emulator::meet_warp("__syncwarp", __FILE__, __LINE__)
#define __shfl_sync(mask, v, from) minireft::emulator::shuffle(v, from, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, v, bits) minireft::emulator::shuffle(v, int(threadIdx.x) ^ (bits), __FILE__, __LINE__)

// Half precision, by CUDA's names: storage and rounding to nearest even; the arithmetic is in float.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 h) {
  uint32_t word = uint32_t(h.bits) << 16;
  float f;
  memcpy(&f, &word, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t word;
  memcpy(&word, &f, 4);
  if (f != f) return {0x7FFF};
  return {uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16)};
}
inline float __half2float(__half h) {
  int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float size = exponent == 0    ? std::ldexp(float(fraction), -24)
               : exponent == 31 ? (fraction ? NAN : INFINITY)
                                : std::ldexp(float(1024 + fraction), exponent - 25);
  return h.bits & 0x8000 ? -size : size;
}
inline __half __float2half_rn(float f) {
  uint32_t word;
  memcpy(&word, &f, 4);
  uint16_t sign = word >> 16 & 0x8000;
  float size = std::fabs(f);
  if (f != f) return {0x7FFF};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7C00)};
  if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(std::nearbyint(size * 0x1p24f)))};  // subnormal
  uint32_t rounded = (word & 0x7FFFFFFF) + 0xFFF + (word >> 13 & 1);
  return {uint16_t(sign | (rounded - (112u << 23)) >> 13)};
}

// Arithmetic that must not be contracted: one rounding each, also under -march flags that know FMA.
inline float rounded(float value) {
  volatile float once = value;
  return once;
}
inline float __fmul_rn(float a, float b) { return rounded(a * b); }
inline float __fadd_rn(float a, float b) { return rounded(a + b); }
inline float __fdiv_rn(float a, float b) { return rounded(a / b); }
inline float __fsqrt_rn(float a) { return rounded(std::sqrt(a)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline float cospif(float x) { return float(std::cos(3.141592653589793 * x)); }
inline float sinpif(float x) { return float(std::sin(3.141592653589793 * x)); }
