// The cut of a row: the score above which a class is a contender and gets draws of its own.
//
// The rule is that of topk_fast/reference.py's `cut_of`; the numbers of groups and the rank come from noise.h's `plan`.
#pragma once

#include "layout.h"

namespace topk_fast {
namespace {

// Keys of scores of type T: integers in their order, without the low bits that all of them share.
template <class T>
constexpr int kSpareBits = 0;
template <>
constexpr int kSpareBits<BFloat16> = 16;
template <>
constexpr int kSpareBits<Half> = 13;
template <class T>
using Key = decltype(ordered(ArithmeticOf<T>()));

template <class T>
__device__ __forceinline__ Key<T> key_of(ArithmeticOf<T> x) {
  return ordered(x) >> kSpareBits<T>;
}
template <class T>
__device__ __forceinline__ ArithmeticOf<T> score_of(Key<T> key) {
  constexpr Key<T> kLow = ((Key<T>)1 << kSpareBits<T>)-1;
  return unordered((Key<T>)((Key<T>)(key * (kLow + 1)) | (key < 0 ? kLow : 0)));
}

// The keys of a warp that searches them: each lane holds some in registers, and reads the others in shared memory.
template <class K>
struct Keys {
  static constexpr int kOwn = sizeof(K) == 4 ? 16 : 0;
  const K* all;
  int n;
  K own[kOwn ? kOwn : 1];

  __device__ __forceinline__ Keys(const K* all_, int n_, K none) : all(all_), n(n_) {
    for (int j = 0; j < kOwn; ++j) own[j] = lane_of() + 32 * j < n ? all[lane_of() + 32 * j] : none;
  }
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    for (int j = 0; j < kOwn; ++j) f(own[j]);
    for (int i = lane_of() + 32 * kOwn; i < n; i += 32) f(all[i]);
  }
};

// A width times a share in units of 2^-32.
__device__ __forceinline__ uint32_t share_of(uint32_t width, uint32_t share) {
  return (uint32_t)((uint64_t)width * share >> 32);
}
__device__ __forceinline__ uint64_t share_of(uint64_t width, uint32_t share) {
  return (width >> 32) * share + ((width & 0xffffffffu) * share >> 32);
}

// The rank-th largest of n keys, or `none` where fewer than `rank` are above it, by one warp: regula falsi by counts,
// in which an end that stays weighs half as much each time (the Illinois rule).
template <class K>
__device__ K kth_largest(const K* all, int n, int rank, K none) {
  const Keys<K> keys(all, n, none);
  K low = (K) ~((uint64_t)1 << (sizeof(K) * 8 - 1)), largest = none;
  int reach_low = 0;
  keys.each([&](K x) {
    low = x > none && x < low ? x : low;
    largest = x > largest ? x : largest;
    reach_low += x > none;
  });
  reach_low = sum_of_lanes(reach_low);
  if (reach_low < rank) return none;
  largest = most_of_lanes(largest);
  low = ~most_of_lanes(~low);
  using Width = std::conditional_t<sizeof(K) == 4, uint32_t, uint64_t>;
  Width width = (Width)largest - (Width)low + 1;  // [low, low + width): low reaches the rank, the end does not
  float below = (float)(reach_low - rank) + 0.5f, above = (float)rank;  // weights: how far the ends' counts are off
  bool was_low = false, was_high = false;
#pragma unroll 1
  while (width > 1 && reach_low > rank) {
    Width ahead = share_of(width, (uint32_t)(below / (below + above) * 4294967040.0f));
    ahead = ahead < 1 ? 1 : ahead > width - 1 ? width - 1 : ahead;
    const K middle = (K)((Width)low + ahead);
    int reach = 0;
    keys.each([&](K x) { reach += x >= middle ? 1 : 0; });
    reach = sum_of_lanes(reach);
    const bool is_low = reach >= rank;
    if (is_low) {
      low = middle, width -= ahead, reach_low = reach;
      below = (float)(reach - rank) + 0.5f, above = was_low ? above * 0.5f : above;
    } else {
      width = ahead;
      above = (float)(rank - reach), below = was_high ? below * 0.5f : below;
    }
    was_low = is_low, was_high = !is_low;
  }
  K found = largest;
  keys.each([&](K x) { found = x >= low && x < found ? x : found; });
  return ~most_of_lanes(~found);
}

// The larger of two scores, `top` where the other one is NaN.
__device__ __forceinline__ float larger(float x, float top) { return fmaxf(x, top); }
__device__ __forceinline__ double larger(double x, double top) { return x > top ? x : top; }

#ifdef __CUDA_ARCH__
// The same for two pairs of scores.
__device__ __forceinline__ uint32_t larger(Half, uint32_t x, uint32_t y) {
  uint32_t out;
  asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
  return out;
}
__device__ __forceinline__ uint32_t larger(BFloat16, uint32_t x, uint32_t y) {
  uint32_t out;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
  return out;
}
#endif

// The largest of 16 bytes of scores and `top`.
template <class T>
__device__ __forceinline__ ArithmeticOf<T> most_of_vector(uint4 v, ArithmeticOf<T> top) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 2) {
    const uint32_t most = larger(T{}, larger(T{}, v.x, v.y), larger(T{}, v.z, v.w));
    return larger(widen(T{(uint16_t)most}), larger(widen(T{(uint16_t)(most >> 16)}), top));
  }
#endif
  T x[16 / sizeof(T)];
  memcpy(x, &v, 16);
  for (const T& each : x) top = larger(widen(each), top);
  return top;
}

// The largest of the classes [begin, begin + size) of a row whose scores lie side by side, 16 bytes a load; NaN are
// passed over.
template <class T>
__device__ __forceinline__ ArithmeticOf<T> most_of_group(const Scores<T>& scores, int64_t begin, int size) {
  constexpr int W = 16 / sizeof(T);
  ArithmeticOf<T> top = -infinity<ArithmeticOf<T>>();
  const T* first = scores.start() + begin;
  const int lead = (int)((uintptr_t)first % 16 / sizeof(T));
#pragma unroll 2
  for (int at = lead ? W - lead : 0; at + W <= size; at += W) top = most_of_vector<T>(*(const uint4*)(first + at), top);
  if (lead == 0 && size % W == 0) return top;
  const int head = lead && W - lead < size ? W - lead : 0, tail = head + (size - head) / W * W;
#pragma unroll 4
  for (int i = 0; i < head + size - tail; ++i) top = larger(widen(first[i < head ? i : tail + i - head]), top);
  return top;
}

// The keys of the groups' maxima.
template <class Threads, class T>
__device__ __forceinline__ void make_keys(const Args& a, const Scores<T>& scores, Key<T>* keys) {
  using S = ArithmeticOf<T>;
  constexpr int W = 16 / sizeof(T), kAbreast = 4;
  const int64_t step = (int64_t)a.plan.group * a.plan.stride;
  const int group = a.plan.group, n = a.looked_at;
  if (scores.stride == 1 && group >= W) {
    const bool is_aligned = ((uintptr_t)scores.start() | (uintptr_t)step * sizeof(T)) % 16 == 0 && group % W == 0;
#pragma unroll 1
    for (int q = Threads::rank(); q < n;) {
      const int64_t begin = q * step, left = scores.n - begin;
      if (is_aligned &&
          (kAbreast - 1) * Threads::kSize * step + group <= left) {  // groups abreast: as many loads in flight
        S top[kAbreast];
        for (S& x : top) x = -infinity<S>();
#pragma unroll 1
        for (int i = 0; i < group; i += W)
          for (int u = 0; u < kAbreast; ++u)
            top[u] = most_of_vector<T>(*(const uint4*)(scores.start() + begin + u * Threads::kSize * step + i), top[u]);
        for (int u = 0; u < kAbreast; ++u, q += Threads::kSize) keys[q] = key_of<T>(top[u]);
      } else {
        keys[q] = key_of<T>(most_of_group(scores, begin, left < group ? (int)left : group));
        q += Threads::kSize;
      }
    }
    return;
  }
#pragma unroll 1
  for (int q = Threads::rank(); q < n; q += Threads::kSize * kAbreast) {  // groups abreast: as many loads in flight
    S top[kAbreast];
    const T* at[kAbreast];
    int size[kAbreast];
    for (int u = 0; u < kAbreast; ++u) {
      const int64_t begin = (q + u * Threads::kSize) * step, left = scores.n - begin;
      top[u] = -infinity<S>();
      at[u] = scores.start() + begin * scores.stride;
      size[u] = q + u * Threads::kSize >= n ? 0 : left < group ? (int)left : group;
    }
#pragma unroll 1
    for (int i = 0; i < group; ++i)
      for (int u = 0; u < kAbreast; ++u) {
        const S x = i < size[u] ? (S)widen(*at[u]) : -infinity<S>();
        top[u] = larger(x, top[u]);
        at[u] += scores.stride;
      }
    for (int u = 0; u < kAbreast; ++u)
      if (q + u * Threads::kSize < n) keys[q + u * Threads::kSize] = key_of<T>(top[u]);
  }
}

// The rank-th largest maximum of groups 0, stride, ... of classes; -inf where that is +inf. The keys' place is free
// when it returns.
template <class Threads, class T>
__device__ ArithmeticOf<T> cut_of(const Args& a, const Scores<T>& scores, State<T>& state) {
  using S = ArithmeticOf<T>;
  Key<T>* keys = (Key<T>*)state.keys(a.layout);
  make_keys<Threads>(a, scores, keys);
  Threads::sync();
  if (Threads::warp() == 0) {
    const Key<T> kth = kth_largest(keys, a.looked_at, a.plan.rank, key_of<T>(-infinity<S>()));
    if (lane_of() == 0) state.scratch[0] = (int64_t)kth;
  }
  Threads::sync();
  const S cut = score_of<T>((Key<T>)state.scratch[0]);
  Threads::sync();
  return cut < infinity<S>() ? cut : -infinity<S>();
}

}  // namespace
}  // namespace topk_fast
