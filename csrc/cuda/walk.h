// The classes at or below the cut: arrivals of a Poisson process at falling levels of noise, a warp a sample.
//
// The sampler is that of topk_fast/reference.py. A call of noise.h's `philox` has the words of two arrivals: each lane
// makes one, which serves two batches of 32. Scores of arrivals after the one that ends the walk are not read.
#pragma once

#include "draw.h"

namespace topk_fast {
namespace {

template <class S>
struct Arrival {
  S level;  // of the cut: no later arrival's value exceeds it
  S value;
  int32_t class_id;
  bool fits;  // it is not a contender's
};

// Enters the lanes' arrivals in order while they can matter; true where one ended the walk.
template <class S>
__device__ __forceinline__ bool follow(const Arrival<S>& mine, Best<S>& best) {
  for (unsigned ahead = kFull;;) {  // the lanes that are not dealt with
    const unsigned ends = ahead & __ballot_sync(kFull, !(mine.level > best.worst));
    const unsigned enters = ahead & __ballot_sync(kFull, mine.fits && best.admits(mine.value, mine.class_id));
    const int stop = ends ? first_lane(ends) : 32, first = enters ? first_lane(enters) : 32;
    if (first >= stop) return stop < 32;
    const S v = __shfl_sync(kFull, mine.value, first);
    const int32_t c = __shfl_sync(kFull, mine.class_id, first);
    if (!best.has(c)) best.enter(v, c);
    ahead &= ~1u << first;
  }
}

// The sum of the gaps up to this lane's.
__device__ __forceinline__ int64_t time_to_lane(int32_t gap) {
  if (__any_sync(kFull, gap >> 27)) return sum_to_lane((int64_t)gap);
  return sum_to_lane((uint32_t)gap);  // 32 of them stay below 2^32
}

// Enters a sample's arrivals into its list until none can enter any more.
template <class L, class T, class S>
__device__ __forceinline__ void walk(const Row<T>& row, int64_t sample, float inverse_l, Best<S> best) {
  const int lane = lane_of();
  int64_t sum = 0;
  Words w{};
#pragma unroll 1
  for (uint32_t batch = 0;; ++batch) {  // of 32 arrivals
    if (batch % 2 == 0) w = row.words(batch * 16 + (uint32_t)lane, (uint32_t)sample, 1 + (uint32_t)row.first_class);
    const int from = (int)(batch % 2) * 16 + lane / 2;
    const uint32_t gap_words[2] = {__shfl_sync(kFull, w.w0, from), __shfl_sync(kFull, w.w2, from)};
    const uint32_t class_words[2] = {__shfl_sync(kFull, w.w1, from), __shfl_sync(kFull, w.w3, from)};
    const int64_t time = sum + time_to_lane(gap<Scalar>((int32_t)(lane % 2 ? gap_words[1] : gap_words[0])));
    sum = __shfl_sync(kFull, time, 31);
    const S shift = (S)L::template level<Scalar>(arrival_time(time, inverse_l)) * row.epsilon;
    const S level = row.cut + shift;
    const unsigned ends = __ballot_sync(kFull, !(level > best.worst));
    if (ends & 1) break;
    const uint32_t class_word = lane % 2 ? class_words[1] : class_words[0];
    const int32_t drawn = (int32_t)(((uint64_t)class_word * (uint64_t)row.scores.n) >> 32);
    const bool comes = (ends & (2u * lanes_before() + 1)) == 0;  // neither this lane nor one before it ends the walk
    const S clean = comes ? row.scores[drawn] : -infinity<S>();
    const S value = clean + shift;
    const bool fits = clean <= row.cut && value > -infinity<S>();
    if (follow<S>({level, value, drawn + row.first_class, fits}, best)) break;
  }
  best.store();
}

}  // namespace
}  // namespace topk_fast
