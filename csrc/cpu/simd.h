// The few steps that g++ does not vectorise well by itself, for the instruction set of the including file.
#pragma once

#include "../noise.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace topk_fast {
namespace TOPK_FAST_ISA {

constexpr int kLanes = 16;  // blocks are padded to this many entries, on every instruction set

// g++'s vector types at the width of the instruction set: it does not vectorise float maxima by itself.
#if defined(TOPK_FAST_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(TOPK_FAST_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Lane numbers of shuffles, in tables: built lane by lane g++ makes each one anew.
template <class Int, int kCount>
struct Shuffles {
  Int even[kCount], odd[kCount], swap[6][kCount];  // swap[j]: lane i takes lane i ^ 2^j
  constexpr Shuffles() : even{}, odd{}, swap{} {
    for (int i = 0; i < kCount; ++i) {
      even[i] = 2 * i, odd[i] = 2 * i + 1;
      for (int j = 0; j < 6; ++j) swap[j][i] = i ^ (1 << j);
    }
  }
};

template <class V, class S>
static inline void store(V v, S* x) {
  memcpy(x, &v, sizeof v);
}

static inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

template <class S>
struct Lane;
template <>
struct Lane<float> {
  using type = int32_t;
};
template <>
struct Lane<double> {
  using type = int64_t;
};

template <class S>
struct Vector {
  using lane = typename Lane<S>::type;
  static constexpr int n = kVectorBytes / sizeof(S);
  typedef S type __attribute__((vector_size(kVectorBytes)));
  typedef lane mask __attribute__((vector_size(kVectorBytes)));
  static constexpr Shuffles<lane, n> shuffles{};

  static type load(const S* x) {
    type v;
    memcpy(&v, x, sizeof v);
    return v;
  }
  static mask lanes(const lane* x) {
    mask v;
    memcpy(&v, x, sizeof v);
    return v;
  }
  static type all(S x) { return x - type{}; }
  static type larger(type a, type b) { return a > b ? a : b; }
  static type smaller(type a, type b) { return a < b ? a : b; }
  // Maxima of the n pairs of neighbours in a, then b.
  static type pair_maxima(type a, type b) {
    return larger(__builtin_shuffle(a, b, lanes(shuffles.even)), __builtin_shuffle(a, b, lanes(shuffles.odd)));
  }
  static S largest(type a) {
#pragma GCC unroll 6
    for (int j = 0; 1 << j < n; ++j) a = larger(a, __builtin_shuffle(a, lanes(shuffles.swap[j])));
    return a[0];
  }
  // Of a sum of comparisons, each -1 where it holds.
  static int count(mask m) {
#pragma GCC unroll 6
    for (int j = 0; 1 << j < n; ++j) m += __builtin_shuffle(m, lanes(shuffles.swap[j]));
    return -(int)m[0];
  }
};

// noise.h's functions on vectors.
struct Wide {
  using F = Vector<float>::type;
  using I = Vector<float>::mask;
  static inline I as_int(F x) { return (I)x; }
  static inline F as_float(I b) { return (F)b; }
  static inline F floats(float x) { return x - F{}; }
  static inline I ints(int32_t i) { return i - I{}; }
  static inline F convert(I i) { return __builtin_convertvector(i, F); }
  static inline I truncate(F x) { return __builtin_convertvector(x, I); }
  static inline I shift_left(I i, int by) { return i << by; }
  static inline F root(F x) {
#if defined(TOPK_FAST_AVX512)
    return (F)_mm512_sqrt_ps((__m512)x);
#elif defined(TOPK_FAST_AVX2)
    return (F)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < Vector<float>::n; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }
  static inline uint32_t bits(I m) {  // bit i: lane i of a comparison
#if defined(TOPK_FAST_AVX512)
    return _mm512_movepi32_mask((__m512i)m);
#elif defined(TOPK_FAST_AVX2)
    return (uint32_t)_mm256_movemask_ps((__m256)m);
#elif defined(__x86_64__)
    return (uint32_t)_mm_movemask_ps((__m128)m);
#else
    return (uint32_t)((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8));
#endif
  }
  static inline bool any(I m) { return bits(m) != 0; }
  static F load(const float* x) { return Vector<float>::load(x); }
  static I load(const uint32_t* x) { return Vector<float>::lanes((const int32_t*)x); }
};

// Bit i: not (x[i] <= bound), so that a NaN is a hit.
template <class S>
static inline uint32_t hits_above(const S* x, S bound) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (uint32_t)!(x[i] <= bound) << i;
  return mask;
}

// Bit i: not (x[i] < bound).
template <class S>
static inline uint32_t hits_at_least(const S* x, S bound) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (uint32_t)!(x[i] < bound) << i;
  return mask;
}

#if defined(TOPK_FAST_AVX512)
static inline uint32_t hits_above(const float* x, float bound) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(bound), _CMP_NLE_UQ);
}
static inline uint32_t hits_at_least(const float* x, float bound) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(bound), _CMP_NLT_UQ);
}
static inline uint32_t hits_above(const double* x, double bound) {
  const __m512d b = _mm512_set1_pd(bound);
  const uint32_t high = _mm512_cmp_pd_mask(_mm512_loadu_pd(x + 8), b, _CMP_NLE_UQ);
  return _mm512_cmp_pd_mask(_mm512_loadu_pd(x), b, _CMP_NLE_UQ) | high << 8;
}
static inline uint32_t hits_at_least(const double* x, double bound) {
  const __m512d b = _mm512_set1_pd(bound);
  const uint32_t high = _mm512_cmp_pd_mask(_mm512_loadu_pd(x + 8), b, _CMP_NLT_UQ);
  return _mm512_cmp_pd_mask(_mm512_loadu_pd(x), b, _CMP_NLT_UQ) | high << 8;
}
#else
static inline uint32_t hits_above(const float* x, float bound) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; i += Vector<float>::n) mask |= Wide::bits(~(Wide::load(x + i) <= bound)) << i;
  return mask;
}
static inline uint32_t hits_at_least(const float* x, float bound) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; i += Vector<float>::n) mask |= Wide::bits(~(Wide::load(x + i) < bound)) << i;
  return mask;
}
#endif

// Bit i: word[i] >> 8 is at most bound[i].
static inline uint32_t hits_within(const uint32_t* word, const int32_t* bound) {
#if defined(TOPK_FAST_AVX512)
  return _mm512_cmple_epi32_mask(_mm512_srli_epi32(_mm512_loadu_si512(word), 8), _mm512_loadu_si512(bound));
#else
  using V = Vector<float>;
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; i += V::n)
    mask |= Wide::bits(((V::lanes((const int32_t*)word + i) >> 8) & 0xffffff) <= V::lanes(bound + i)) << i;
  return mask;
#endif
}

// Appends the hits of x[0..kLanes); up to kLanes entries are written. Returns how many hits there are.
template <class X>
static inline int append(const X* x, uint32_t hits, X* out) {
#if defined(TOPK_FAST_AVX512)
  if constexpr (sizeof(X) == 4) {
    // Packed in registers and stored whole: the instruction that stores packed is microcode on AMD's processors.
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32((__mmask16)hits, _mm512_loadu_si512(x)));
    return __builtin_popcount(hits);
  }
#endif
  int n = 0;
  for (; hits; hits &= hits - 1) out[n++] = x[__builtin_ctz(hits)];
  return n;
}

// The same of three arrays at once.
template <class X, class Y, class Z>
static inline int append(const X* x, const Y* y, const Z* z, uint32_t hits, X* x_out, Y* y_out, Z* z_out) {
#if defined(TOPK_FAST_AVX512)
  append(x, hits, x_out), append(y, hits, y_out);
  return append(z, hits, z_out);
#else
  int n = 0;
  for (; hits; hits &= hits - 1, ++n) {
    const int i = __builtin_ctz(hits);
    x_out[n] = x[i], y_out[n] = y[i], z_out[n] = z[i];
  }
  return n;
#endif
}

// Appends the numbers first + i of the hits, likewise.
static inline int append_numbers(int32_t first, uint32_t hits, int32_t* out) {
#if defined(TOPK_FAST_AVX512)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_si512(out,
                      _mm512_maskz_compress_epi32((__mmask16)hits, _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
  return __builtin_popcount(hits);
#else
  int n = 0;
  for (; hits; hits &= hits - 1) out[n++] = first + __builtin_ctz(hits);
  return n;
#endif
}

// 64-bit lanes of which only the low halves count: a round of Philox is then two multiplications, two shifts
// and two xors. Left to itself g++ 12 packs and unpacks between rounds.
#if defined(TOPK_FAST_AVX512)
struct Lanes {
  static constexpr int n = 8;
  __m512i x;
  static Lanes load(const uint32_t* p) { return {_mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i*)p))}; }
  static Lanes all(uint32_t v) { return {_mm512_set1_epi64(v)}; }
  void store(uint32_t* p) const { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi64_epi32(x)); }
  Lanes times(Lanes o) const { return {_mm512_mul_epu32(x, o.x)}; }
  Lanes high() const { return {_mm512_srli_epi64(x, 32)}; }
  Lanes operator^(Lanes o) const { return {_mm512_xor_si512(x, o.x)}; }
  static Lanes xor3(Lanes a, Lanes b, Lanes c) { return {_mm512_ternarylogic_epi64(a.x, b.x, c.x, 0x96)}; }
};
#elif defined(TOPK_FAST_AVX2)
struct Lanes {
  static constexpr int n = 4;
  __m256i x;
  static Lanes load(const uint32_t* p) { return {_mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i*)p))}; }
  static Lanes all(uint32_t v) { return {_mm256_set1_epi64x(v)}; }
  void store(uint32_t* p) const {
    const __m256i even = _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(even));
  }
  Lanes times(Lanes o) const { return {_mm256_mul_epu32(x, o.x)}; }
  Lanes high() const { return {_mm256_srli_epi64(x, 32)}; }
  Lanes operator^(Lanes o) const { return {_mm256_xor_si256(x, o.x)}; }
  static Lanes xor3(Lanes a, Lanes b, Lanes c) { return a ^ b ^ c; }
};
#else
struct Lanes {
  static constexpr int n = 1;
  uint64_t x;
  static Lanes load(const uint32_t* p) { return {*p}; }
  static Lanes all(uint32_t v) { return {v}; }
  void store(uint32_t* p) const { *p = (uint32_t)x; }
  Lanes times(Lanes o) const { return {(uint64_t)(uint32_t)x * (uint32_t)o.x}; }
  Lanes high() const { return {x >> 32}; }
  Lanes operator^(Lanes o) const { return {x ^ o.x}; }
  static Lanes xor3(Lanes a, Lanes b, Lanes c) { return a ^ b ^ c; }
};
#endif

// The round keys of a seed.
struct Keys {
  Lanes k0[10], k1[10];
  explicit Keys(uint64_t seed) {
    for (uint32_t r = 0; r < 10; ++r) {
      k0[r] = Lanes::all((uint32_t)seed + r * 0x9E3779B9u);
      k1[r] = Lanes::all((uint32_t)(seed >> 32) + r * 0xBB67AE85u);
    }
  }
};

static inline Lanes counters(const uint32_t* c, int i) { return Lanes::load(c + i); }
static inline Lanes counters(uint32_t c, int) { return Lanes::all(c); }

// noise.h's philox over n calls, n a multiple of kLanes: counters c0[i], c1, c2, c3, the middle two arrays or the same
// for all calls.
template <class C1, class C2>
static inline void philox_block(const Keys& keys, const uint32_t* c0, C1 c1, C2 c2, uint32_t c3, int n, uint32_t* w0,
                                uint32_t* w1, uint32_t* w2, uint32_t* w3) {
  constexpr int kChains = 2;  // one waits on its multiplications
  const Lanes m0 = Lanes::all(0xD2511F53u), m1 = Lanes::all(0xCD9E8D57u);
  for (int i = 0; i < n; i += kChains * Lanes::n) {
    Lanes x0[kChains], x1[kChains], x2[kChains], x3[kChains];
    for (int j = 0; j < kChains; ++j) {
      const int at = i + j * Lanes::n;
      x0[j] = Lanes::load(c0 + at), x1[j] = counters(c1, at), x2[j] = counters(c2, at), x3[j] = Lanes::all(c3);
    }
#pragma GCC unroll 10
    for (int r = 0; r < 10; ++r)
      for (int j = 0; j < kChains; ++j) {
        const Lanes a = x0[j].times(m0), b = x2[j].times(m1);
        x0[j] = Lanes::xor3(b.high(), x1[j], keys.k0[r]);
        x2[j] = Lanes::xor3(a.high(), x3[j], keys.k1[r]);
        x1[j] = b, x3[j] = a;
      }
    for (int j = 0; j < kChains; ++j) {
      const int at = i + j * Lanes::n;
      x0[j].store(w0 + at), x1[j].store(w1 + at), x2[j].store(w2 + at), x3[j].store(w3 + at);
    }
  }
}

// out[i] = (x[i] * factor) >> 32 for i < n, a multiple of kLanes.
static inline void scaled(const uint32_t* x, uint32_t factor, int n, int32_t* out) {
  const Lanes f = Lanes::all(factor);
  for (int i = 0; i < n; i += Lanes::n) Lanes::load(x + i).times(f).high().store((uint32_t*)out + i);
}

}  // namespace TOPK_FAST_ISA
}  // namespace topk_fast
