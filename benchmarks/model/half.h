// Pairs of halves or bfloat16 numbers in a register.
#pragma once

#include "convert.h"

namespace model {

// One half of a packed operand, the low one for 0.
inline float half_at(const Instruction& i, const Source& x, const Operand& o, int l, int which) {
  const int from = o.half ? o.half - 1 : which;
  const uint32_t bits = x.raw(l) >> 16 * from & 0xffff;
  const float f = i.has(Mod::kBF16_V2) ? float_of(bits << 16) : half_value(bits);
  return o.negative ? -(o.absolute ? fabsf(f) : f) : o.absolute ? fabsf(f) : f;
}
// Comparisons of pairs of halves: into masks (or ones, with BF) of 16 bits, or into two predicates.
template <bool to_predicates>
void compare_halves(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  const uint32_t with = w.predicate(i.ps[0]);
  uint32_t found[2];
  for (int k = 0; k < 2; ++k) {
    const uint32_t here = lanes_where(
        [&](int l) { return compares_real(i, half_at(i, a, i.src[0], l, k), half_at(i, b, i.src[1], l, k)); });
    found[k] = i.has(Mod::kAND) ? here & with : i.has(Mod::kOR) ? here | with : here ^ with;
  }
  if (to_predicates) {
    w.set_predicate(i.pd[0], found[0]), w.set_predicate(i.pd[1], found[1]);
    return;
  }
  const uint32_t yes = !i.has(Mod::kBF) ? 0xffff : i.has(Mod::kBF16_V2) ? 0x3f80 : 0x3c00;
  to_lanes(w, i, [&](int l) { return (found[0] >> l & 1 ? yes : 0) | (found[1] >> l & 1 ? yes << 16 : 0); });
}

// The largest or the smallest of two or three pairs; a number wins over NaN, and +0 is larger than -0.
inline void extreme_halves(Warp& w, const Instruction& i) {
  const Source first(w, i.src[0]);
  const uint32_t least = w.predicate(i.ps[0]);
  float best[2][kLanes];
  for (int k = 0; k < 2; ++k)
    for (int l = 0; l < kLanes; ++l) best[k][l] = half_at(i, first, i.src[0], l, k);
  for (int n = 1; n < i.n_src; ++n) {
    const Source next(w, i.src[n]);
    for (int k = 0; k < 2; ++k)
      for (int l = 0; l < kLanes; ++l)
        best[k][l] = extreme_of(best[k][l], half_at(i, next, i.src[n], l, k), least >> l & 1);
  }
  const bool is_bfloat16 = i.has(Mod::kBF16_V2);
  to_lanes(w, i, [&](int l) { return half_of(best[0][l], is_bfloat16) | half_of(best[1][l], is_bfloat16) << 16; });
}

}  // namespace model
