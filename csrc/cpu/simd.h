// The few steps that g++ does not vectorise well by itself, for the instruction set of the including file.
#pragma once

#include <utility>

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

template <class V, class S>
static inline void store(V v, S* x) {
  memcpy(x, &v, sizeof v);
}

static inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

// Which lane of two vectors side by side lane i takes.
struct Even {
  static constexpr int of(int i) { return 2 * i; }
};
struct Odd {
  static constexpr int of(int i) { return 2 * i + 1; }
};
template <int kDistance>
struct Across {  // of the first vector
  static constexpr int of(int i) { return i ^ kDistance; }
};

template <class From, class V, int... i>
static inline V shuffle(V a, V b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, From::of(i)...);
#else
  return __builtin_shuffle(a, b, decltype(a > b){From::of(i)...});
#endif
}

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
  using numbers = std::make_integer_sequence<int, n>;

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
    return larger(shuffle<Even>(a, b, numbers{}), shuffle<Odd>(a, b, numbers{}));
  }
  static S largest(type a) { return reduced(a, larger)[0]; }
  // Of a sum of comparisons, each -1 where it holds.
  static int count(mask m) { return -(int)reduced(m, sum)[0]; }

 private:
  static mask sum(mask a, mask b) { return a + b; }
  template <int kDistance = n / 2, class V, class F>
  static V reduced(V v, F join) {
    if constexpr (kDistance == 0)
      return v;
    else
      return reduced<kDistance / 2>(join(v, shuffle<Across<kDistance>>(v, v, numbers{})), join);
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

// Bit i: x[i] is above the bound or, where kReached, at it. A NaN is a hit.
template <bool kReached, class S>
static inline uint32_t hits(const S* x, S bound) {
#if defined(TOPK_FAST_AVX512)
  constexpr int kCompare = kReached ? _CMP_NLT_UQ : _CMP_NLE_UQ;
  if constexpr (sizeof(S) == 4) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(bound), kCompare);
  } else {
    const __m512d b = _mm512_set1_pd(bound);
    const uint32_t high = _mm512_cmp_pd_mask(_mm512_loadu_pd(x + 8), b, kCompare);
    return _mm512_cmp_pd_mask(_mm512_loadu_pd(x), b, kCompare) | high << 8;
  }
#else
  uint32_t mask = 0;
  if constexpr (sizeof(S) == 4) {
    for (int i = 0; i < kLanes; i += Vector<float>::n)
      mask |= Wide::bits(kReached ? ~(Wide::load(x + i) < bound) : ~(Wide::load(x + i) <= bound)) << i;
  } else {
    for (int i = 0; i < kLanes; ++i) mask |= (uint32_t)(kReached ? !(x[i] < bound) : !(x[i] <= bound)) << i;
  }
  return mask;
#endif
}
template <class S>
static inline uint32_t hits_above(const S* x, S bound) {
  return hits<false>(x, bound);
}
template <class S>
static inline uint32_t hits_at_least(const S* x, S bound) {
  return hits<true>(x, bound);
}

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

}  // namespace TOPK_FAST_ISA
}  // namespace topk_fast
