// The search of a row through its stages: cut, contenders, draws and walks, samples side by side, and the results.
#pragma once

#include "walk.h"

namespace topk_fast {
namespace {

// The contenders that the parts of a row found into its team's list; a barrier, too.
template <class Threads, class T, class S>
__device__ void gather(const Args& a, const Parts<S>& parts, State<T>& state) {
  auto& listed = state.listed;
  Found<S> found{(S)0, false};
  int n = 0;
  for (int part = 0; part < a.layout.parts; ++part) {
    const int count = parts.counts[part];
#pragma unroll 1
    for (int i = Threads::rank(); i < count; i += Threads::kSize) {
      const Contender<S> c = parts.list[(int64_t)part * a.layout.part_capacity + i];
      listed.at[n + i] = c;
      found.look_at(c.score, state.row.cut);
    }
    n += count;
  }
  if (Threads::rank() == 0) listed.found = n, listed.whole = true;
  end_list<Threads>(found, listed);
}

// Writes the whole lists of some samples; NaN and -2 in a row with a NaN.
template <class Threads, class T>
__device__ void write_lists(const Args& a, const State<T>& state) {
  using S = ArithmeticOf<T>;
  const Search& p = a.search;
  const bool nan = state.listed.nan;
  const int64_t first = (state.n * p.n_sample + state.first_sample) * p.k;
#pragma unroll 1
  for (int64_t i = Threads::rank(); i < state.n_samples * p.k; i += Threads::kSize) {
    ((S*)p.values)[first + i] = nan ? (S)__builtin_nan("") : state.lists.values[i];
    p.classes[first + i] = nan ? -2 : state.lists.classes[i];
  }
}

// The place in a list of the m-th rank's entry, and the one before it where the target is not among the better ones.
__device__ __forceinline__ int place_of_rank(const Search& p, int m, int place_of_target) {
  const int last = p.ranks[m] - 1;
  return p.exclude_target && place_of_target >= last ? last - 1 : last;
}

// Writes the class ids of some samples, and adds each rank's values to its sum, in the order of the samples.
template <class Threads, class T>
__device__ void write_ranks(const Args& a, State<T>& state) {
  const Search& p = a.search;
  const auto& lists = state.lists;
  int* places = state.counts;  // of the target, by sample
  if (p.exclude_target) {
    const int32_t y = (int32_t)p.target[state.n];
#pragma unroll 1
    for (int b = Threads::warp(); b < state.n_samples; b += Threads::kWarps) {
      const int place = lists.place_of(b, y);
      if (lane_of() == 0) places[b] = place;
    }
    Threads::sync();
  }
  int64_t* classes = p.classes + (state.n * p.n_sample + state.first_sample) * p.n_ranks;
#pragma unroll 1
  for (int i = Threads::rank(); i < state.n_samples * p.n_ranks; i += Threads::kSize) {
    const int b = i / p.n_ranks;
    classes[i] = lists.classes_of(b)[place_of_rank(p, i % p.n_ranks, places[b])];
  }
  const int m = Threads::rank();
  if (m >= p.n_ranks) return;
  auto sum = state.sums[m];
#pragma unroll 1
  for (int b = 0; b < state.n_samples; ++b) {
    const auto value = lists.values_of(b)[place_of_rank(p, m, places[b])];
    sum = state.first_sample + b == 0 ? value : sum + value;
  }
  state.sums[m] = sum;
}

// Writes the excesses of a row, lane m that of rank m. Where one is NaN, the class ids become -2.
template <class T>
__device__ void write_excess(const Args& a, const State<T>& state) {
  using S = ArithmeticOf<T>;
  const Search& p = a.search;
  const int m = lane_of();
  S excess = state.listed.nan ? (S)__builtin_nan("") : state.sums[m] * (S)a.inverse_b;
  if (p.target) excess -= state.row.scores[p.target[state.n]];
  if (m < p.n_ranks) ((S*)p.values)[state.n * p.n_ranks + m] = excess;
  if (!__any_sync(kFull, m < p.n_ranks && excess != excess) || m >= p.n_ranks) return;
#pragma unroll 1
  for (int64_t b = 0; b < p.n_sample; ++b) p.classes[(state.n * p.n_sample + b) * p.n_ranks + m] = -2;
}

// Writes the excesses and class ids of a row whose target is ignore_index.
template <class Threads, class S>
__device__ void write_ignored(const Search& p, int64_t n) {
  const int64_t ids = p.n_sample * p.n_ranks;
#pragma unroll 1
  for (int64_t i = Threads::rank(); i < ids; i += Threads::kSize) p.classes[n * ids + i] = -1;
#pragma unroll 1
  for (int m = Threads::rank(); m < p.n_ranks; m += Threads::kSize) ((S*)p.values)[n * p.n_ranks + m] = (S)0;
}

template <class T>
__device__ __forceinline__ Scores<T> scores_of(const Search& p, int64_t n) {
  return {(const T*)p.scores + n * p.row_stride, p.class_stride, p.n_classes};
}

// Starts the row's list of contenders: from its parts, or at its first tile. A barrier, too.
template <class Threads, class T>
__device__ void start_contenders(const Args& a, State<T>& state) {
  using S = ArithmeticOf<T>;
  const Parts<S> parts(a, state.n);
  bool in_parts = a.layout.parts > 1;
  const S cut = in_parts ? *parts.cut : a.planned ? cut_of<Threads>(a, state.row.scores, state) : -infinity<S>();
  for (int part = 0; in_parts && part < a.layout.parts; ++part) in_parts = parts.counts[part] >= 0;
  if (Threads::rank() == 0) {
    state.row.cut = cut;
    state.listed.nan = state.listed.whole = false;
  }
  Threads::sync();
  if (in_parts) gather<Threads>(a, parts, state);
}

// Lists the first or next contenders, or all of them from -inf on where the walk over the others might find too few.
template <class Threads, class T>
__device__ void next_contenders(const Args& a, State<T>& state, bool first) {
  using S = ArithmeticOf<T>;
  auto& listed = state.listed;
  for (;;) {
    bool whole = listed.whole;
    if (!whole) {
      if (!first) {
        if (Threads::rank() == 0) listed.found = 0;
        Threads::sync();
      }
      collect<Threads>(state);
      whole = first && listed.is_last();
      if (Threads::rank() == 0) listed.whole = whole;
    }
    if (!whole || listed.found >= a.search.k || state.row.cut == -infinity<S>()) return;
    if (!finite_are_fewer<Threads>(state.row.scores, a.plan.contenders, state.scratch)) return;
    Threads::sync();
    if (Threads::rank() == 0) {
      state.row.cut = -infinity<S>();
      start_pass(state, 0, 1);
    }
    Threads::sync();
  }
}

// Makes the lists of some samples from the row's contenders and arrivals.
template <class L, class Threads, class T>
__device__ void search_samples(const Args& a, State<T>& state) {
  using S = ArithmeticOf<T>;
#pragma unroll 1
  for (int b = Threads::warp(); b < state.n_samples; b += Threads::kWarps) state.lists.clear(b);
  for (bool first = true, last = false; !last; first = false) {
    next_contenders<Threads>(a, state, first);
    if (state.listed.nan) return;
    last = state.listed.is_last();
    draw<L, Threads>(a, state, last);
  }
#pragma unroll 1
  for (int b = Threads::warp(); b < state.n_samples; b += Threads::kWarps) {
    const Best<S> best = absorb<L>(a, state, b);
    if (state.row.cut > -infinity<S>())
      walk<L>(state.row, state.first_sample + b, a.inverse_l, best);
    else
      best.store();
  }
  Threads::sync();
}

// Searches a row for all samples and writes what is made of them.
template <class L, class Threads, class T>
__device__ void search_row(const Args& a, State<T>& state) {
  const Search& p = a.search;
  if (Threads::rank() == 0) {
    state.row.scores = scores_of<T>(p, state.n), state.row.number = (uint32_t)(p.first_row + state.n);
    state.first_sample = 0, state.n_samples = 0;
  }
  Threads::sync();
  start_contenders<Threads>(a, state);
#pragma unroll 1
  for (;;) {
    Threads::sync();
    if (Threads::rank() == 0) {
      state.first_sample += state.n_samples;
      const int64_t left = p.n_sample - state.first_sample;
      state.n_samples = left < a.layout.samples ? (int32_t)left : a.layout.samples;
      state.reach = -infinity<ArithmeticOf<T>>();
      if (!state.listed.whole) start_pass(state, 0, 1);
    }
    Threads::sync();
    if (state.n_samples == 0) break;
    search_samples<L, Threads>(a, state);
    if (!p.n_ranks)
      write_lists<Threads>(a, state);
    else if (!state.listed.nan)
      write_ranks<Threads>(a, state);
  }
  if (p.n_ranks && Threads::warp() == 0) write_excess(a, state);
}

}  // namespace
}  // namespace topk_fast
