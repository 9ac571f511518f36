// Integer, logical and predicate instructions.
#pragma once

#include "warp.h"

namespace model {

inline void move(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]);
  to_lanes(w, i, [&](int l) { return a.integer(l); });
}

// a + b + c, with up to two carries in and out.
inline void add(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  Operand none{};
  none.kind = Kind::kImmediate;
  const Source c(w, i.n_src > 2 ? i.src[2] : none);
  uint32_t in[2] = {0, 0}, first = 0, second = 0;
  for (int k = 0; k < i.n_ps; ++k) in[k] = w.predicate(i.ps[k]);
  to_lanes(w, i, [&](int l) {
    const uint64_t sum = a.addend(l) + b.addend(l) + c.addend(l) + (in[0] >> l & 1) + (in[1] >> l & 1);
    first |= (uint32_t)(sum >> 32 >= 1) << l, second |= (uint32_t)(sum >> 32 >= 2) << l;
    return (uint32_t)sum;
  });
  if (i.n_pd > 0) w.set_predicate(i.pd[0], first);
  if (i.n_pd > 1) w.set_predicate(i.pd[1], second);
}

inline void multiply_add(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  const bool is_unsigned = i.has(Mod::kU32);
  const uint32_t in = i.n_ps ? w.predicate(i.ps[0]) : 0;
  const auto product = [&](int l) {
    return is_unsigned ? (uint64_t)a.integer(l) * b.integer(l)
                       : (uint64_t)((int64_t)(int32_t)a.integer(l) * (int32_t)b.integer(l));
  };
  if (!i.has(Mod::kWIDE) && !i.has(Mod::kHI)) {
    const Source c(w, i.src[2]);
    to_lanes(w, i, [&](int l) { return a.integer(l) * b.integer(l) + c.integer(l) + (in >> l & 1); });
    if (i.n_pd) throw Error("IMAD with a carry out");
    return;
  }
  if (i.src[2].kind == Kind::kImmediate) throw Error("IMAD.WIDE with an immediate addend");
  const Wide c(w, i.src[2]);
  uint32_t carry = 0;
  uint64_t sums[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const unsigned __int128 sum = (unsigned __int128)product(l) + c.integer(l) + (in >> l & 1);
    sums[l] = (uint64_t)sum, carry |= (uint32_t)(sum >> 64 & 1) << l;
  }
  if (i.n_pd && !is_unsigned) throw Error("a signed IMAD.WIDE with a carry out");
  if (i.has(Mod::kHI))
    to_lanes(w, i, [&](int l) { return (uint32_t)(sums[l] >> 32); });
  else
    w.set_wide(i.dst, sums);
  if (i.n_pd) w.set_predicate(i.pd[0], carry);
}

// (a << s) + b, or of the upper half: (c:a) << s.
inline void shift_add(Warp& w, const Instruction& i) {
  const bool high = i.has(Mod::kHI), extends = i.has(Mod::kSX32), has_c = high && !extends;
  const Source a(w, i.src[0]), b(w, i.src[1]), c(w, i.src[has_c ? 2 : 0]), s(w, i.src[has_c ? 3 : 2]);
  const uint32_t in = i.n_ps ? w.predicate(i.ps[0]) : 0;
  uint32_t carry = 0;
  to_lanes(w, i, [&](int l) {
    const uint32_t low = a.raw(l), by = s.raw(l) & 31;
    const uint32_t top = extends ? (uint32_t)((int32_t)low >> 31) : c.raw(l);
    uint64_t x = high ? (uint32_t)(((uint64_t)top << 32 | low) << by >> 32) : low << by;
    if (i.src[0].negative) x = (uint64_t)~(uint32_t)x + 1;
    if (i.src[0].inverted) x = ~(uint32_t)x;
    const uint64_t sum = x + b.addend(l) + (in >> l & 1);
    carry |= (uint32_t)(sum >> 32) << l;
    return (uint32_t)sum;
  });
  if (i.n_pd) w.set_predicate(i.pd[0], carry);
}

// A shift of the 64 bits (c:a), of which one half is kept.
inline void shift(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), s(w, i.src[1]), c(w, i.src[2]);
  const bool left = i.has(Mod::kL), high = i.has(Mod::kHI), is_signed = i.has(Mod::kS32) || i.has(Mod::kS64);
  const uint32_t most = i.has(Mod::kU64) || i.has(Mod::kS64) ? 63 : 32;
  to_lanes(w, i, [&](int l) {
    const uint64_t x = (uint64_t)c.integer(l) << 32 | a.integer(l);
    uint32_t by = s.integer(l);
    by = i.has(Mod::kW) ? by & (most == 63 ? 63 : 31) : by < most ? by : most;
    const uint64_t y = left ? x << by : is_signed ? (uint64_t)((int64_t)x >> by) : x >> by;
    return (uint32_t)(high ? y >> 32 : y);
  });
}

inline uint32_t look_up(uint32_t table, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int k = 0; k < 8; ++k)
    if (table >> k & 1) out |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return out;
}

inline void logic(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]), c(w, i.src[2]);
  const uint32_t table = i.src[3].value;
  uint32_t some = 0;
  to_lanes(w, i, [&](int l) {
    const uint32_t x = look_up(table, a.integer(l), b.integer(l), c.integer(l));
    some |= (uint32_t)(x != 0) << l;
    return x;
  });
  const uint32_t in = i.n_ps ? w.predicate(i.ps[0]) : 0;
  if (i.n_pd) w.set_predicate(i.pd[0], i.has(Mod::kPAND) ? some & in : some | in);
}

// Two functions of three predicates: pd[k] by the table in src[k].
inline void predicate_logic(Warp& w, const Instruction& i) {
  uint32_t in[3];
  for (int k = 0; k < 3; ++k) in[k] = w.predicate(i.ps[k]);
  const uint32_t first = look_up(i.src[0].value, in[0], in[1], in[2]);
  const uint32_t second = look_up(i.src[1].value, in[0], in[1], in[2]);
  w.set_predicate(i.pd[0], first), w.set_predicate(i.pd[1], second);
}

inline void select(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  const uint32_t takes = w.predicate(i.ps[0]);
  to_lanes(w, i, [&](int l) { return takes >> l & 1 ? a.integer(l) : b.integer(l); });
}

template <class T>
bool compares(const Instruction& i, T a, T b) {
  return (i.has(Mod::kLT) && a < b) || (i.has(Mod::kEQ) && a == b) || (i.has(Mod::kLE) && a <= b) ||
         (i.has(Mod::kGT) && a > b) || (i.has(Mod::kNE) && a < b) || (i.has(Mod::kNE) && a > b) ||
         (i.has(Mod::kGE) && a >= b);
}

inline void set_compared(Warp& w, const Instruction& i, uint32_t found) {
  const uint32_t with = w.predicate(i.ps[0]);
  const auto joined = [&](uint32_t x) { return i.has(Mod::kAND) ? x & with : i.has(Mod::kOR) ? x | with : x ^ with; };
  const uint32_t yes = joined(found), no = joined(~found);
  w.set_predicate(i.pd[0], yes), w.set_predicate(i.pd[1], no);
}

// EX: the upper halves, where the lower ones compared as ps[1] says.
inline void compare(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  const bool is_unsigned = i.has(Mod::kU32), extends = i.has(Mod::kEX);
  const bool strict = i.has(Mod::kEQ);
  const uint32_t low = extends ? w.predicate(i.ps[1]) : 0;
  set_compared(w, i, lanes_where([&](int l) {
                 const int64_t x = is_unsigned ? (int64_t)a.integer(l) : (int32_t)a.integer(l);
                 const int64_t y = is_unsigned ? (int64_t)b.integer(l) : (int32_t)b.integer(l);
                 if (!extends) return compares(i, x, y);
                 if (x == y) return (bool)(low >> l & 1);
                 return !strict && compares(i, x, y);
               }));
}

inline void extreme(Warp& w, const Instruction& i, bool adds, int n) {
  const Source a(w, i.src[0]), b(w, i.src[1]), c(w, i.src[n - 1]);
  uint32_t least = w.predicate(i.ps[0]);
  for (int k = 1; k < i.n_ps; ++k)
    if (w.predicate(i.ps[k]) != least) throw Error("two extremes of different kinds");
  const auto better = [&](uint32_t x, uint32_t y, bool min) {
    const bool less = i.has(Mod::kU32) ? x < y : (int32_t)x < (int32_t)y;
    return less == min ? x : y;
  };
  to_lanes(w, i, [&](int l) {
    const bool min = least >> l & 1;
    if (adds) return better(a.integer(l) + b.integer(l), c.integer(l), min);
    const uint32_t x = better(a.integer(l), b.integer(l), min);
    return n == 3 ? better(x, c.integer(l), min) : x;
  });
}
inline void extreme_of_two(Warp& w, const Instruction& i) { extreme(w, i, false, 2); }
inline void extreme_of_three(Warp& w, const Instruction& i) { extreme(w, i, false, 3); }
inline void extreme_of_sum(Warp& w, const Instruction& i) { extreme(w, i, true, 3); }

inline void permute(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), s(w, i.src[1]), c(w, i.src[2]);
  to_lanes(w, i, [&](int l) {
    const uint64_t bytes = (uint64_t)c.raw(l) << 32 | a.raw(l);
    uint32_t out = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t which = s.raw(l) >> 4 * k & 15;
      uint32_t byte = bytes >> 8 * (which & 7) & 255;
      if (which & 8) byte = byte & 128 ? 255 : 0;
      out |= byte << 8 * k;
    }
    return out;
  });
}

inline void count_bits(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]);
  to_lanes(w, i, [&](int l) { return (uint32_t)__builtin_popcount(a.integer(l)); });
}
inline void leading(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]);
  to_lanes(w, i, [&](int l) {
    uint32_t x = a.integer(l);
    if (!i.has(Mod::kU32) && (int32_t)x < 0) x = ~x;
    if (!x) return kAll;
    const uint32_t zeros = (uint32_t)__builtin_clz(x);
    return i.has(Mod::kSH) ? zeros : 31 - zeros;
  });
}
inline void reverse_bits(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]);
  to_lanes(w, i, [&](int l) {
    uint32_t x = a.integer(l), out = 0;
    for (int k = 0; k < 32; ++k) out |= (x >> k & 1) << (31 - k);
    return out;
  });
}
inline void magnitude(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]);
  to_lanes(w, i, [&](int l) { return (int32_t)a.integer(l) < 0 ? 0u - a.integer(l) : a.integer(l); });
}

// The predicates as a number, and back.
inline void from_predicates(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]);
  const uint32_t mask = i.src[1].value;
  to_lanes(w, i, [&](int l) {
    uint32_t x = 0;
    for (int k = 0; k < 7; ++k) x |= (w.p[k] >> l & 1) << k;
    return (x & mask) | (a.raw(l) & ~mask);
  });
}
inline void to_predicates(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]);
  for (int k = 0; k < 7; ++k)
    if (i.src[1].value >> k & 1) w.set_predicate({k, 0}, lanes_where([&](int l) { return a.raw(l) >> k & 1; }));
}

}  // namespace model
