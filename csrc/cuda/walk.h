// The classes at or below the cut: arrivals of a Poisson process at falling levels of noise, a warp a sample.
//
// The sampler is that of topk_fast/reference.py. A call of noise.h's `philox` has the words of two arrivals, and a lane
// takes both: a batch has 64. Scores of arrivals after the one that ends the walk are not read.
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

// Enters the lanes' arrivals in order while they can matter, both of a lane before those of the next one; true where
// one ended the walk.
template <class S>
__device__ __forceinline__ bool follow(const Arrival<S> (&mine)[2], Best<S>& best) {
  const auto enters = [&best](const Arrival<S>& x) { return x.fits && best.admits(x.value, x.class_id); };
  for (int done = 0;;) {  // how many of this lane's are dealt with
    const bool ends_first = !(mine[0].level > best.worst), enters_first = enters(mine[0]);
    const bool second = done || !(ends_first || enters_first);
    const bool ends = done < 2 && (second ? !(mine[1].level > best.worst) : ends_first);
    const bool comes = done < 2 && !ends && (second ? enters(mine[1]) : enters_first);
    const unsigned ending = __ballot_sync(kFull, ends), coming = __ballot_sync(kFull, comes);
    const int stop = ending ? first_lane(ending) : 32, first = coming ? first_lane(coming) : 32;
    if (first >= stop) return stop < 32;
    const S v = __shfl_sync(kFull, second ? mine[1].value : mine[0].value, first);
    const int32_t c = __shfl_sync(kFull, second ? mine[1].class_id : mine[0].class_id, first);
    if (!best.has(c)) best.enter(v, c);
    if (lane_of() <= first) done = lane_of() < first || second ? 2 : 1;
  }
}

// The sum of the times up to this lane's.
__device__ __forceinline__ int64_t time_to_lane(int32_t time) {
  if (__any_sync(kFull, time >> 27)) return sum_to_lane((int64_t)time);
  return sum_to_lane((uint32_t)time);  // 32 of them stay below 2^32
}

// Enters a sample's arrivals into its list until none can enter any more.
template <class L, class T, class S>
__device__ __forceinline__ void walk(const Row<T>& row, int64_t sample, float inverse_l, Best<S> best) {
  const uint32_t lane = (uint32_t)lane_of();
  int64_t sum = 0;
#pragma unroll 1
  for (uint32_t first = 0;; first += 32) {  // pairs of arrivals before the batch
    const Words w = row.words(first + lane, (uint32_t)sample, 1 + (uint32_t)row.first_class);
    const uint32_t class_words[2] = {w.w1, w.w3};
    const int32_t last_gap = gap<Scalar>((int32_t)w.w2);
    const int64_t time = sum + time_to_lane(gap<Scalar>((int32_t)w.w0) + last_gap);
    sum = __shfl_sync(kFull, time, 31);
    S shift[2];
    Arrival<S> mine[2];
    for (int j = 0; j < 2; ++j) {
      shift[j] = (S)L::template level<Scalar>(arrival_time(j ? time : time - last_gap, inverse_l)) * row.epsilon;
      mine[j].level = row.cut + shift[j];
      mine[j].class_id = (int32_t)(((uint64_t)class_words[j] * (uint64_t)row.scores.n) >> 32);
    }
    const unsigned ends = __ballot_sync(kFull, !(mine[0].level > best.worst && mine[1].level > best.worst));
    bool comes = (ends & lanes_before()) == 0;  // no arrival so far ends the walk
    S clean[2];
    for (int j = 0; j < 2; ++j) {
      comes = comes && mine[j].level > best.worst;
      clean[j] = comes ? row.scores[mine[j].class_id] : -infinity<S>();
    }
    for (int j = 0; j < 2; ++j) {
      mine[j].value = clean[j] + shift[j];
      mine[j].fits = clean[j] <= row.cut && mine[j].value > -infinity<S>();
      mine[j].class_id += row.first_class;
    }
    if (follow<S>(mine, best)) break;
  }
  best.store();
}

}  // namespace
}  // namespace topk_fast
