// Threads for the CPU kernels, without torch: a function pointer that the bindings aim at torch's own thread pool.
// Work is cut into pieces whose number depends on the sizes alone, so results have the same bits on any number of threads.
#pragma once
#include <cstdint>

namespace minireft::cpu {

// Runs body(begin, end, context) over 0 … count − 1, in any order, perhaps at once. On this thread until it is replaced.
inline void (*parallel_for)(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) =
    [](int64_t count, void (*body)(int64_t, int64_t, void*), void* context) { body(0, count, context); };

template <class Body>
void parallel(int64_t count, const Body& body) {  // body(i) for each piece i
  if (count == 1) return body(0);
  if (count > 1)
    parallel_for(count, [](int64_t begin, int64_t end, void* context) {
      for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
    }, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace minireft::cpu
