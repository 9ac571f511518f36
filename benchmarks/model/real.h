// Floating point, each step rounded as its mnemonic says.
#pragma once

#include <fenv.h>
#include <math.h>

#include "integer.h"

namespace model {

// Numbers below the normal ones are zero where FTZ says so.
inline float flushed(const Instruction& i, float x) {
  return i.has(Mod::kFTZ) && fpclassify(x) == FP_SUBNORMAL ? copysignf(0.0f, x) : x;
}

inline int rounding(const Instruction& i) {
  return i.has(Mod::kRZ) ? FE_TOWARDZERO : i.has(Mod::kRP) ? FE_UPWARD : i.has(Mod::kRM) ? FE_DOWNWARD : FE_TONEAREST;
}

template <class T>
__attribute__((noinline, optimize("rounding-math"))) T fused(T a, T b, T c, int mode) {
  if (mode == FE_TONEAREST) return fma(a, b, c);
  volatile T x = a, y = b, z = c;
  fesetround(mode);
  volatile T out = fma(x, y, z);
  fesetround(FE_TONEAREST);
  return out;
}

enum class Step { kAdd, kMultiply, kFused };
template <Step step>
void arithmetic(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]), c(w, i.src[step == Step::kFused ? 2 : 1]);
  const int mode = rounding(i);
  to_lanes(w, i, [&](int l) {
    const float x = flushed(i, a.real(l)), y = flushed(i, b.real(l)), z = flushed(i, c.real(l));
    float out;
    if (mode == FE_TONEAREST && step != Step::kFused)
      out = step == Step::kAdd ? x + y : x * y;
    else
      out = step == Step::kAdd ? fused(x, 1.0f, y, mode) : fused(x, y, step == Step::kFused ? z : -0.0f, mode);
    return bits_of(flushed(i, out));
  });
}
template <Step step>
void wide_arithmetic(Warp& w, const Instruction& i) {
  const Wide a(w, i.src[0]), b(w, i.src[1]), c(w, i.src[step == Step::kFused ? 2 : 1]);
  const int mode = rounding(i);
  to_wide_lanes(w, i, [&](int l) {
    const double x = a.real(l), y = b.real(l), z = c.real(l);
    return bits_of(step == Step::kAdd        ? fused(x, 1.0, y, mode)
                   : step == Step::kMultiply ? fused(x, y, -0.0, mode)
                                             : fused(x, y, z, mode));
  });
}

template <class T>
bool compares_real(const Instruction& i, T a, T b) {
  const bool unordered = a != a || b != b;
  if (i.has(Mod::kNUM)) return !unordered;
  if (i.has(Mod::kNAN)) return unordered;
  if (i.has(Mod::kLTU)) return unordered || a < b;
  if (i.has(Mod::kEQU)) return unordered || a == b;
  if (i.has(Mod::kLEU)) return unordered || a <= b;
  if (i.has(Mod::kGTU)) return unordered || a > b;
  if (i.has(Mod::kNEU)) return unordered || a < b || a > b;
  if (i.has(Mod::kGEU)) return unordered || a >= b;
  return compares(i, a, b);
}
inline void compare_real(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  set_compared(w, i,
               lanes_where([&](int l) { return compares_real(i, flushed(i, a.real(l)), flushed(i, b.real(l))); }));
}
inline void compare_wide(Warp& w, const Instruction& i) {
  const Wide a(w, i.src[0]), b(w, i.src[1]);
  set_compared(w, i, lanes_where([&](int l) { return compares_real(i, a.real(l), b.real(l)); }));
}

inline void select_real(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  const uint32_t takes = w.predicate(i.ps[0]);
  to_lanes(w, i, [&](int l) { return bits_of(takes >> l & 1 ? a.real(l) : b.real(l)); });
}
inline float extreme_of(float x, float y, bool least) {
  if (x == 0 && y == 0) return signbit(x) == least ? x : y;
  return least ? fminf(x, y) : fmaxf(x, y);
}
inline void extreme_real(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  const uint32_t least = w.predicate(i.ps[0]);
  to_lanes(w, i,
           [&](int l) { return bits_of(extreme_of(flushed(i, a.real(l)), flushed(i, b.real(l)), least >> l & 1)); });
}

// The special functions; a device's last bits may differ, and what divides or takes a root with them corrects that.
inline void special_function(Warp& w, const Instruction& i) {
  if (i.has(Mod::kRCP64H)) {
    const Source a(w, i.src[0]);
    to_lanes(w, i, [&](int l) {
      const uint64_t high = (uint64_t)a.raw(l) << 32;
      double x;
      memcpy(&x, &high, 8);
      return (uint32_t)(bits_of(1.0 / x) >> 32);
    });
    return;
  }
  const Source a(w, i.src[0]);
  to_lanes(w, i, [&](int l) {
    double x = a.real(l);
    if (fpclassify((float)x) == FP_SUBNORMAL) x = copysign(0.0, x);
    const double y = i.has(Mod::kRCP)    ? 1.0 / x
                     : i.has(Mod::kRSQ)  ? 1.0 / sqrt(x)
                     : i.has(Mod::kSQRT) ? sqrt(x)
                     : i.has(Mod::kEX2)  ? exp2(x)
                                         : log2(x);
    const float out = (float)y;
    return bits_of(fpclassify(out) == FP_SUBNORMAL ? copysignf(0.0f, out) : out);
  });
}

// Whether a / b needs the slow way: an exponent near its ends, of an operand or of the quotient. The bounds are
// assumed; the slow way is right everywhere.
inline void check_division(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  w.set_predicate(i.pd[0], lanes_where([&](int l) {
                    const int x = bits_of(a.real(l)) >> 23 & 255, y = bits_of(b.real(l)) >> 23 & 255;
                    return x <= 24 || x == 255 || y == 0 || y >= 253 || x - y >= 125 || x - y <= -124;
                  }));
}

}  // namespace model
