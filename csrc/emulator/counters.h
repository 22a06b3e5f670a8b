// What a kernel costs, counted: sectors, coalescing, bank conflicts, barriers, shuffles, tensor-core steps, arithmetic.
// Switched on by `counting`; filled by cuda_on_cpu.h; printed as JSON by report(), which `minireft profile` reads.
// You should see the same numbers on every run and every machine: nothing here is timed.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace minireft::emulator {

constexpr int SECTOR = 32, BANKS = 32;

// Least-recently-used cache of 32-byte sectors in front of device memory, the model behind `bytes`: empty at the start;
// a read that misses moves a sector in; a written sector moves out when it is evicted, or at the end. Sectors whose latest
// access was load_last or store_last go before all others (PTX: "allocated with evict-first policy"). Reads of a sector
// that is only partly written are not modelled (L2 keeps byte masks), and there is no L1: blocks run one after another.
class Cache {
 public:
  int64_t capacity = 3 << 20, read = 0, written = 0;  // bytes; the default is an RTX 3060's L2

  bool access(uint64_t sector, bool store, bool last) {  // → did it have to be read from memory
    auto [it, missed] = where.try_emplace(sector, 0);
    if (missed) {
      if (!store) read += SECTOR;
      if (int64_t(where.size()) * SECTOR > capacity) evict();
      it->second = unused.empty() ? grow() : take();
      entries[it->second] = {sector, -1, -1, store, last};
    } else {
      unlink(it->second);
      entries[it->second].dirty |= store, entries[it->second].last = last;
    }
    push_front(it->second);
    return missed && !store;
  }

  int64_t moved() const {  // with what is still to be written back
    int64_t waiting = 0;
    for (auto& [sector, i] : where) waiting += entries[i].dirty * SECTOR;
    return read + written + waiting;
  }

  void clear() { where.clear(), entries.clear(), unused.clear(), kept = leaving = {}, read = written = 0; }

 private:
  struct Entry {
    uint64_t sector;
    int newer, older;
    bool dirty, last;
  };
  struct List {
    int head = -1, tail = -1;
  };
  std::unordered_map<uint64_t, int> where;
  std::vector<Entry> entries;
  std::vector<int> unused;
  List kept, leaving;  // those of `leaving` are evicted first

  int grow() { return entries.emplace_back(), int(entries.size()) - 1; }
  int take() { int i = unused.back(); return unused.pop_back(), i; }
  List& list_of(int i) { return entries[i].last ? leaving : kept; }
  void unlink(int i) {
    Entry& e = entries[i];
    (e.newer < 0 ? list_of(i).head : entries[e.newer].older) = e.older;
    (e.older < 0 ? list_of(i).tail : entries[e.older].newer) = e.newer;
  }
  void push_front(int i) {
    List& list = list_of(i);
    entries[i].newer = -1, entries[i].older = list.head;
    (list.head < 0 ? list.tail : entries[list.head].newer) = i;
    list.head = i;
  }
  void evict() {
    int i = leaving.tail < 0 ? kept.tail : leaving.tail;
    written += entries[i].dirty * SECTOR;
    unlink(i), where.erase(entries[i].sector), unused.push_back(i);
  }
};

struct Access {  // one lane's part of one instruction
  const char* file;
  int line;
  bool store, last, shared;
  uintptr_t address;
  int bytes, lane;
};

struct Site {  // one source line's loads or stores, over all warps
  int64_t instructions = 0, bytes = 0, sectors = 0, fetched = 0, full = 0, conflicts = 0;
};

struct Kernel {
  int64_t launches = 0, blocks = 0, threads = 0, barriers = 0, shuffles = 0, mma = 0, fma = 0, special = 0;
  std::map<std::tuple<std::string, int, bool, bool>, Site> sites;  // file, line, store, shared
};

struct Event {  // one step of one thread, in the order in which they ran: an access, or the arrival at a barrier (bytes 0)
  int64_t block, thread, line, store, shared, address, bytes;
};

inline std::vector<Event>* trace = nullptr;  // filled while it is set
inline bool counting = false;
inline Cache l2;
inline std::map<std::string, Kernel> kernels;
inline Kernel* kernel = nullptr;  // the one that runs

// One instruction of one warp: what its lanes touched.
inline void count_instruction(const std::vector<const Access*>& lanes) {
  const Access& first = *lanes[0];
  Site& site = kernel->sites[{first.file, first.line, first.store, first.shared}];
  site.instructions++;
  if (first.shared) {  // 4 bytes a lane go in one pass, 8 in two, 16 in four; in a pass a bank gives one word
    int group = 32 * 4 / std::max(first.bytes, 4);
    for (size_t i = 0; i < lanes.size();) {
      std::vector<uintptr_t> words[BANKS];
      size_t passes = 1;
      for (int pass = lanes[i]->lane / group; i < lanes.size() && lanes[i]->lane / group == pass; i++)
        for (uintptr_t w = lanes[i]->address / 4; w <= (lanes[i]->address + first.bytes - 1) / 4; w++) {
          auto& bank = words[w % BANKS];
          if (std::find(bank.begin(), bank.end(), w) == bank.end()) bank.push_back(w);
          passes = std::max(passes, bank.size());
        }
      site.conflicts += passes - 1;
    }
  } else {
    std::vector<std::pair<uint64_t, uint32_t>> touched;  // sector, mask of its bytes
    for (const Access* lane : lanes)
      for (uintptr_t a = lane->address, end = a + lane->bytes; a < end;) {
        uintptr_t next = std::min<uintptr_t>(end, (a / SECTOR + 1) * SECTOR);
        uint32_t mask = uint32_t(((uint64_t(1) << (next - a)) - 1) << (a % SECTOR));
        touched.emplace_back(a / SECTOR, mask), a = next;
      }
    std::sort(touched.begin(), touched.end());
    int64_t sectors = 0, distinct = 0;
    for (size_t i = 0; i < touched.size();) {
      uint32_t mask = 0;
      uint64_t sector = touched[i].first;
      for (; i < touched.size() && touched[i].first == sector; i++) mask |= touched[i].second;
      sectors++, distinct += __builtin_popcount(mask);
      site.fetched += l2.access(sector, first.store, first.last);
    }
    site.bytes += distinct, site.sectors += sectors;
    // Fully coalesced: 16 bytes a lane, and no more sectors than the bytes need.
    site.full += first.bytes == 16 && sectors == (distinct + SECTOR - 1) / SECTOR;
  }
}

// What the lanes of a warp did since they last met: the k-th access of a line, over the lanes, is one instruction.
inline void count_warp(std::vector<Access>* lanes, int count) {
  std::map<std::tuple<int, const char*, int, bool, bool>, size_t> index;
  std::vector<std::vector<const Access*>> instructions;
  bool uniform = true;  // the usual case, and much the faster one: every lane took the same way
  for (int i = 1; i < count && uniform; i++) {
    uniform = lanes[i].size() == lanes[0].size();
    for (size_t k = 0; uniform && k < lanes[0].size(); k++)
      uniform = lanes[i][k].line == lanes[0][k].line && lanes[i][k].file == lanes[0][k].file &&
                lanes[i][k].store == lanes[0][k].store;
  }
  if (uniform) {
    instructions.resize(lanes[0].size());
    for (size_t k = 0; k < lanes[0].size(); k++)
      for (int i = 0; i < count; i++) instructions[k].push_back(&lanes[i][k]);
  } else {
    for (int i = 0; i < count; i++) {
      std::map<std::tuple<const char*, int, bool, bool>, int> seen;
      for (const Access& a : lanes[i]) {
        int k = seen[{a.file, a.line, a.store, a.shared}]++;
        auto [it, fresh] = index.try_emplace({k, a.file, a.line, a.store, a.shared}, instructions.size());
        if (fresh) instructions.emplace_back();
        instructions[it->second].push_back(&a);
      }
    }
  }
  for (auto& instruction : instructions) count_instruction(instruction);
  for (int i = 0; i < count; i++) lanes[i].clear();
}

inline std::string report() {
  auto number = [](const char* name, int64_t value) {
    return "\"" + std::string(name) + "\": " + std::to_string(value);
  };
  std::string out = "{" + number("bytes", l2.moved()) + ", \"kernels\": [";
  for (auto& [name, k] : kernels) {
    out += std::string(out.back() == '[' ? "" : ", ") + "{\"name\": \"" + name + "\", " +
           number("launches", k.launches) + ", " + number("blocks", k.blocks) + ", " + number("threads", k.threads) +
           ", " + number("barriers", k.barriers) + ", " + number("shuffles", k.shuffles) + ", " + number("mma", k.mma) +
           ", " + number("fma", k.fma) + ", " + number("special", k.special) + ", \"sites\": [";
    for (auto& [where, s] : k.sites) {
      auto& [file, line, store, shared] = where;
      out += std::string(out.back() == '[' ? "" : ", ") + "{\"file\": \"" + file + "\", " + number("line", line) +
             ", " + number("store", store) + ", " + number("shared", shared) + ", " +
             number("instructions", s.instructions) + ", " + number("bytes", s.bytes) + ", " +
             number("sectors", s.sectors) + ", " + number("fetched", s.fetched) + ", " + number("full", s.full) + ", " +
             number("conflicts", s.conflicts) + "}";
    }
    out += "]}";
  }
  return out + "]}";
}

}  // namespace minireft::emulator
