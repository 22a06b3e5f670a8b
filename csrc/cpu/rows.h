// Which rows of a (B, T, C) stream an edit works on, and with which bank of weights.
// Used by low_rank_edit.cpp alone, which then sees rows one after the other, whatever positions and tasks chose them.
// You should see one group for a plain edit, and one a bank where there are tasks.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "launchers.h"

namespace minireft::cpu {

// The rows of one bank, in order: row i reads and writes where the call's pointers for n[i] say.
struct Group {
  int64_t bank;
  std::vector<int64_t> n;      // empty when the bank takes all rows 0 … count − 1
  int64_t count;
  int64_t operator[](int64_t i) const { return n.empty() ? i : n[i]; }
};

inline std::vector<Group> group_rows(const Edit& e) {
  const int64_t N = e.B * e.P;
  if (!e.positions.data && !e.tasks.data) return {{0, {}, N}};
  std::vector<Group> groups(e.K);
  for (int64_t k = 0; k < e.K; ++k) groups[k].bank = k, groups[k].n.reserve(e.P);
  for (int64_t b = 0, n = 0; b < e.B; ++b)
    for (int64_t p = 0; p < e.P; ++p, ++n) {
      const bool active = !e.positions.data || e.positions.data[b * e.positions.stride_b + p * e.positions.stride_p] >= 0;
      const int64_t k = e.tasks.data ? e.tasks.data[b * e.tasks.stride_b + p * e.tasks.stride_p] : 0;
      if (active && k >= 0) groups[k].n.push_back(n);
    }
  for (Group& g : groups) g.count = g.n.size();
  groups.erase(std::remove_if(groups.begin(), groups.end(), [](const Group& g) { return g.count == 0; }), groups.end());
  return groups;
}

template <class T>
T* row(const Edit& e, const Stream& s, int64_t n) {  // where row n lives in a (B, T, C) tensor
  const int64_t b = n / e.P, p = n % e.P;
  const int64_t t = e.positions.data ? e.positions.data[b * e.positions.stride_b + p * e.positions.stride_p] : p;
  return (T*)s.data + b * s.batch_stride + t * s.token_stride;
}

}  // namespace minireft::cpu
