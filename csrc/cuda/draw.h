// The draws of a row's contenders, for several samples side by side.
//
// Threads share the contenders, four draws a call of noise.h's `philox`. Words that pass a bound wait in their sample's
// list of survivors until a warp turns them into noise; a word that `word_bound` drops could not have entered.
#pragma once

#include "../bounds.h"
#include "best.h"
#include "collect.h"

namespace topk_fast {
namespace {

constexpr int kFirstTile = 32;  // contenders whose draws make the first bound

struct Samples {
  int64_t first;
  int count;
};

// Words that passed their bounds, a list a sample.
struct Survivors {
  Survivor* lists;  // [samples, capacity]
  int* counts;      // [kSamples]
  int capacity;

  // Appends those of a warp's words that passed.
  __device__ __forceinline__ void append(int sample, bool passed, Survivor mine) const {
    const unsigned mask = __ballot_sync(kFull, passed);
    if (!mask) return;
    int at = 0;
    if (threadIdx.x % 32 == 0) at = atomicAdd(&counts[sample], __popc(mask));
    at = __shfl_sync(kFull, at, 0) + __popc(mask & lanes_before());
    if (passed) lists[sample * capacity + at] = mine;
  }
  __device__ __forceinline__ int longest(int samples) const {
    int most = 0;
    for (int b = 0; b < samples; ++b) most = counts[b] > most ? counts[b] : most;
    return most;
  }
};

// Draws the noise of a sample's survivors and enters the noised scores into its list.
template <class L, class T, class S>
__device__ void absorb(const Row<T>& row, const Survivor* survivors, int count, const Best<S>& best) {
  for (int start = 0; start < count; start += 32) {
    const int at = start + (int)(threadIdx.x % 32);
    S value = -infinity<S>();
    int32_t class_id = 0;
    if (at < count) {
      const Survivor s = survivors[at];
      const Contender<S> c = row.contender(s.contender);
      value = c.score + row.epsilon * (S)L::template draw<Scalar>((int32_t)s.word);
      class_id = c.class_id + row.first_class;
    }
    best.enter_lanes(at < count && value > -infinity<S>(), value, class_id);
  }
}

// Draws the words of the contenders [done, done + tile) and keeps the survivors: those that can lift their contender to
// `reach`. True where this thread's contender is NaN.
template <class L, int TEAM, class T, class S>
__device__ __forceinline__ bool draw_tile(const Row<T>& row, int32_t done, int tile, Samples samples, S reach,
                                          const Survivors& survivors) {
  const int rank = Team<TEAM>::rank();
  const int32_t i = done + rank;
  const bool here = rank < tile && i < row.n;
  Contender<S> c = {-infinity<S>(), 0};
  if (here) c = row.contender(i);
  int32_t bound = -1;
  if (here && c.score > row.cut) bound = word_bound<L, Scalar>((float)c.score, (float)reach, row.rough_epsilon);
  for (int quad = 0; quad * 4 < samples.count; ++quad) {
    const Words w = row.words((uint32_t)(c.class_id + row.first_class), (uint32_t)(samples.first / 4 + quad), 0);
    const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
    for (int j = 0; j < 4; ++j) {
      if (quad * 4 + j >= samples.count) break;
      survivors.append(quad * 4 + j, (int32_t)(words[j] >> 8) <= bound, {words[j], i});
    }
  }
  return c.score != c.score;
}

// The k best of every sample's contenders into its list. True where a contender is NaN.
template <class L, int TEAM, class T, class S>
__device__ bool draw(const Row<T>& row, Samples samples, const Survivors& survivors, const Lists<S>& lists,
                     int64_t* scratch) {
  using Threads = Team<TEAM>;
  const int rank = Threads::rank();
  for (int b = Threads::warp(); b < samples.count; b += TEAM / 32) lists[b].clear();
  if (rank < kSamples) survivors.counts[rank] = 0;
  Threads::sync();
  S reach = -infinity<S>();  // every sample's k-th best is at least this
  bool nan = false;
  int32_t done = 0;
  while (done < row.n) {
    // Tiles until some sample's list is nearly full; the first is small, for it makes the first bound.
    int waiting = 0;
    do {
      const int tile = done == 0 ? kFirstTile : TEAM;
      nan |= draw_tile<L, TEAM>(row, done, tile, samples, reach, survivors);
      done += tile;
      Threads::sync();
      waiting = survivors.longest(samples.count);
      Threads::sync();
    } while (done > kFirstTile && done < row.n && waiting + TEAM <= survivors.capacity);
    for (int b = Threads::warp(); b < samples.count; b += TEAM / 32)
      absorb<L>(row, survivors.lists + b * survivors.capacity, survivors.counts[b], lists[b]);
    Threads::sync();
    reach = infinity<S>();
    for (int b = 0; b < samples.count; ++b) {
      const S worst = lists[b].worst();
      reach = worst < reach ? worst : reach;
    }
    if (rank < kSamples) survivors.counts[rank] = 0;
    Threads::sync();
  }
  return Threads::reduce((int)nan, scratch, Most<int>()) != 0;
}

}  // namespace
}  // namespace topk_fast
