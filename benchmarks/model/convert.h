// Conversions between integers, floats and halves.
#pragma once

#include "real.h"

namespace model {

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

inline float half_value(uint32_t x) {
  _Float16 h;
  const uint16_t b = (uint16_t)x;
  memcpy(&h, &b, 2);
  return (float)h;
}
inline uint32_t half_of(float x, bool is_bfloat16) {
  if (is_bfloat16) {
    const uint32_t n = bits_of(x);
    return x != x ? 0x7fffu : (n + 0x7fff + (n >> 16 & 1)) >> 16;
  }
  const _Float16 h = (_Float16)x;
  uint16_t n;
  memcpy(&n, &h, 2);
  return x != x ? 0x7fffu : n;
}

// Between float types; sass.py marks a wide result.
inline void between_reals(Warp& w, const Instruction& i) {
  const bool to_half = i.has(Mod::kF16) && !i.has(Mod::kF64);
  if (i.src[0].half == 64 || to_half) {
    const Source a(w, i.src[0]);
    if (to_half)
      to_lanes(w, i, [&](int l) { return half_of(a.real(l), false); });
    else
      to_wide_lanes(w, i, [&](int l) { return bits_of((double)a.real(l)); });
  } else {
    const Wide a(w, i.src[0]);
    to_lanes(w, i, [&](int l) { return bits_of((float)a.real(l)); });
  }
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
  const bool bf = i.has(Mod::kBF16);
  to_lanes(w, i, [&](int l) { return half_of(a.real(l), bf) << 16 | half_of(b.real(l), bf); });
}

// A product with zero and a constant: a way to write the constant into a register.
inline void constant_of_halves(Warp& w, const Instruction& i) {
  if (i.src[0].reg != kZero || i.src[1].reg != kZero || i.src[2].kind != Kind::kImmediate) throw Error("packed halves");
  to_lanes(w, i, [&](int) { return i.src[2].value; });
}

}  // namespace model
