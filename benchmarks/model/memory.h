// Loads, stores and atomics: what they do, the 32-byte sectors and cycles of the memory that they take.
#pragma once

#include <algorithm>

#include "warp.h"

namespace model {

inline int bytes_of(const Instruction& i) {
  return i.has(Mod::kB128)                      ? 16
         : i.has(Mod::kB64)                     ? 8
         : i.has(Mod::kU16) || i.has(Mod::kS16) ? 2
         : i.has(Mod::kU8) || i.has(Mod::kS8)   ? 1
                                                : 4;
}

inline Range range_of(const std::vector<Range>& memory, uint64_t at, int bytes) {
  for (const Range& r : memory)
    if (at >= r.begin && at + bytes <= r.end) return r;
  throw Error("an address outside this process's memory");
}

// The addresses of a request's lanes on this machine, checked.
struct Request {
  uint64_t at[kLanes];
  uint32_t in_shared = 0, in_memory = 0;

  Request(Warp& w, const Instruction& i, bool is_shared, int bytes) {
    const Block& b = *w.block;
    const Address& a = i.address;
    const uint64_t window = (uint64_t)b.shared;
    Range mapped{0, 0};
    for (int l = 0; l < kLanes; ++l) {
      if (!(w.exec >> l & 1)) continue;
      uint64_t base = a.base == kZero ? 0 : (uint64_t)w.r[a.base][l] * (uint64_t)a.scale;
      if (a.wide && a.base != kZero && a.base != kUniformZero) base |= (uint64_t)w.r[a.base + 1][l] << 32;
      if (a.uniform != kUniformZero) base += w.r[a.uniform][l];
      base += (uint64_t)a.offset;
      at[l] = is_shared ? window + (uint32_t)base : base;
      if (at[l] % bytes) throw Error("an address that is not aligned");
      if (at[l] >= window && at[l] - window <= 0xffffffffu) {
        const int64_t place = (int64_t)(at[l] - window) - b.machine->shared_at;
        if (place < 0 || place + bytes > b.shared_bytes) throw Error("outside the block's shared memory");
        in_shared |= 1u << l;
      } else {
        if (at[l] < mapped.begin || at[l] + bytes > mapped.end) mapped = range_of(*b.memory, at[l], bytes);
        in_memory |= 1u << l;
      }
    }
  }
};

// Different words of one bank are served one after the other; 8 and 16 bytes go by halves and quarters of a warp.
inline int shared_wavefronts(const Request& q, int bytes) {
  const int words = bytes < 4 ? 1 : bytes / 4, lanes = kLanes / words;
  int total = 0;
  for (int first = 0; first < kLanes; first += lanes) {
    std::vector<uint64_t> seen;
    for (int l = first; l < first + lanes; ++l)
      if (q.in_shared >> l & 1)
        for (int k = 0; k < words; ++k) seen.push_back(q.at[l] / 4 + k);
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    int in_bank[32] = {}, most = 0;
    for (uint64_t word : seen) most = std::max(most, ++in_bank[word % 32]);
    total += most;
  }
  return total;
}

enum class Access { kLoad, kStore, kAtomic };

// Counts a request and gives the warp its latency.
inline void account(Warp& w, const Instruction& i, const Request& q, int bytes, Access access) {
  if (!w.exec) return;
  Block& b = *w.block;
  const Machine& m = *b.machine;
  Counts& counts = b.counts[&i - b.code->data()];
  int wavefronts = 0;
  int64_t latency = 0;
  if (q.in_shared) wavefronts += shared_wavefronts(q, bytes), latency = m.shared_latency;
  if (q.in_memory) {
    std::vector<uint64_t> sectors;
    for (int l = 0; l < kLanes; ++l)
      if (q.in_memory >> l & 1 && (sectors.empty() || sectors.back() != q.at[l] / 32)) sectors.push_back(q.at[l] / 32);
    std::sort(sectors.begin(), sectors.end());
    sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
    uint64_t line = ~0ull;
    for (uint64_t sector : sectors) {
      if (sector / 4 != line) line = sector / 4, ++wavefronts;
      if (access == Access::kLoad) {
        ++counts.read;
        latency = std::max(latency, m.l1_latency);
        if (b.l1.touch(sector)) continue;
        const bool hit = b.l2->touch(sector, w.clock);
        ++(hit ? counts.from_l2 : counts.from_memory);
        latency = std::max(latency, hit ? m.l2_latency : m.memory_latency);
      } else {
        ++counts.written;
        b.l2->touch(sector, w.clock, true);
        latency = std::max(latency, m.l2_latency);
      }
    }
  }
  ++counts.requests, counts.wavefronts += wavefronts;
  w.latency = latency + (wavefronts > 1 ? wavefronts - 1 : 0);
}

template <bool is_shared>
void load(Warp& w, const Instruction& i) {
  const int bytes = bytes_of(i);
  const Request q(w, i, is_shared, bytes);
  for (int l = 0; l < kLanes; ++l) {
    if (!(w.exec >> l & 1)) continue;
    uint32_t x[4] = {};
    memcpy(x, (const void*)q.at[l], bytes);
    if (i.has(Mod::kS16)) x[0] = (uint32_t)(int16_t)x[0];
    if (i.has(Mod::kS8)) x[0] = (uint32_t)(int8_t)x[0];
    if (i.dst == kZero) continue;
    for (int k = 0; k < (bytes + 3) / 4; ++k) w.r[i.dst + k][l] = x[k];
  }
  account(w, i, q, bytes, Access::kLoad);
}

template <bool is_shared>
void store(Warp& w, const Instruction& i) {
  const int bytes = bytes_of(i);
  const Request q(w, i, is_shared, bytes);
  const int from = i.src[0].reg;
  for (int l = 0; l < kLanes; ++l) {
    if (!(w.exec >> l & 1)) continue;
    uint32_t x[4] = {};
    for (int k = 0; k < 4 && from != kZero && from != kUniformZero; ++k)
      if (k < (bytes + 3) / 4) x[k] = w.r[from + k][l];
    memcpy((void*)q.at[l], x, bytes);
  }
  account(w, i, q, bytes, Access::kStore);
}

// A thread's own memory, where registers are spilled; a request takes a wavefront for each word of the lanes.
template <class F>
void locally(Warp& w, const Instruction& i, F access) {
  const int words = bytes_of(i) / 4;
  for (int l = 0; l < kLanes; ++l) {
    if (!(w.exec >> l & 1)) continue;
    const uint32_t at = w.r[i.address.base][l] + (uint32_t)i.address.offset;
    if (at % 4 || at + 4 * words > kStack) throw Error("outside the thread's stack");
    w.local.resize(kStack / 4 * kLanes);
    for (int k = 0; k < words; ++k) access(w.local[(at / 4 + k) * kLanes + l], l, k);
  }
  Counts& counts = w.block->counts[&i - w.block->code->data()];
  if (w.exec) ++counts.requests, counts.wavefronts += words, w.latency = w.block->machine->l1_latency;
}
inline void local_load(Warp& w, const Instruction& i) {
  locally(w, i, [&](uint32_t x, int l, int k) { w.r[i.dst + k][l] = x; });
}
inline void local_store(Warp& w, const Instruction& i) {
  const int from = i.src[0].reg;
  locally(w, i, [&](uint32_t& x, int l, int k) { x = from == kZero ? 0 : w.r[from + k][l]; });
}

template <bool is_shared>
void atomic(Warp& w, const Instruction& i) {
  if (bytes_of(i) != 4) throw Error("an atomic of another size");
  const Request q(w, i, is_shared, 4);
  const Source a(w, i.src[0]);
  for (int l = 0; l < kLanes; ++l) {
    if (!(w.exec >> l & 1)) continue;
    uint32_t before, after;
    memcpy(&before, (const void*)q.at[l], 4);
    const uint32_t x = a.raw(l);
    const bool less = i.has(Mod::kS32) ? (int32_t)before < (int32_t)x : before < x;
    if (i.has(Mod::kADD))
      after = before + x;
    else if (i.has(Mod::kMIN))
      after = less ? before : x;
    else if (i.has(Mod::kMAX))
      after = less ? x : before;
    else if (i.has(Mod::kAND) || i.has(Mod::kOR) || i.has(Mod::kXOR))
      after = i.has(Mod::kAND) ? before & x : i.has(Mod::kOR) ? before | x : before ^ x;
    else if (i.has(Mod::kEXCH))
      after = x;
    else
      throw Error("an atomic of another kind");
    memcpy((void*)q.at[l], &after, 4);
    if (i.dst != kZero) w.r[i.dst][l] = before;
  }
  account(w, i, q, 4, Access::kAtomic);
}

// Constants; the place may depend on the lane.
inline void load_constant(Warp& w, const Instruction& i) {
  const int bytes = bytes_of(i);
  const std::vector<char>& bank = w.block->constants;
  for (int l = 0; l < kLanes; ++l) {
    if (!(w.exec >> l & 1) || i.dst == kZero || i.dst == kUniformZero) continue;
    const uint32_t at = i.src[0].value + (i.src[0].reg == kZero ? 0 : w.r[i.src[0].reg][l]);
    if ((size_t)at + bytes > bank.size()) throw Error("a constant outside the bank");
    uint32_t x[4] = {};
    memcpy(x, &bank[at], bytes);
    for (int k = 0; k < (bytes + 3) / 4; ++k) w.r[i.dst + k][l] = x[k];
  }
}

}  // namespace model
