// A C interface to the emulated launchers and to the emulator's switches, for ctypes: benchmarks/emulator.py builds it.
// The structs are those of csrc/launchers.h, passed by address. Every function returns null or what went wrong.
// You should see kernels run, and be counted, with neither torch's C++ headers nor a GPU.
#include "../launchers.h"
#include "cuda_on_cpu.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
namespace emulated = minireft::emulated;
namespace emulator = minireft::emulator;
using namespace minireft;

EXPORT const char* emulated_low_rank_edit(const Edit* e, const EditForward* f) {
  return emulated::low_rank_edit(*e, *f, nullptr);
}
EXPORT const char* emulated_low_rank_edit_backward(const Edit* e, const EditBackward* f) {
  return emulated::low_rank_edit_backward(*e, *f, nullptr);
}
EXPORT int64_t emulated_low_rank_edit_workspace(const Edit* e) { return emulated::low_rank_edit_workspace(*e); }
EXPORT const char* emulated_scale(const Scale* s, const ScaleForward* f, int count) {
  return emulated::scale(*s, f, count, nullptr);
}
EXPORT const char* emulated_scale_backward(const Scale* s, const ScaleBackward* f, int count) {
  return emulated::scale_backward(*s, f, count, nullptr);
}
EXPORT int64_t emulated_scale_workspace(const Scale* s, int64_t C) { return emulated::scale_workspace(*s, C); }
EXPORT const char* emulated_noisy_embedding(const Noise* n, const NoiseForward* f) {
  return emulated::noisy_embedding(*n, *f, nullptr);
}
EXPORT const char* emulated_noisy_embedding_backward(const Noise* n, const NoiseBackward* f) {
  return emulated::noisy_embedding_backward(*n, *f, nullptr);
}
EXPORT int64_t emulated_noisy_embedding_workspace(const Noise* n) { return emulated::noisy_embedding_workspace(*n); }

// order: 0 forward, 1 reverse, 2 random from this seed.
EXPORT void emulator_set_order(int order, uint64_t seed) {
  emulator::order = static_cast<emulator::Order>(order), emulator::seed = seed ? seed : 1;
}

// Counting starts from nothing, with an empty cache of this many bytes.
EXPORT void emulator_start_counting(int64_t l2_bytes) {
  emulator::kernels.clear(), emulator::l2.clear();
  emulator::l2.capacity = l2_bytes, emulator::counting = true;
}

EXPORT const char* emulator_stop_counting() {  // → JSON
  static std::string text;
  emulator::counting = false, text = emulator::report();
  emulator::l2.clear(), emulator::l2.capacity = 3 << 20;
  return text.c_str();
}
