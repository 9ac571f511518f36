// The noise contract, version 1: Philox4x32-10 words to Gaussian draws and to arrivals of a Poisson process.
//
// topk_fast/noise.py holds the same functions in torch and the contract's text; tests/known_answers.json pins
// every one of them bit for bit. Host and device code, no torch headers.
//
// Bits are equal on every backend because each float32 operation below is exactly rounded and done once, in the
// order written: compile with -ffp-contract=off (g++) or --fmad=false (nvcc), never with fast-math. Selections
// are ternaries on values that are computed on both sides, so that plain loops over these functions vectorise.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define TOPK_FAST_FN __host__ __device__ static __forceinline__
#else
#define TOPK_FAST_FN static inline __attribute__((always_inline))
#endif

namespace topk_fast {

struct Words {
  uint32_t w0, w1, w2, w3;
};

struct Plan {
  bool all;            // every class is a contender
  int64_t contenders;  // about how many there are to be
  int32_t group;       // classes a group
  int32_t stride;      // every stride-th group is looked at
  int32_t rank;        // the cut is the rank-th largest maximum of those groups
};

TOPK_FAST_FN uint32_t float_bits(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  return b;
}

TOPK_FAST_FN float bits_float(uint32_t b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}

// Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
TOPK_FAST_FN Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#define TOPK_FAST_ROUND                                   \
  {                                                       \
    const uint64_t a = (uint64_t)c0 * 0xD2511F53u;        \
    const uint64_t b = (uint64_t)c2 * 0xCD9E8D57u;        \
    const uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ k0;    \
    const uint32_t n2 = (uint32_t)(a >> 32) ^ c3 ^ k1;    \
    c1 = (uint32_t)b, c3 = (uint32_t)a, c0 = n0, c2 = n2; \
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;                 \
  }
  // Written out: an inner loop would keep g++ from vectorising the loop over calls.
  TOPK_FAST_ROUND TOPK_FAST_ROUND TOPK_FAST_ROUND TOPK_FAST_ROUND TOPK_FAST_ROUND;
  TOPK_FAST_ROUND TOPK_FAST_ROUND TOPK_FAST_ROUND TOPK_FAST_ROUND TOPK_FAST_ROUND;
#undef TOPK_FAST_ROUND
  return {c0, c1, c2, c3};
}

// ln x for positive normal x: x = 2^e m with m in [0.707, 1.414), ln m by its atanh series.
TOPK_FAST_FN float ln(float x) {
  const uint32_t b = float_bits(x);
  const int32_t e = (int32_t)(b - 0x3f3504f3u) >> 23;
  const float m = bits_float(b - ((uint32_t)e << 23));
  const float s = (m - 1.0f) / (m + 1.0f);
  const float t = s * s;
  float p = 0.11111111f;
  p = p * t + 0.14285715f;
  p = p * t + 0.2f;
  p = p * t + 0.33333334f;
  p = p * t + 1.0f;
  return (float)e * 0.69314718f + (2.0f * s) * p;
}

// The z >= 0 with 1 - Phi(z) = p, for 0 < p <= 1/2. Central part: Giles, "Approximating the erfinv function", 2012.
TOPK_FAST_FN float upper_quantile(float p) {
  const float y = -ln((4.0f * p) * (1.0f - p));
  const float a = y - 2.5f;
  float c = 2.81022636e-08f;
  c = c * a + 3.43273939e-07f;
  c = c * a + -3.5233877e-06f;
  c = c * a + -4.39150654e-06f;
  c = c * a + 0.00021858087f;
  c = c * a + -0.00125372503f;
  c = c * a + -0.00417768164f;
  c = c * a + 0.246640727f;
  c = c * a + 1.50140941f;
  const float b = __builtin_sqrtf(y) - 3.0f;
  float d = 2.11814277e-05f;
  d = d * b + -0.000247470773f;
  d = d * b + 0.00120883412f;
  d = d * b + -0.00327648851f;
  d = d * b + 0.00572421542f;
  d = d * b + -0.00776328519f;
  d = d * b + 0.00945140887f;
  d = d * b + 1.00168824f;
  d = d * b + 2.83297658f;
  const float r = y < 5.0f ? c : d;
  return 1.41421356f * (r * (1.0f - 2.0f * p));
}

// A standard normal draw from one word; small words are the upper tail, so it falls as the word grows.
TOPK_FAST_FN float normal(uint32_t w) {
  const uint32_t s = (uint32_t)((int32_t)w >> 31);
  const uint32_t m = w ^ s;
  const float p = ((float)(int32_t)m + 0.5f) * 2.3283064365386963e-10f;
  return bits_float(float_bits(upper_quantile(p)) ^ (s & 0x80000000u));
}

// The z with -ln Phi(z) = e, for e >= 0: the level of the arrival at time e.
TOPK_FAST_FN float hazard_quantile(float e) {
  const float h = e < 0.5f ? e : 0.5f;
  float s = 0.0013888889f;
  s = s * h + -0.0083333338f;
  s = s * h + 0.041666668f;
  s = s * h + -0.16666667f;
  s = s * h + 0.5f;
  s = s * h + -1.0f;
  const float ps = -(s * h);
  const float fe = e * -1.44269504f;
  const float f = fe > -126.0f ? fe : -126.0f;
  const int32_t i = (int32_t)(f - 0.5f);
  const float g = (f - (float)i) * 0.69314718f;
  float x = 0.0013888889f;
  x = x * g + 0.0083333338f;
  x = x * g + 0.041666668f;
  x = x * g + 0.16666667f;
  x = x * g + 0.5f;
  x = x * g + 1.0f;
  x = x * g + 1.0f;
  const float ex = bits_float(float_bits(x) + ((uint32_t)i << 23));
  const float p = e < 0.5f ? ps : 1.0f - ex;
  const bool lower = p > 0.5f;
  const float q = lower ? ex : p;
  const float z = upper_quantile(q > 1.17549435e-38f ? q : 1.17549435e-38f);
  return lower ? -z : z;
}

// An Exp(1) gap between arrivals in units of 2^-24: integers, so that sums are exact in any order.
TOPK_FAST_FN int32_t gap(uint32_t w) {
  const float u = ((float)(int32_t)(w >> 1) + 0.5f) * 4.656612873077393e-10f;
  return (int32_t)(-ln(u) * 16777216.0f);
}

// Time of an arrival from the sum of its gaps; inverse_l = 1.0f / (float)L.
TOPK_FAST_FN float arrival_time(int64_t gaps, float inverse_l) {
  return ((float)gaps * 5.9604644775390625e-08f) * inverse_l;
}

// Which classes get a draw of their own; noise.py's `plan` has the words.
TOPK_FAST_FN Plan plan(int64_t n_classes, int64_t k) {
  int64_t root = (int64_t)__builtin_sqrt((double)(4 * n_classes));
  root -= root * root > 4 * n_classes;
  int64_t m = root > 4 * k ? root : 4 * k;
  m = m > 32 ? m : 32;
  if (n_classes < 2 * m) return {true, m, 1, 1, 1};
  int64_t g = 1;
  while (g < 32 && n_classes / (2 * g) >= 4 * m) g *= 2;
  const int64_t groups = (n_classes + g - 1) / g;
  const int64_t stride = groups / 512 > 1 ? groups / 512 : 1;
  const int64_t looked_at = (groups + stride - 1) / stride;
  const int64_t rank = m * looked_at / groups;
  return {false, m, (int32_t)g, (int32_t)stride, (int32_t)(rank > 1 ? rank : 1)};
}

}  // namespace topk_fast
