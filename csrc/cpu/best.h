// The k best of several samples side by side: (value, class) pairs as integers whose order is that of the lists.
#pragma once

#include <limits>
#include <type_traits>
#include <utility>

#include "../order.h"
#include "kernel.h"
#include "simd.h"

namespace topk_fast {
namespace TOPK_FAST_ISA {

template <class S>
using Key = std::conditional_t<sizeof(S) == 4, int64_t, __int128>;

// Larger keys come first: value descending, then id ascending. -0 counts as +0; the last bit tells it.
template <class S>
static inline Key<S> key_of(S x, int32_t id) {
  const auto order = ordered(x);
  decltype(ordered(x)) b;
  memcpy(&b, &x, sizeof b);
  const bool minus_zero = b == std::numeric_limits<decltype(b)>::min();
  return (Key<S>)order * ((int64_t)1 << 32) + (uint32_t)((uint32_t)(0x7ffffffe - id) << 1 | (uint32_t)minus_zero);
}

template <class S>
static inline S value_of(Key<S> key) {
  return key & 1 ? -(S)0 : unordered((decltype(ordered(S())))(key >> 32));
}

template <class S>
static inline int32_t class_of(Key<S> key) {
  return 0x7ffffffe - (int32_t)((uint32_t)key >> 1);
}

// n rows of kLists keys enter kLists lists of k keys, keys[i][list], one key of a row in each list; n is a multiple
// of kAbreast.
constexpr int kAbreast = 4;
template <class K>
static inline void enter_rows(K* keys, int k, const K* rows, int n) {
  for (int j = 0; j < n * kLists; ++j) {
    K x = rows[j];
    if (!(x > keys[(k - 1) * kLists + j % kLists])) continue;
    for (int i = j % kLists; i < k * kLists; i += kLists)
      if (x > keys[i]) std::swap(x, keys[i]);
  }
}

#if defined(TOPK_FAST_AVX512) || defined(TOPK_FAST_AVX2)
// Without a branch, kAbreast rows together, each a step behind the one before it: a list's key is loaded once for all.
static inline void enter_rows(int64_t* keys, int k, const int64_t* rows, int n) {
  typedef int64_t Piece __attribute__((vector_size(kVectorBytes)));  // wider ones g++ takes apart lane by lane
  constexpr int kPiece = kVectorBytes / 8;
  for (int j = 0; j < n; j += kAbreast)
    for (int l = 0; l < kLists; l += kPiece) {
      Piece x[kAbreast], held;
      for (int r = 0; r < kAbreast; ++r) memcpy(&x[r], rows + (j + r) * kLists + l, sizeof x[r]);
      for (int i = 0; i < k; ++i) {
        memcpy(&held, keys + i * kLists + l, sizeof held);
#pragma GCC unroll 4
        for (int r = 0; r < kAbreast; ++r) {
          const Piece larger = held > x[r] ? held : x[r];
          x[r] = held > x[r] ? x[r] : held;
          held = larger;
        }
        memcpy(keys + i * kLists + l, &held, sizeof held);
      }
    }
}
#endif

// The following take one list of k keys, kLists apart, best first; (-inf, -1) pads, above every class's -inf.
template <class S>
static inline S kth_value(const Key<S>* list, int k) {
  return value_of<S>(list[(k - 1) * kLists]);
}

// One key, if it is above the last one and its class is not there.
template <class S>
static inline void enter(Key<S>* list, int k, Key<S> x) {
  if (!(x > list[(k - 1) * kLists])) return;
  for (int i = 0; i < k; ++i)
    if (class_of<S>(list[i * kLists]) == class_of<S>(x)) return;
  int i = k - 1;
  for (; i > 0 && x > list[(i - 1) * kLists]; --i) list[i * kLists] = list[(i - 1) * kLists];
  list[i * kLists] = x;
}

}  // namespace TOPK_FAST_ISA
}  // namespace topk_fast
