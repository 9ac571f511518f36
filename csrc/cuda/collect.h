// The contenders of a row: the classes above its cut, which get draws of their own, from one pass over its scores.
//
// Scores come in 16-byte loads, kUnroll of them in flight in each thread. With few long rows, several blocks collect a
// row, each its part (kernels.cu).
#pragma once

#include "cut.h"

namespace topk_fast {
namespace {

constexpr int kUnroll = 4;

// A row as the stages of its search see it.
template <class T>
struct Row {
  using S = ArithmeticOf<T>;
  Scores<T> scores;
  S cut;
  bool direct;                // contenders are read from the row, not from the lists
  const Contender<S>* lists;  // [segments, capacity]
  const int32_t* prefix;      // [segments + 1]: how many contenders stand before each segment
  int segments, capacity;
  int32_t n;  // contenders, or classes of a row that is read directly
  uint32_t number, key0, key1;
  int32_t first_class;
  S epsilon;
  float rough_epsilon;  // as the bounds take it

  __device__ __forceinline__ Contender<S> contender(int32_t i) const {
    if (direct) return {scores[i], i};
    int low = 0, high = segments;  // the segment with prefix[low] <= i < prefix[low + 1]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (prefix[middle] <= i)
        low = middle;
      else
        high = middle;
    }
    return lists[(int64_t)low * capacity + (i - prefix[low])];
  }
  __device__ __forceinline__ Words words(uint32_t c0, uint32_t c2, uint32_t stream) const {
    return philox(c0, number, c2, stream, key0, key1);
  }
};

// Bits of the scores of a vector that are above the cut, or NaN.
template <class T, class S>
__device__ __forceinline__ unsigned above(const T (&x)[16 / sizeof(T)], S cut) {
  unsigned hits = 0;
  for (int i = 0; i < (int)(16 / sizeof(T)); ++i) hits |= !(widen(x[i]) <= cut) ? 1u << i : 0u;
  return hits;
}

// Keeps the classes [begin, end) above the cut, with their scores, in this warp's list of `capacity` entries. Returns
// how many there are, or -1 where a score is NaN. A scan over the lanes gives each its place: lists are the same in
// every run.
template <int TEAM, class T>
__device__ int collect(const Scores<T>& scores, int64_t begin, int64_t end, ArithmeticOf<T> cut,
                       Contender<ArithmeticOf<T>>* list, int capacity) {
  using S = ArithmeticOf<T>;
  constexpr int W = 16 / sizeof(T);
  const bool packed = scores.stride == 1;
  int count = 0;
  bool nan = false;
  // Places are class + lead, so that base + a multiple of W is a multiple of 16 bytes.
  const int lead = packed ? (int)((uintptr_t)(scores.at + begin) % 16 / sizeof(T)) : 0;
  const T* base = scores.at + (begin - lead) * scores.stride;
  const int64_t n = end - begin + lead;
  for (int64_t start = 0; start < n; start += TEAM * W * kUnroll) {
    T x[kUnroll][W];
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t p = start + (int64_t)(u * TEAM + Team<TEAM>::rank()) * W;
      if (packed && p >= lead && p + W <= n) {
        const uint4 v = *(const uint4*)(base + p);
        memcpy(x[u], &v, 16);
      } else {
        for (int i = 0; i < W; ++i) {
          x[u][i] = T{};
          if (p + i >= lead && p + i < n) x[u][i] = base[(p + i) * scores.stride];
        }
      }
    }
    unsigned hits = 0;  // bit u * W + i: score i of vector u
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t p = start + (int64_t)(u * TEAM + Team<TEAM>::rank()) * W;
      unsigned mask = above<T, S>(x[u], cut);
      if (mask && (p < lead || p + W > n))  // vectors at the ends read positions outside the row
        for (int i = 0; i < W; ++i)
          if (p + i < lead || p + i >= n) mask &= ~(1u << i);
      hits |= mask << u * W;
    }
    if (!__ballot_sync(kFull, hits != 0)) continue;
    const int end_of_own = count + sum_to_lane(__popc(hits));
    int to = end_of_own - __popc(hits);
    count = __shfl_sync(kFull, end_of_own, 31);
    for (; hits; hits &= hits - 1, ++to) {  // a score is read again: the registers have no index
      const int bit = __ffs(hits) - 1;
      const int64_t c = begin - lead + start + (int64_t)(bit / W * TEAM + Team<TEAM>::rank()) * W + bit % W;
      const S score = scores[c];
      nan |= score != score;
      if (to < capacity) list[to] = {score, (int32_t)c};
    }
  }
  return __ballot_sync(kFull, nan) ? -1 : count;
}

// Whether fewer scores of the row than `wanted` are above -inf.
template <int TEAM, class T>
__device__ bool finite_are_fewer(const Scores<T>& scores, int64_t wanted, int64_t* scratch) {
  int64_t finite = 0;
  for (int64_t start = 0; start < scores.n && finite < wanted; start += 64 * TEAM) {
    int64_t here = 0;
    for (int64_t c = start + Team<TEAM>::rank(); c < scores.n && c < start + 64 * TEAM; c += TEAM)
      here += scores[c] > -infinity<ArithmeticOf<T>>();
    finite += Team<TEAM>::reduce(here, scratch, Sum<int64_t>());
  }
  return finite < wanted;
}

}  // namespace
}  // namespace topk_fast
