// The classes at or below the cut: arrivals of a Poisson process at falling levels of noise, a warp a sample.
//
// The sampler is that of topk_fast/reference.py. A call of noise.h's `philox` has the words of two arrivals. Many walks
// end in a first batch of 32, one for each lane; later batches are 64, so that a longer walk waits less often. Scores
// of arrivals after the one that ends the walk are not read.
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

// Enters the lanes' arrivals in order while they can matter, all of a lane before those of the next one; true where
// one ended the walk.
template <int A, class S>
__device__ __forceinline__ bool follow(const Arrival<S> (&mine)[A], Best<S>& best) {
  const auto enters = [&best](const Arrival<S>& x) { return x.fits && best.admits(x.value, x.class_id); };
  constexpr int kLast = A - 1;
  for (int done = 0;;) {  // how many of this lane's are dealt with
    const bool ends_first = !(mine[0].level > best.worst), enters_first = enters(mine[0]);
    const bool last = A == 1 || done || !(ends_first || enters_first);
    const bool ends = done < A && (last ? !(mine[kLast].level > best.worst) : ends_first);
    const bool comes = done < A && !ends && (last ? enters(mine[kLast]) : enters_first);
    const unsigned ending = __ballot_sync(kFull, ends), coming = __ballot_sync(kFull, comes);
    const int stop = ending ? first_lane(ending) : 32, first = coming ? first_lane(coming) : 32;
    if (first >= stop) return stop < 32;
    const S v = __shfl_sync(kFull, last ? mine[kLast].value : mine[0].value, first);
    const int32_t c = __shfl_sync(kFull, last ? mine[kLast].class_id : mine[0].class_id, first);
    if (!best.has(c)) best.enter(v, c);
    if (lane_of() <= first) done = lane_of() < first || last ? A : 1;
  }
}

// The sum of the times up to this lane's.
__device__ __forceinline__ int64_t time_to_lane(int32_t time) {
  if (__any_sync(kFull, time >> 27)) return sum_to_lane((int64_t)time);
  return sum_to_lane((uint32_t)time);  // 32 of them stay below 2^32
}

// Enters the next arrivals, A of each lane by their words, which come `sum` after the start; true where one ended the
// walk.
template <class L, int A, class T, class S>
__device__ __forceinline__ bool enter_batch(const Row<T>& row, const uint32_t (&gap_words)[A],
                                            const uint32_t (&class_words)[A], float inverse_l, int64_t& sum,
                                            Best<S>& best) {
  const int32_t first_gap = gap<Scalar>((int32_t)gap_words[0]), last_gap = gap<Scalar>((int32_t)gap_words[A - 1]);
  const int64_t last = sum + time_to_lane(A == 1 ? last_gap : first_gap + last_gap);
  sum = __shfl_sync(kFull, last, 31);
  S shift[A], clean[A];
  Arrival<S> mine[A];
  bool goes_on = true;
  for (int j = 0; j < A; ++j) {
    const int64_t time = j == A - 1 ? last : last - last_gap;
    shift[j] = (S)L::template level<Scalar>(arrival_time(time, inverse_l)) * row.epsilon;
    mine[j].level = row.cut + shift[j];
    mine[j].class_id = (int32_t)(((uint64_t)class_words[j] * (uint64_t)row.scores.n) >> 32);
    goes_on &= mine[j].level > best.worst;
  }
  bool comes = (__ballot_sync(kFull, !goes_on) & lanes_before()) == 0;  // no arrival so far ends the walk
  for (int j = 0; j < A; ++j) {
    comes = comes && mine[j].level > best.worst;
    clean[j] = comes ? row.scores[mine[j].class_id] : -infinity<S>();
  }
  for (int j = 0; j < A; ++j) {
    mine[j].value = clean[j] + shift[j];
    mine[j].fits = clean[j] <= row.cut && mine[j].value > -infinity<S>();
    mine[j].class_id += row.first_class;
  }
  return follow<A, S>(mine, best);
}

// Enters a sample's arrivals into its list until none can enter any more.
template <class L, class T, class S>
__device__ __forceinline__ void walk(const Row<T>& row, int64_t sample, float inverse_l, Best<S> best) {
  const uint32_t lane = (uint32_t)lane_of();
  const auto words = [&](uint32_t pair) { return row.words(pair, (uint32_t)sample, 1 + (uint32_t)row.first_class); };
  int64_t sum = 0;
  Words w = words(lane / 2);
  bool over = enter_batch<L, 1>(row, {lane % 2 ? w.w2 : w.w0}, {lane % 2 ? w.w3 : w.w1}, inverse_l, sum, best);
#pragma unroll 1
  for (uint32_t pair = 16 + lane; !over; pair += 32) {
    w = words(pair);
    over = enter_batch<L, 2>(row, {w.w0, w.w2}, {w.w1, w.w3}, inverse_l, sum, best);
  }
  best.store();
}

}  // namespace
}  // namespace topk_fast
