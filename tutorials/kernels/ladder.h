// What every rung shares: the rows it is given, and the C names by which ladder.py calls it.
// Included by each v*.cu; g++ -DMINIREFT_EMULATOR compiles it for the emulator, nvcc for a GPU.
// You should see one kernel a rung and nothing else: memory is touched by load and store of csrc/cuda/common.cuh, and so counted.
#pragma once
#include "../../csrc/cuda/common.cuh"

namespace minireft::MINIREFT_BACKEND {

// out = h + upᵀ (down h + bias) for N rows of C floats at rank r, all contiguous.
struct Problem {
  const float *h, *down, *up, *bias;
  float* out;
  int64_t N, C, r;
};

// Four floats in one access where the rows allow it, else one: V of the kernels below.
inline bool by_fours(const Problem& p) { return p.C % 4 == 0 && aligned(p.h) && aligned(p.out) && aligned(p.down) && aligned(p.up); }

// The sum of x over the 32 lanes of a warp, in every lane: five steps, each with the lane that differs in one bit.
DEVICE float over_warp(float x) {
  for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(ALL, x, bit);
  return x;
}

const char* run(const Problem& p, void* stream);  // the rung

}  // namespace minireft::MINIREFT_BACKEND

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT const char* ladder_run(const minireft::MINIREFT_BACKEND::Problem* p, void* stream) {
  return minireft::MINIREFT_BACKEND::run(*p, stream);
}
#if defined(MINIREFT_EMULATOR)
EXPORT void ladder_order(int order, uint64_t seed) {
  minireft::emulator::order = static_cast<minireft::emulator::Order>(order), minireft::emulator::seed = seed ? seed : 1;
}
EXPORT void ladder_count() {
  minireft::emulator::kernels.clear(), minireft::emulator::l2.clear(), minireft::emulator::counting = true;
}
EXPORT int64_t ladder_trace(const minireft::emulator::Event** events) {  // null: from here on; otherwise what happened, and stop
  static std::vector<minireft::emulator::Event> all;
  if (!events) return all.clear(), minireft::emulator::trace = &all, 0;
  return minireft::emulator::trace = nullptr, *events = all.data(), int64_t(all.size());
}
EXPORT const char* ladder_counts() {  // → JSON
  static std::string text;
  minireft::emulator::counting = false, text = minireft::emulator::report();
  return text.c_str();
}
#endif
