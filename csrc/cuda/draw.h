// The draws of a row's contenders, for several samples side by side.
//
// Threads share the contenders, four draws a call of noise.h's `philox`. The 32 contenders that are likely to be high,
// the pilot, are drawn first: their k-th best gives `reach`, which every sample's k-th best attains. A word that cannot
// lift its contender to `reach` is dropped by a comparison (`word_bound`); the others, the survivors, wait in their
// sample's list until a warp turns them into noise, 32 at a time.
#pragma once

#include "../bounds.h"
#include "collect.h"

namespace topk_fast {
namespace {

// Moves contenders with a score above `high` to the front of the list, kPilot at most, by one warp. Returns how many
// contenders the pilot has: the first ones where fewer than k are that high.
template <class S>
__device__ int bring_forward(Contender<S>* list, int n, S high, int k, int32_t* pilot) {
  const int lane = lane_of(), all = n < kPilot ? n : kPilot;
  int found = 0;
  for (int start = 0; start < n && found < kPilot; start += 32) {
    const int i = start + lane;
    const bool is_high = i < n && list[i].score > high;
    const unsigned mask = __ballot_sync(kFull, is_high);
    const int place = found + __popc(mask & lanes_before());
    if (is_high && place < kPilot) pilot[place] = i;
    found += __popc(mask);
  }
  found = found < kPilot ? found : kPilot;
  if (found < k) return all;
  __syncwarp();
  // The high ones ascend: those that lie in front already come first, the others take the places that are left.
  const int mine = lane < found ? pilot[lane] : n;
  const int in_front = __popc(__ballot_sync(kFull, mine < found));
  const bool is_free = lane < found && !(list[lane].score > high);
  const unsigned free = __ballot_sync(kFull, is_free);
  const int other = __shfl_sync(kFull, mine, (in_front + __popc(free & lanes_before())) % 32);
  if (is_free) {
    const Contender<S> low = list[lane];
    list[lane] = list[other], list[other] = low;
  }
  __syncwarp();
  return found;
}

// Draws the words of `tile` contenders of the list from `done` on and keeps the survivors. All words survive where
// `reach` is -inf, and then no others wait.
template <class L, int TEAM, class T>
__device__ __forceinline__ void draw_tile(const Args& a, State<T>& state, int done, int tile) {
  using S = ArithmeticOf<T>;
  const S reach = state.reach;
  const int rank = Team<TEAM>::rank();
  if (rank - lane_of() >= tile) return;
  const Row<T>& row = state.row;
  const bool here = rank < tile, all = reach == -infinity<S>();
  const Contender<S> c = here ? state.listed.at[done + rank] : Contender<S>{-infinity<S>(), 0};
  int32_t bound = here ? 0x7fffffff : -1;
  if (here && !all) bound = word_bound<L, Scalar>((float)c.score, (float)reach, row.rough_epsilon);
#pragma unroll 1
  for (int quad = 0; quad * 4 < state.n_samples; ++quad) {
    const Words w = row.words((uint32_t)(c.class_id + row.first_class), (uint32_t)(state.first_sample / 4 + quad), 0);
    const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
    const int samples = state.n_samples - quad * 4;
    int32_t* counts = state.counts + quad * 4;
    Survivor* survivors = state.survivors(a.layout, quad * 4);
    for (int j = 0; j < 4; ++j) {
      if ((int32_t)(words[j] >> 8) > bound || j >= samples) continue;
      const int place = all ? rank : atomicAdd(counts + j, 1);
      if (place < a.layout.held) survivors[j * a.layout.held + place] = {words[j], done + rank};
    }
  }
  if (all && rank < state.n_samples) state.counts[rank] = tile;
}

// A survivor's noised score and class; (-inf, -1) where a sample has no such survivor.
template <class L, class T>
__device__ __forceinline__ Contender<ArithmeticOf<T>> noised(const Args& a, State<T>& state, int sample, int survivor) {
  using S = ArithmeticOf<T>;
  if (survivor >= state.counts[sample]) return {-infinity<S>(), -1};
  const Survivor mine = state.survivors(a.layout, sample)[survivor];
  const Contender<S> c = state.listed.at[mine.contender];
  const S draw = (S)L::template draw<Scalar>((int32_t)mine.word);
  return {c.score + state.row.epsilon * draw, c.class_id + state.row.first_class};
}

// A sample's list, with the noised scores of its survivors entered.
template <class L, class T>
__device__ __forceinline__ Best<ArithmeticOf<T>> absorb(const Args& a, State<T>& state, int sample) {
  using S = ArithmeticOf<T>;
  Best<S> best(state.lists, sample);
#pragma unroll 1
  for (int start = 0; start < state.counts[sample]; start += 32) {
    const Contender<S> mine = noised<L>(a, state, sample, start + lane_of());
    best.take(mine.score > -infinity<S>(), mine.score, mine.class_id);
  }
  return best;
}

// Leaves each sample the k best survivors of its pilot. Returns the least of the k-th, over a warp's samples.
template <class L, int TEAM, class T>
__device__ __forceinline__ ArithmeticOf<T> best_of_pilot(const Args& a, State<T>& state) {
  using S = ArithmeticOf<T>;
  auto least = ordered(infinity<S>());
#pragma unroll 1
  for (int b = Team<TEAM>::warp(); b < state.n_samples; b += Team<TEAM>::kWarps) {
    Survivor* survivors = state.survivors(a.layout, b);
    const Survivor mine = survivors[lane_of()];
    const auto own = ordered(noised<L>(a, state, b, lane_of()).score);
    auto key = own, kth = own;
#pragma unroll 1
    for (int left = state.lists.k; left > 0;) {
      kth = most_of_lanes(key);
      left -= __popc(__ballot_sync(kFull, key == kth));
      if (key == kth) key = ordered(-infinity<S>());
    }
    least = kth < least ? kth : least;
    const unsigned kept = __ballot_sync(kFull, own >= kth);
    if (own >= kth) survivors[__popc(kept & lanes_before())] = mine;
    if (lane_of() == 0) state.counts[b] = __popc(kept);
  }
  return unordered(least);
}

// The value that every sample's k-th best attains.
template <class S>
__device__ __forceinline__ S reach_of(const Lists<S>& lists, int samples) {
  const int lane = lane_of();
  const auto key = ordered(lane < samples ? lists.worst(lane) : infinity<S>());
  return unordered(~most_of_lanes(~key));
}

// Enters the listed contenders into every sample's list and raises `reach`; of the `last` contenders of a row survivors
// may be left. A tile with more survivors than there is room for is drawn again, after those before it were absorbed or
// in parts.
template <class L, int TEAM, class T>
__device__ void draw(const Args& a, State<T>& state, bool last) {
  using Threads = Team<TEAM>;
  using S = ArithmeticOf<T>;
  const int rank = Threads::rank(), n = state.listed.n;
  int done = 0, tile = kPilot, most = TEAM;
  bool waiting = false;  // survivors
  if (rank < kSamples) state.counts[rank] = 0;
  if (state.reach == -infinity<S>() && n > kPilot) {
    if (Threads::warp() == 0) {
      // As many as the pilot has exceed this, if scores have an exponential tail.
      const S high = state.row.cut + state.listed.above_cut * (S)ln<Scalar>((float)n / kPilot);
      tile = bring_forward(state.listed.at, n, high, state.lists.k, state.pilot);
      if (lane_of() == 0) state.scratch[0] = tile;
    }
    Threads::sync();
    tile = (int)state.scratch[0];
    if (tile >= state.lists.k) {
      draw_tile<L, TEAM>(a, state, 0, tile);
      Threads::sync();
      S reach = best_of_pilot<L, TEAM>(a, state);
      S* of_warps = (S*)state.scratch;
      if (lane_of() == 0) of_warps[Threads::warp()] = reach;
      Threads::sync();
      for (int w = 0; w < Threads::kWarps; ++w) reach = of_warps[w] < reach ? of_warps[w] : reach;
      if (rank == 0) state.reach = reach;
      done = tile, tile = most, waiting = true;
    }
  }
  Threads::sync();
#pragma unroll 1
  while (done < n) {
    tile = tile < n - done ? tile : n - done;
    const int before = rank < kSamples ? state.counts[rank] : 0;
    Threads::sync();
    draw_tile<L, TEAM>(a, state, done, tile);
    Threads::sync();
    const bool over = __any_sync(kFull, lane_of() < state.n_samples && state.counts[lane_of()] > a.layout.held);
    Threads::sync();
    if (over && rank < kSamples) state.counts[rank] = before;
    if (over && !waiting) most = kPilot;  // as many as fit
    if (!over) done += tile;
    if (over ? waiting : done < n ? state.reach == -infinity<S>() : !last) {
      Threads::sync();
#pragma unroll 1
      for (int b = Threads::warp(); b < state.n_samples; b += Threads::kWarps) absorb<L>(a, state, b).store();
      Threads::sync();
      const S reach = reach_of(state.lists, state.n_samples);
      if (rank == 0 && reach > state.reach) state.reach = reach;
      if (rank < kSamples) state.counts[rank] = 0;
      waiting = false;
    } else {
      waiting = !over;
    }
    Threads::sync();
    tile = state.reach > -infinity<S>() ? most : kPilot;
  }
}

}  // namespace
}  // namespace topk_fast
