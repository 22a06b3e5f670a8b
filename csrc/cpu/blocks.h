// Large results, and sums on the way to them, in memory that is used again: a fresh block costs more in page faults than most kernels in arithmetic.
// take() hands out a kept block of about the right size, or a new one of 2 MiB pages; give() keeps it for the next call.
// You should see 16 MiB come in microseconds where malloc and the first touch take milliseconds; and of equal blocks the one
// that was given last, which is still in cache if anything is.
#pragma once
#include <cstdlib>
#include <deque>
#include <mutex>
#include <unordered_map>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace minireft::cpu {

constexpr size_t LEAST_BLOCK = 1 << 20, KEPT_BYTES = 256 << 20;  // smaller ones are left to malloc; the most that is kept

class Blocks {
 public:
  void* take(size_t bytes) {
    const size_t page = 2 << 20, size = (bytes + page - 1) / page * page;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      auto best = kept_.end();
      for (auto i = kept_.begin(); i != kept_.end(); ++i)
        if (sizes_[*i] >= size && sizes_[*i] <= size + size / 4 && (best == kept_.end() || sizes_[*i] < sizes_[*best]))
          best = i;
      if (best != kept_.end()) {
        void* data = *best;
        kept_bytes_ -= sizes_[data];
        kept_.erase(best);
        return data;
      }
    }
    void* data = std::aligned_alloc(page, size);
    if (!data) return nullptr;
#ifdef __linux__
    madvise(data, size, MADV_HUGEPAGE);
#endif
    std::lock_guard<std::mutex> guard(mutex_);
    sizes_[data] = size;
    return data;
  }

  void give(void* data) {
    std::lock_guard<std::mutex> guard(mutex_);
    kept_.push_front(data);
    kept_bytes_ += sizes_[data];
    while (kept_bytes_ > KEPT_BYTES) {  // the oldest goes first
      void* oldest = kept_.back();
      kept_.pop_back();
      kept_bytes_ -= sizes_[oldest];
      sizes_.erase(oldest);
      std::free(oldest);
    }
  }

 private:
  std::mutex mutex_;
  std::deque<void*> kept_;  // the last given first
  std::unordered_map<void*, size_t> sizes_;
  size_t kept_bytes_ = 0;
};

inline Blocks& blocks() {
  static Blocks* all = new Blocks;  // never destroyed: tensors may outlive every static
  return *all;
}

}  // namespace minireft::cpu
