// The state of a warp, and how instructions read and write it.
#pragma once

#include <string.h>

#include <memory>

#include "cache.h"
#include "isa.h"

namespace model {

enum class Wait { kNone, kConverge, kWarp, kBlock };

// Lanes that run together.
struct Group {
  int32_t at;  // the next instruction
  uint32_t mask;
  Wait wait = Wait::kNone;
  uint32_t waits_for = 0;  // lanes
  int barrier = 0;
};

struct Block;

// Memory that a kernel may touch.
struct Range {
  uint64_t begin, end;
};

struct Warp {
  Block* block;
  int index;
  uint32_t r[kRegisters][kLanes] = {}, p[kPredicates] = {}, converge[16][kLanes] = {};
  uint32_t alive = kAll, exec = 0;  // exec: lanes of this instruction
  std::vector<Group> groups;
  int current = 0;
  int64_t clock = 0, ready[6] = {}, latency = 0;
  std::vector<uint32_t> local;  // [words of the stack, lanes], where something lies there

  Group& group() { return groups[current]; }
  uint32_t predicate(const Predicate& x) const { return x.inverted ? ~p[x.index] : p[x.index]; }
  void set(int to, const uint32_t* values) {
    if (to == kZero || to == kUniformZero) return;
    uint32_t* lanes = r[to];
    for (int l = 0; l < kLanes; ++l) lanes[l] = exec >> l & 1 ? values[l] : lanes[l];
  }
  void set_wide(int to, const uint64_t* values) {
    if (to == kZero || to == kUniformZero) return;
    for (int l = 0; l < kLanes; ++l)
      if (exec >> l & 1) r[to][l] = (uint32_t)values[l], r[to + 1][l] = (uint32_t)(values[l] >> 32);
  }
  void set_uniform(int to, uint32_t value) {
    if (to != kUniformZero)
      for (uint32_t& lane : r[to]) lane = value;
  }
  void set_predicate(const Predicate& to, uint32_t lanes) {
    if (to.index == kTrue || to.index == kUniformTrue) return;
    p[to.index] = (p[to.index] & ~exec) | (lanes & exec);
  }
};

// A block at work and what its warps share.
struct Block {
  const std::vector<Instruction>* code;
  const Machine* machine;
  L2* l2;
  Counts* counts;
  std::vector<char> constants;
  char* shared;  // at a multiple of 4 GiB
  int64_t shared_bytes;
  uint32_t index, grid, size;
  L1 l1;
  std::vector<std::unique_ptr<Warp>> warps;
  const std::vector<Range>* memory;
  Block(const Machine& m, L2* level2) : machine(&m), l2(level2), l1(m.l1_bytes) {}
};

// A source of 32 bits, lane by lane.
class Source {
 public:
  Source(const Warp& w, const Operand& o) : o_(o) {
    if (o.kind == Kind::kRegister) {
      at_ = w.r[o.reg];
    } else {
      uint32_t x = o.value;
      if (o.kind == Kind::kConstant) {
        if (o.value + 4 > w.block->constants.size()) throw Error("a constant outside the bank");
        memcpy(&x, &w.block->constants[o.value], 4);
      }
      for (uint32_t& lane : own_) lane = x;
      at_ = own_;
    }
  }
  uint32_t raw(int l) const { return at_[l]; }
  uint32_t integer(int l) const {
    const uint32_t x = o_.inverted ? ~at_[l] : at_[l];
    return o_.negative ? 0u - x : x;
  }
  // For sums with carries: the negative of x is its complement plus one, whose carry counts.
  uint64_t addend(int l) const { return o_.negative ? (uint64_t)~at_[l] + 1 : o_.inverted ? ~at_[l] : at_[l]; }
  float real(int l) const {
    uint32_t x = at_[l];
    if (o_.absolute) x &= 0x7fffffffu;
    if (o_.negative) x ^= 0x80000000u;
    float f;
    memcpy(&f, &x, 4);
    return f;
  }

 private:
  const Operand& o_;
  const uint32_t* at_;
  uint32_t own_[kLanes];
};

// A source of 64 bits: a pair of registers or constants; 32 bits of an instruction are the upper ones of a double.
class Wide {
 public:
  Wide(const Warp& w, const Operand& o) : o_(o) {
    for (int l = 0; l < kLanes; ++l) {
      if (o.kind == Kind::kRegister) {
        const bool zero = o.reg == kZero || o.reg == kUniformZero;
        x_[l] = zero ? 0 : w.r[o.reg][l] | (uint64_t)w.r[o.reg + 1][l] << 32;
      } else if (o.kind == Kind::kConstant) {
        if (o.value + 8 > w.block->constants.size()) throw Error("a constant outside the bank");
        memcpy(&x_[l], &w.block->constants[o.value], 8);
      } else {
        x_[l] = (uint64_t)o.value << 32;
      }
    }
  }
  uint64_t integer(int l) const {
    const uint64_t x = o_.inverted ? ~x_[l] : x_[l];
    return o_.negative ? 0 - x : x;
  }
  double real(int l) const {
    uint64_t x = x_[l];
    if (o_.absolute) x &= ~(1ull << 63);
    if (o_.negative) x ^= 1ull << 63;
    double f;
    memcpy(&f, &x, 8);
    return f;
  }

 private:
  const Operand& o_;
  uint64_t x_[kLanes];
};

template <class F>
void to_lanes(Warp& w, const Instruction& i, F f) {
  uint32_t out[kLanes];
  for (int l = 0; l < kLanes; ++l) out[l] = f(l);
  w.set(i.dst, out);
}
template <class F>
void to_wide_lanes(Warp& w, const Instruction& i, F f) {
  uint64_t out[kLanes];
  for (int l = 0; l < kLanes; ++l) out[l] = f(l);
  w.set_wide(i.dst, out);
}
template <class F>
uint32_t lanes_where(F f) {
  uint32_t mask = 0;
  for (int l = 0; l < kLanes; ++l) mask |= (uint32_t)(bool)f(l) << l;
  return mask;
}
inline uint32_t bits_of(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  return b;
}
inline float float_of(uint32_t b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}
inline uint64_t bits_of(double x) {
  uint64_t b;
  memcpy(&b, &x, 8);
  return b;
}

}  // namespace model
