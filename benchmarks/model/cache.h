// A cache of 128-byte lines in 16 ways that keeps its most recently used lines, 32-byte sectors apart.
#pragma once

#include <stdint.h>

#include <vector>

namespace model {

class Cache {
 public:
  explicit Cache(int64_t bytes) : sets_(bytes < kWays * 128 ? 1 : bytes / (kWays * 128)), ways_(sets_ * kWays) {}

  // Whether a sector is there; afterwards it is. `is_write` marks it as changed.
  bool touch(uint64_t sector, bool is_write = false) {
    const uint64_t line = sector / 4, bit = 1u << sector % 4;
    Way* set = &ways_[(line * 0x9E3779B97F4A7C15u >> 20) % sets_ * kWays];
    Way* way = set;
    for (int i = 0; i < kWays; ++i) {
      if (set[i].line == line && set[i].sectors) {
        way = set + i;
        break;
      }
      if (set[i].used < way->used) way = set + i;
    }
    if (way->line != line) {
      written_back_ += __builtin_popcount(way->changed);
      *way = Way{line};
    }
    const bool hit = way->sectors & bit;
    way->sectors |= bit, way->used = ++now_;
    if (is_write) way->changed |= bit;
    return hit;
  }

  // Sectors that went to memory, with those that still have to.
  int64_t written_back() const {
    int64_t n = written_back_;
    for (const Way& way : ways_) n += __builtin_popcount(way.changed);
    return n;
  }

 private:
  static constexpr int kWays = 16;
  struct Way {
    uint64_t line = ~0ull, used = 0;
    uint32_t sectors = 0, changed = 0;
  };
  int64_t sets_;
  std::vector<Way> ways_;
  uint64_t now_ = 0;
  int64_t written_back_ = 0;
};

}  // namespace model
