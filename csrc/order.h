// Integers in the order of floats: -0 equals +0, and nothing but NaN lies below -inf. Host and device code.
#pragma once

#include "noise.h"

namespace topk_fast {

TOPK_FAST_FN int32_t ordered(float x) {
  const int32_t b = Scalar::as_int(x + 0.0f);
  return b ^ ((b >> 31) & 0x7FFFFFFF);
}
TOPK_FAST_FN int64_t ordered(double x) {
  int64_t b;
  x += 0.0;
  memcpy(&b, &x, 8);
  return b ^ ((b >> 63) & 0x7FFFFFFFFFFFFFFF);
}

// The float that `ordered` made o of, +0 for both zeros.
TOPK_FAST_FN float unordered(int32_t o) { return Scalar::as_float(o ^ ((o >> 31) & 0x7FFFFFFF)); }
TOPK_FAST_FN double unordered(int64_t o) {
  o ^= (o >> 63) & 0x7FFFFFFFFFFFFFFF;
  double x;
  memcpy(&x, &o, 8);
  return x;
}

}  // namespace topk_fast
