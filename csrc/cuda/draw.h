// The draws of a row's contenders, for several samples side by side.
//
// Threads share the contenders, four draws a call of noise.h's `philox`. Some 32 contenders with high scores, the
// pilot, are drawn beforehand: their k-th best gives `reach`, which every sample's k-th best attains. A word that
// cannot lift its contender to `reach` is dropped by a comparison (`word_bound`); the others, the survivors, wait in
// their sample's list until a warp turns them into noise, 32 at a time.
#pragma once

#include "collect.h"

namespace topk_fast {
namespace {

// Notes which of a list's n contenders are the pilot; a barrier, too.
template <class Threads, class T>
__device__ __forceinline__ void pick_pilot(const Args& a, State<T>& state, int n) {
  using S = ArithmeticOf<T>;
  S above_cut = (S)0;
  for (int w = 0; w < Threads::kWarps; ++w) above_cut += state.listed.above_cut[w];
  const S high = state.row.cut + above_cut / (S)n * (S)a.pilot_above;
#pragma unroll 1
  for (int i = Threads::rank(); i < n; i += Threads::kSize) {
    if (!(state.listed.at[i].score > high)) continue;
    const int place = atomicAdd(&state.n_pilot, 1);
    if (place < kPilot) state.pilot[place] = i;
  }
  Threads::sync();
}

// Draws for the pilot, or for the first contenders of the list where it has fewer than k. Returns the least of the
// k-th best, over a warp's samples.
template <class L, class Threads, class T>
__device__ __forceinline__ ArithmeticOf<T> reach_of_pilot(const State<T>& state) {
  using S = ArithmeticOf<T>;
  const int lane = lane_of(), k = state.lists.k;
  const bool is_list = state.n_pilot < k, here = is_list || lane < state.n_pilot;
  const Contender<S> c = here ? state.listed.at[is_list ? lane : state.pilot[lane]] : Contender<S>{};
  const int share = (state.n_samples + Threads::kWarps - 1) / Threads::kWarps, begin = Threads::warp() * share;
  auto least = ordered(infinity<S>());
  Words w{};
#pragma unroll 1
  for (int b = begin; b < begin + share && b < state.n_samples; ++b) {
    if (b == begin || b % 4 == 0)
      w = state.row.words((uint32_t)(c.class_id + state.row.first_class), (uint32_t)(state.first_sample + b) / 4, 0);
    const uint32_t word = b % 4 < 2 ? (b % 4 ? w.w1 : w.w0) : b % 4 == 2 ? w.w2 : w.w3;
    const S draw = (S)L::template draw<Scalar>((int32_t)word);
    auto key = ordered(here ? c.score + state.row.epsilon * draw : -infinity<S>()), kth = key;
#pragma unroll 1
    for (int left = k; left > 0;) {
      kth = most_of_lanes(key);
      left -= __popc(__ballot_sync(kFull, key == kth));
      if (key == kth) key = ordered(-infinity<S>());
    }
    least = kth < least ? kth : least;
  }
  return unordered(least);
}

// Draws the words of `tile` contenders of the list from `done` on and keeps the survivors. All words survive where
// `reach` is -inf, and then no others wait.
template <class L, class Threads, class T>
__device__ __forceinline__ void draw_tile(const Args& a, State<T>& state, int done, int tile) {
  using S = ArithmeticOf<T>;
  const S reach = state.reach;
  const int rank = Threads::rank();
  const Row<T>& row = state.row;
  const bool all = reach == -infinity<S>();
#pragma unroll 1
  for (int i = rank; i < tile; i += Threads::kSize) {
    const Contender<S> c = state.listed.at[done + i];
    const int32_t bound = all ? 0x7fffffff : word_bound<L, Scalar>((float)c.score, (float)reach, row.rough_epsilon);
#pragma unroll 1
    for (int quad = 0; quad * 4 < state.n_samples; ++quad) {
      const Words w = row.words((uint32_t)(c.class_id + row.first_class), (uint32_t)(state.first_sample / 4 + quad), 0);
      const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
      const int samples = state.n_samples - quad * 4;
      int32_t* counts = state.counts + quad * 4;
      Survivor* survivors = state.survivors(a.layout, quad * 4);
      for (int j = 0; j < 4; ++j) {
        if ((int32_t)(words[j] >> 8) > bound || j >= samples) continue;
        const int place = all ? i : atomicAdd(counts + j, 1);
        if (place < a.layout.held) survivors[j * a.layout.held + place] = {words[j], done + i};
      }
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
template <class L, class Threads, class T>
__device__ void draw(const Args& a, State<T>& state, bool last) {
  using S = ArithmeticOf<T>;
  const int rank = Threads::rank(), n = state.listed.size();
  int done = 0, tile = kPilot, most = n < kDrawn ? n : kDrawn;
  bool waiting = false;  // survivors
  if (rank < kSamples) state.counts[rank] = 0;
  if (state.reach == -infinity<S>() && n > kPilot && state.lists.k <= kPilot) {
    pick_pilot<Threads>(a, state, n);
    S reach = reach_of_pilot<L, Threads>(state);
    S* of_warps = (S*)state.scratch;
    if (lane_of() == 0) of_warps[Threads::warp()] = reach;
    Threads::sync();
    for (int w = 0; w < Threads::kWarps; ++w) reach = of_warps[w] < reach ? of_warps[w] : reach;
    if (rank == 0) state.reach = reach, state.n_pilot = 0;
    tile = most;
  }
  Threads::sync();
#pragma unroll 1
  while (done < n) {
    tile = tile < n - done ? tile : n - done;
    const int before = rank < kSamples ? state.counts[rank] : 0;
    Threads::sync();
    draw_tile<L, Threads>(a, state, done, tile);
    Threads::sync();
    const bool over = __any_sync(kFull, lane_of() < state.n_samples && state.counts[lane_of()] > a.layout.held);
    Threads::sync();
    if (over && rank < kSamples) state.counts[rank] = before;
    if (over && !waiting) most = most > Threads::kSize ? Threads::kSize : kPilot;  // the latter fits
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
