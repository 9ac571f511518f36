// The noise contract, version 2: Philox4x32-10 words to draws of two laws and to arrivals of a Poisson process.
//
// topk_fast/noise.py holds the same functions in torch and the contract's text; tests/known_answers.json pins
// every one of them bit for bit. Host and device code, no torch headers.
//
// Bits are equal on every backend because each float32 operation below is exactly rounded and done once, in the
// order written: compile with -ffp-contract=off (g++) or --fmad=false (nvcc), never with fast-math.
#pragma once

#include <stdint.h>
#include <string.h>

#include "request.h"

#if defined(__CUDACC__)
#define TOPK_FAST_FN __host__ __device__ static __forceinline__
#define TOPK_FAST_MEMBER __host__ __device__ __forceinline__ static
#else
#define TOPK_FAST_FN static inline __attribute__((always_inline))
#define TOPK_FAST_MEMBER __attribute__((always_inline)) static inline
#endif

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)  // nvcc's own defines nothing
#error "fast-math breaks the noise contract and hides NaN: compile without it"
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

// The functions below are written once for single values and for vectors: `O` names the float and int32 types and
// the steps that C++ writes differently for the two.
struct Scalar {
  using F = float;
  using I = int32_t;
  TOPK_FAST_MEMBER I as_int(F x) {
    I b;
    memcpy(&b, &x, 4);
    return b;
  }
  TOPK_FAST_MEMBER F as_float(I b) {
    F x;
    memcpy(&x, &b, 4);
    return x;
  }
  TOPK_FAST_MEMBER F floats(float x) { return x; }
  TOPK_FAST_MEMBER I ints(int32_t i) { return i; }
  TOPK_FAST_MEMBER F convert(I i) { return (F)i; }
  TOPK_FAST_MEMBER I truncate(F x) { return (I)x; }
  TOPK_FAST_MEMBER I shift_left(I i, int by) { return (I)((uint32_t)i << by); }
#ifdef __CUDA_ARCH__
  TOPK_FAST_MEMBER F root(F x) { return __fsqrt_rn(x); }
#else
  TOPK_FAST_MEMBER F root(F x) { return __builtin_sqrtf(x); }
#endif
  TOPK_FAST_MEMBER bool any(bool b) { return b; }
};

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
template <class O>
TOPK_FAST_FN typename O::F ln(typename O::F x) {
  const auto b = O::as_int(x);
  const auto e = (b - 0x3f3504f3) >> 23;
  const auto m = O::as_float(b - O::shift_left(e, 23));
  const auto s = (m - 1.0f) / (m + 1.0f);
  const auto t = s * s;
  auto p = t * 0.11111111f + 0.14285715f;
  p = p * t + 0.2f;
  p = p * t + 0.33333334f;
  p = p * t + 1.0f;
  return O::convert(e) * 0.69314718f + (2.0f * s) * p;
}

// The z >= 0 with 1 - Phi(z) = p, for 0 < p <= 1/2. Central part: Giles, "Approximating the erfinv function", 2012.
// A polynomial that no lane asks for is left out.
template <class O>
TOPK_FAST_FN typename O::F upper_quantile(typename O::F p) {
  const auto y = -ln<O>((4.0f * p) * (1.0f - p));
  typename O::F central = p, tail = p;
  if (O::any(y < 5.0f)) {
    const auto a = y - 2.5f;
    central = a * 2.81022636e-08f + 3.43273939e-07f;
    central = central * a + -3.5233877e-06f;
    central = central * a + -4.39150654e-06f;
    central = central * a + 0.00021858087f;
    central = central * a + -0.00125372503f;
    central = central * a + -0.00417768164f;
    central = central * a + 0.246640727f;
    central = central * a + 1.50140941f;
  }
  if (O::any(y >= 5.0f)) {
    const auto a = O::root(y) - 3.0f;
    tail = a * 2.11814277e-05f + -0.000247470773f;
    tail = tail * a + 0.00120883412f;
    tail = tail * a + -0.00327648851f;
    tail = tail * a + 0.00572421542f;
    tail = tail * a + -0.00776328519f;
    tail = tail * a + 0.00945140887f;
    tail = tail * a + 1.00168824f;
    tail = tail * a + 2.83297658f;
  }
  const typename O::F r = y < 5.0f ? central : tail;
  return 1.41421356f * (r * (1.0f - 2.0f * p));
}

// A standard normal draw from one word; small words are the upper tail, so it falls as the word grows.
template <class O>
TOPK_FAST_FN typename O::F normal(typename O::I w) {
  const auto s = w >> 31;
  const auto p = (O::convert(w ^ s) + 0.5f) * 2.3283064365386963e-10f;
  return O::as_float(O::as_int(upper_quantile<O>(p)) ^ O::shift_left(s, 31));
}

// exp(-e) for e >= 0; below 2^-126 it stays there.
template <class O>
TOPK_FAST_FN typename O::F exp_minus(typename O::F e) {
  const auto fe = e * -1.44269504f;
  const typename O::F f = fe > -126.0f ? fe : fe * 0.0f - 126.0f;
  const auto i = O::truncate(f - 0.5f);
  const auto g = (f - O::convert(i)) * 0.69314718f;
  auto x = g * 0.0013888889f + 0.0083333338f;
  x = x * g + 0.041666668f;
  x = x * g + 0.16666667f;
  x = x * g + 0.5f;
  x = x * g + 1.0f;
  x = x * g + 1.0f;
  return O::as_float(O::as_int(x) + O::shift_left(i, 23));
}

// The z with -ln Phi(z) = e, for e >= 0: the level of the arrival at time e.
template <class O>
TOPK_FAST_FN typename O::F hazard_quantile(typename O::F e) {
  typename O::F h = e < 0.5f ? e : e * 0.0f + 0.5f;
  auto s = h * 0.0013888889f + -0.0083333338f;
  s = s * h + 0.041666668f;
  s = s * h + -0.16666667f;
  s = s * h + 0.5f;
  s = s * h + -1.0f;
  typename O::F p = -(s * h), exp = p;
  if (O::any(e >= 0.5f)) {
    exp = exp_minus<O>(e);
    p = e < 0.5f ? p : 1.0f - exp;
  }
  typename O::F q = p > 0.5f ? exp : p;
  q = q > 1.17549435e-38f ? q : q * 0.0f + 1.17549435e-38f;
  const auto z = upper_quantile<O>(q);
  return p > 0.5f ? -z : z;
}

// The z with -ln F(z) = e for Gumbel's law less its mean, Euler's constant: the level of the arrival at time e > 0.
template <class O>
TOPK_FAST_FN typename O::F gumbel_level(typename O::F e) {
  return -ln<O>(e) - 0.5772157f;
}

// A draw from Gumbel's law less its mean; it falls as the word grows. e is -ln(1 - p) for the upper tail, else -ln p.
template <class O>
TOPK_FAST_FN typename O::F gumbel(typename O::I w) {
  const auto s = w >> 31;
  const auto p = (O::convert(w ^ s) + 0.5f) * 2.3283064365386963e-10f;
  const auto q = p / (2.0f - p);
  const auto t = q * q;
  auto e = t * 0.11111111f + 0.14285715f;
  e = e * t + 0.2f;
  e = e * t + 0.33333334f;
  e = e * t + 1.0f;
  e = (2.0f * q) * e;
  if (O::any(s != 0)) e = s == 0 ? e : -ln<O>(p);
  return gumbel_level<O>(e);
}

// A law of the noise: a draw from a word, and the level of an arrival from its time.
struct NormalLaw {
  static constexpr Law kLaw = Law::kNormal;
  template <class O>
  TOPK_FAST_MEMBER typename O::F draw(typename O::I w) {
    return normal<O>(w);
  }
  template <class O>
  TOPK_FAST_MEMBER typename O::F level(typename O::F e) {
    return hazard_quantile<O>(e);
  }
};

struct GumbelLaw {
  static constexpr Law kLaw = Law::kGumbel;
  template <class O>
  TOPK_FAST_MEMBER typename O::F draw(typename O::I w) {
    return gumbel<O>(w);
  }
  template <class O>
  TOPK_FAST_MEMBER typename O::F level(typename O::F e) {
    return gumbel_level<O>(e);
  }
};

// An Exp(1) gap between arrivals in units of 2^-24, at least 1: integers, so that sums are exact in any order.
template <class O>
TOPK_FAST_FN typename O::I gap(typename O::I w) {
  const auto u = (O::convert((w >> 1) & 0x7fffffff) + 0.5f) * 4.656612873077393e-10f;
  return O::truncate(-ln<O>(u) * 16777216.0f) + 1;
}

// Time of an arrival from the sum of its gaps; inverse_l = 1.0f / (float)L.
TOPK_FAST_FN float arrival_time(int64_t gaps, float inverse_l) {
  return ((float)gaps * 5.9604644775390625e-08f) * inverse_l;
}

// The largest integer whose square is at most x.
TOPK_FAST_FN int64_t integer_root(int64_t x) {
  int64_t root = (int64_t)__builtin_sqrt((double)x);
  while (root * root > x) --root;
  while ((root + 1) * (root + 1) <= x) ++root;
  return root;
}

// Which classes get a draw of their own; noise.py's `plan` has the words.
TOPK_FAST_FN Plan plan(int64_t n_classes, int64_t k, Law law) {
  int64_t m = integer_root(4 * n_classes);
  if (law == Law::kGumbel) {
    const int64_t few = integer_root(k * n_classes / 2);
    m = few < m ? few : m;
  }
  m = m > 4 * k ? m : 4 * k;
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
