// The scores' dtypes: widening, which is exact, and rounding to the nearest; host and device code.
#pragma once

#include "noise.h"

namespace topk_fast {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type in which scores of type T are computed with.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

template <class S>
TOPK_FAST_FN S infinity() {
  return (S)__builtin_inf();
}

TOPK_FAST_FN float widen(float x) { return x; }
TOPK_FAST_FN double widen(double x) { return x; }
TOPK_FAST_FN float widen(BFloat16 x) { return Scalar::as_float((int32_t)((uint32_t)x.bits << 16)); }
TOPK_FAST_FN float widen(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Steps that vectorise on every instruction set; no subnormal float is among their operands.
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, body = x.bits & 0x7fffu;
  const uint32_t normal = (body << 13) + (body >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t small = (uint32_t)Scalar::as_int((float)(int32_t)body * 5.9604644775390625e-08f);
  return Scalar::as_float((int32_t)(sign | (body < 0x400u ? small : normal)));
#endif
}

TOPK_FAST_FN void round_to(float x, float* out) { *out = x; }
TOPK_FAST_FN void round_to(double x, double* out) { *out = x; }
TOPK_FAST_FN void round_to(float x, BFloat16* out) {
  const uint32_t b = (uint32_t)Scalar::as_int(x);
  out->bits = (uint16_t)((x == x ? b + 0x7FFF + (b >> 16 & 1) : 0x7FC00000u) >> 16);
}
TOPK_FAST_FN void round_to(float x, Half* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  // The scale makes halves' subnormals float32's, whose addition of half a unit rounds them; large values round as
  // integers do.
  const uint32_t b = (uint32_t)Scalar::as_int(x), sign = b >> 16 & 0x8000u, body = b & 0x7fffffffu;
  uint32_t h;
  if (body >= 0x47800000u) {  // 65536 and above, infinity, NaN
    h = body > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (body < 0x38800000u) {  // below 2^-14
    h = (uint32_t)(Scalar::as_int(Scalar::as_float((int32_t)body) + 0.5f) - 0x3f000000);
  } else {
    h = (body - 0x38000000u + 0xfffu + (body >> 13 & 1)) >> 13;
  }
  out->bits = (uint16_t)(sign | h);
#endif
}

}  // namespace topk_fast
