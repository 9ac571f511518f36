// The classes at or below the cut: arrivals of a Poisson process at falling levels of noise, a warp a sample.
//
// The sampler is that of topk_fast/reference.py. An arrival that `time_bound` rules out ends the walk, and its score is
// not read.
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
__device__ bool follow(const Arrival<S>& mine, const Best<S>& best) {
  const int lane = (int)(threadIdx.x % 32);
  for (int next = 0;;) {  // the first lane that is not dealt with
    const bool ahead = lane >= next;
    const bool good = mine.fits && best.better(mine.value, mine.class_id, best.worst(), best.worst_class());
    const unsigned ends = __ballot_sync(kFull, ahead && !(mine.level > best.worst()));
    const unsigned enters = __ballot_sync(kFull, ahead && good);
    const int stop = ends ? __ffs(ends) - 1 : 32, first = enters ? __ffs(enters) - 1 : 32;
    if (first >= stop) return stop < 32;
    const S v = __shfl_sync(kFull, mine.value, first);
    const int32_t c = __shfl_sync(kFull, mine.class_id, first);
    if (best.place_of(c) == best.k) best.enter(v, c);
    next = first + 1;
  }
}

// Enters a sample's arrivals into its list until none can enter any more.
template <class L, class T, class S>
__device__ void walk(const Row<T>& row, int64_t sample, float inverse_l, const Best<S>& best) {
  const int lane = (int)(threadIdx.x % 32);
  int64_t sum = 0;
  for (uint32_t pair = 0;; pair += 16) {
    const Words w = row.words(pair + (uint32_t)(lane / 2), (uint32_t)sample, 1 + (uint32_t)row.first_class);
    const uint32_t gap_word = lane % 2 ? w.w2 : w.w0, class_word = lane % 2 ? w.w3 : w.w1;
    const int64_t time = sum + sum_to_lane((int64_t)gap<Scalar>((int32_t)gap_word));
    sum = __shfl_sync(kFull, time, 31);
    const float e = arrival_time(time, inverse_l);
    const bool matters = e <= time_bound<L, Scalar>((float)row.cut, (float)best.worst(), row.rough_epsilon);
    if (__ballot_sync(kFull, matters) == 0) return;
    const int32_t drawn = (int32_t)(((uint64_t)class_word * (uint64_t)row.scores.n) >> 32);
    const S shift = (S)L::template level<Scalar>(e) * row.epsilon;
    const S clean = matters ? row.scores[drawn] : -infinity<S>();
    const S value = clean + shift;
    const bool fits = clean <= row.cut && value > -infinity<S>();
    if (follow<S>({row.cut + shift, value, drawn + row.first_class, fits}, best)) return;
  }
}

}  // namespace
}  // namespace topk_fast
