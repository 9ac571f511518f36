// Floating point and conversions, each rounded as its mnemonic says.
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
inline void extreme_real(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  const uint32_t least = w.predicate(i.ps[0]);
  to_lanes(w, i, [&](int l) {
    const float x = flushed(i, a.real(l)), y = flushed(i, b.real(l));
    if (x == 0 && y == 0) return bits_of(signbit(x) == (bool)(least >> l & 1) ? x : y);
    return bits_of(least >> l & 1 ? fminf(x, y) : fmaxf(x, y));
  });
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

inline double rounded_integer(const Instruction& i, double x) {
  return i.has(Mod::kTRUNC) ? trunc(x) : i.has(Mod::kFLOOR) ? floor(x) : i.has(Mod::kCEIL) ? ceil(x) : nearbyint(x);
}
inline void to_integer(Warp& w, const Instruction& i) {
  const bool from_double = i.has(Mod::kF64), wide = i.has(Mod::kU64) || i.has(Mod::kS64);
  const bool is_unsigned = i.has(Mod::kU32) || i.has(Mod::kU64);
  uint64_t out[kLanes];
  const Source narrow(w, i.src[0]);
  for (int l = 0; l < kLanes; ++l) {
    double x = from_double ? Wide(w, i.src[0]).real(l) : flushed(i, narrow.real(l));
    x = x != x ? 0.0 : rounded_integer(i, x);
    const double least = is_unsigned ? 0.0 : wide ? -0x1p63 : -0x1p31;
    const double end = is_unsigned ? (wide ? 0x1p64 : 0x1p32) : wide ? 0x1p63 : 0x1p31;
    if (x <= least)
      out[l] = is_unsigned ? 0 : wide ? 1ull << 63 : 0x80000000u;
    else if (x >= end)
      out[l] = is_unsigned ? ~0ull : wide ? ~(1ull << 63) : 0x7fffffffu;
    else
      out[l] = is_unsigned ? (uint64_t)x : (uint64_t)(int64_t)x;
  }
  if (wide)
    w.set_wide(i.dst, out);
  else
    to_lanes(w, i, [&](int l) { return (uint32_t)out[l]; });
}

// The source's type is the one that the mnemonic names last, int32 by default.
inline void from_integer(Warp& w, const Instruction& i) {
  const bool wide = i.has(Mod::kU64) || i.has(Mod::kS64), to_double = i.has(Mod::kF64);
  if (i.has(Mod::kF16)) throw Error("I2F to a half");
  const Source narrow(w, i.src[0]);
  const int mode = rounding(i);
  uint64_t out[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    long double x;
    if (wide) {
      const uint64_t n = Wide(w, i.src[0]).integer(l);
      x = i.has(Mod::kU64) ? (long double)n : (long double)(int64_t)n;
    } else {
      uint32_t n = narrow.integer(l);
      if (i.has(Mod::kU16)) n &= 0xffff;
      if (i.has(Mod::kS16)) n = (uint32_t)(int16_t)n;
      if (i.has(Mod::kU8)) n &= 0xff;
      x = i.has(Mod::kU32) ? (long double)n : (long double)(int32_t)n;
    }
    if (to_double) {
      out[l] = bits_of((double)x);
      continue;
    }
    float f = (float)x;
    if (mode == FE_UPWARD && f < x) f = nextafterf(f, INFINITY);
    if (mode == FE_DOWNWARD && f > x) f = nextafterf(f, -INFINITY);
    if (mode == FE_TOWARDZERO && fabsl(f) > fabsl(x)) f = nextafterf(f, 0.0f);
    out[l] = bits_of(f);
  }
  if (to_double)
    w.set_wide(i.dst, out);
  else
    to_lanes(w, i, [&](int l) { return (uint32_t)out[l]; });
}

inline void between_reals(Warp& w, const Instruction& i) {
  const bool to_double = i.src[0].half == 64;  // as sass.py marks the wide destination
  if (to_double) {
    const Source a(w, i.src[0]);
    to_wide_lanes(w, i, [&](int l) { return bits_of((double)a.real(l)); });
  } else {
    const Wide a(w, i.src[0]);
    to_lanes(w, i, [&](int l) { return bits_of((float)a.real(l)); });
  }
}

inline float half_value(uint32_t x) {
  _Float16 h;
  const uint16_t b = (uint16_t)x;
  memcpy(&h, &b, 2);
  return (float)h;
}
// A sum of halves in float32, which is how halves are widened.
inline void widen_halves(Warp& w, const Instruction& i) {
  if (!i.has(Mod::kF32)) throw Error("packed halves");
  const Source a(w, i.src[0]), b(w, i.src[1]);
  const auto value = [](const Source& x, const Operand& o, int l) {
    const float f = half_value(o.half == 2 ? x.raw(l) >> 16 : x.raw(l));
    return o.negative ? -f : f;
  };
  to_lanes(w, i, [&](int l) { return bits_of(value(a, i.src[0], l) + value(b, i.src[1], l)); });
}
inline void pack_halves(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]);
  if (!i.has(Mod::kPACK_AB)) throw Error("F2FP of another kind");
  const auto half = [&](float x) {
    if (i.has(Mod::kBF16)) {
      const uint32_t n = bits_of(x);
      return x != x ? 0x7fffu : (n + 0x7fff + (n >> 16 & 1)) >> 16;
    }
    const _Float16 h = (_Float16)x;
    uint16_t n;
    memcpy(&n, &h, 2);
    return x != x ? 0x7fffu : (uint32_t)n;
  };
  to_lanes(w, i, [&](int l) { return half(a.real(l)) << 16 | half(b.real(l)); });
}
// A product with zero and a constant: a way to write the constant into a register.
inline void constant_of_halves(Warp& w, const Instruction& i) {
  if (i.src[0].reg != kZero || i.src[1].reg != kZero || i.src[2].kind != Kind::kImmediate) throw Error("packed halves");
  to_lanes(w, i, [&](int) { return i.src[2].value; });
}

}  // namespace model
