// The caches: L1, which a block has for itself, and L2, which it shares with all others.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

namespace model {

// Lines of 128 bytes in 16 ways, the most recently used ones, with 32-byte sectors of their own.
class L1 {
 public:
  explicit L1(int64_t bytes) : sets_(bytes < kWays * 128 ? 1 : bytes / (kWays * 128)), ways_(sets_ * kWays) {}

  // Whether a sector is there; afterwards it is.
  bool touch(uint64_t sector) {
    const uint64_t line = sector / 4, bit = 1u << sector % 4;
    Way* set = &ways_[(line * 0x9E3779B97F4A7C15u >> 20) % sets_ * kWays];
    Way* way = set;
    for (int i = 0; i < kWays; ++i) {
      if (set[i].line == line) {
        way = set + i;
        break;
      }
      if (set[i].used < way->used) way = set + i;
    }
    if (way->line != line) *way = Way{line};
    const bool hit = way->sectors & bit;
    way->sectors |= bit, way->used = ++now_;
    return hit;
  }

 private:
  static constexpr int kWays = 16;
  struct Way {
    uint64_t line = ~0ull, used = 0;
    uint32_t sectors = 0;
  };
  int64_t sets_;
  std::vector<Way> ways_;
  uint64_t now_ = 0;
};

// What the whole GPU brought in since a sector was used decides whether it is still there. Its time is in bytes: those
// that all blocks bring in while a block runs for some cycles, at a rate that the caller knows.
class L2 {
 public:
  explicit L2(int64_t bytes) : bytes_((double)bytes) {}

  // What came in before the next launch, and the bytes that come in during a cycle of it.
  void start_launch(double before, double rate) { base_ += before, rate_ = rate; }

  // Whether a sector is there at a cycle of the launch; afterwards it is. `is_write` marks it as changed.
  bool touch(uint64_t sector, int64_t cycle, bool is_write = false) {
    const double now = base_ + rate_ * (double)cycle;
    Sector& s = sectors_[sector];
    const bool hit = s.used >= 0 && now - s.used <= bytes_;
    if (!hit) written_back_ += s.changed, s = Sector{};
    s.used = std::max(s.used, now), s.changed |= is_write;
    return hit;
  }

  // Sectors that went to memory, with those that still have to.
  int64_t written_back() const {
    int64_t n = written_back_;
    for (const auto& each : sectors_) n += each.second.changed;
    return n;
  }

 private:
  struct Sector {
    double used = -1;
    bool changed = false;
  };
  double bytes_, base_ = 0, rate_ = 0;
  std::unordered_map<uint64_t, Sector> sectors_;
  int64_t written_back_ = 0;
};

}  // namespace model
