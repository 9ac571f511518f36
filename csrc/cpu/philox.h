// noise.h's Philox over many calls at once, for the instruction set of the including file.
#pragma once

#include "simd.h"

namespace topk_fast {
namespace TOPK_FAST_ISA {

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

// Counters of calls, kLanes at a time: an array, or a number for all calls.
static inline Lanes counters(const uint32_t* c, int i) { return Lanes::load(c + i); }
static inline Lanes counters(uint32_t c, int) { return Lanes::all(c); }

template <class C1, class C2>
struct Counters {
  const uint32_t* c0;
  C1 c1;
  C2 c2;
  uint32_t c3;
};

// noise.h's philox over n calls, n a multiple of kLanes; words[j] are the j-th words.
template <class C1, class C2, int kSize>
static inline void philox_block(const Keys& keys, const Counters<C1, C2>& c, int n, uint32_t (&words)[4][kSize]) {
  constexpr int kChains = 2;  // one waits on its multiplications
  const Lanes m0 = Lanes::all(0xD2511F53u), m1 = Lanes::all(0xCD9E8D57u);
  for (int i = 0; i < n; i += kChains * Lanes::n) {
    Lanes x0[kChains], x1[kChains], x2[kChains], x3[kChains];
    for (int j = 0; j < kChains; ++j) {
      const int at = i + j * Lanes::n;
      x0[j] = Lanes::load(c.c0 + at), x1[j] = counters(c.c1, at), x2[j] = counters(c.c2, at), x3[j] = Lanes::all(c.c3);
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
      x0[j].store(words[0] + at), x1[j].store(words[1] + at), x2[j].store(words[2] + at), x3[j].store(words[3] + at);
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
