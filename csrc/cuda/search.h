// The search of a row through its stages: cut, contenders, draws and walks, samples side by side, and the results.
#pragma once

#include "walk.h"

namespace topk_fast {
namespace {

// Copies a row's scores to shared memory, 16 bytes at a time where they lie side by side.
template <int TEAM, class T>
__device__ Scores<T> copy_row(const Scores<T>& row, T* kept) {
  constexpr int W = 16 / sizeof(T);
  const int lead = row.stride == 1 ? (int)((uintptr_t)row.at % 16 / sizeof(T)) : 0;
  const T* base = row.at - lead * row.stride;
  const int64_t n = row.n + lead;
  for (int64_t i = (int64_t)Team<TEAM>::rank() * W; i < n; i += TEAM * W) {
    if (row.stride == 1 && i >= lead && i + W <= n)
      *(uint4*)(kept + i) = *(const uint4*)(base + i);
    else
      for (int64_t j = i < lead ? lead : i; j < i + W && j < n; ++j) kept[j] = base[j * row.stride];
  }
  Team<TEAM>::sync();
  return {kept + lead, 1, row.n};
}

// Gives a row its cut and contenders, which its parts collected before or which are collected here. True where one is
// NaN.
template <int TEAM, class T, class S>
__device__ bool find_contenders(const Args& a, const Memory<S>& memory, int64_t n, Row<T>& row) {
  using Threads = Team<TEAM>;
  const int32_t* found = memory.prefix + 1;  // counts of the segments
  if (a.layout.parts > 1) {
    const char* header = header_of(a, n);
    row.cut = *(const S*)header;
    found = (const int32_t*)(header + 16);
  } else {
    row.cut = cut_of<TEAM>(a, row.scores, memory);
    Contender<S>* list = memory.lists + (int64_t)Threads::warp() * row.capacity;
    const int count = collect<TEAM>(row.scores, 0, row.scores.n, row.cut, list, row.capacity);
    if (Threads::lane() == 0) memory.prefix[1 + Threads::warp()] = count;
    Threads::sync();
  }
  int64_t total = 0;
  bool over = false, nan = false;
  for (int s = 0; s < row.segments; ++s) {
    nan |= found[s] < 0;
    over |= found[s] > row.capacity;
    total += found[s];
  }
  Threads::sync();  // all have read the counts
  if (Threads::rank() == 0) {
    int32_t sum = 0;
    for (int s = 0; s < row.segments; ++s) {
      const int32_t here = found[s];
      memory.prefix[s] = sum, sum += here;
    }
    memory.prefix[row.segments] = sum;
  }
  row.direct = over || row.cut == -infinity<S>();
  if (!nan && total < a.search.k && finite_are_fewer<TEAM>(row.scores, a.plan.contenders, memory.scratch))
    row.cut = -infinity<S>(), row.direct = true;
  if (!row.direct) row.n = (int32_t)total;
  Threads::sync();
  return nan;
}

// Writes the whole lists of some samples; NaN and -2 in a row with a NaN.
template <int TEAM, class S>
__device__ void write_lists(const Search& p, int64_t n, Samples samples, const Lists<S>& lists, bool nan) {
  for (int b = Team<TEAM>::warp(); b < samples.count; b += TEAM / 32)
    for (int i = Team<TEAM>::lane(); i < lists.k; i += 32) {
      const int64_t to = (n * p.n_sample + samples.first + b) * lists.k + i;
      ((S*)p.values)[to] = nan ? (S)__builtin_nan("") : lists[b].values[i];
      p.classes[to] = nan ? -2 : lists[b].classes[i];
    }
}

// Writes the class ids of some samples, thread m those of rank m. Returns the sum of that rank's values, in the order
// of the samples, onto the sum of those before.
template <int TEAM, class S>
__device__ S write_ranks(const Search& p, int64_t n, Samples samples, const Lists<S>& lists, int* places, S sum) {
  using Threads = Team<TEAM>;
  if (p.exclude_target) {
    const int32_t y = (int32_t)p.target[n];
    for (int b = Threads::warp(); b < samples.count; b += TEAM / 32) {
      const int place = lists[b].place_of(y);
      if (Threads::lane() == 0) places[b] = place;
    }
    Threads::sync();
  }
  const int m = Threads::rank();
  if (m >= p.n_ranks) return sum;
  for (int b = 0; b < samples.count; ++b) {
    const int last = p.ranks[m] - 1;  // the entry, and the one before it where the target is not among the better ones
    const int at = p.exclude_target && places[b] >= last ? last - 1 : last;
    const S value = lists[b].values[at];
    sum = samples.first + b == 0 ? value : sum + value;
    p.classes[(n * p.n_sample + samples.first + b) * p.n_ranks + m] = lists[b].classes[at];
  }
  return sum;
}

// Writes the excesses of a row, lane m that of rank m, from the sums of their values. Where one is NaN, the class ids
// become -2.
template <class T, class S>
__device__ void write_excess(const Args& a, int64_t n, S sum, bool nan) {
  const Search& p = a.search;
  const int m = (int)(threadIdx.x % 32);
  S excess = nan ? (S)__builtin_nan("") : sum * (S)a.inverse_b;
  if (p.target) excess -= (S)widen(((const T*)p.scores)[n * p.row_stride + p.target[n] * p.class_stride]);
  if (m < p.n_ranks) ((S*)p.values)[n * p.n_ranks + m] = excess;
  if (!__ballot_sync(kFull, m < p.n_ranks && excess != excess) || m >= p.n_ranks) return;
  for (int64_t b = 0; b < p.n_sample; ++b) p.classes[(n * p.n_sample + b) * p.n_ranks + m] = -2;
}

// Writes the excesses and class ids of a row whose target is ignore_index.
template <int TEAM, class S>
__device__ void write_ignored(const Search& p, int64_t n) {
  const int64_t ids = p.n_sample * p.n_ranks;
  for (int64_t i = Team<TEAM>::rank(); i < ids; i += TEAM) p.classes[n * ids + i] = -1;
  for (int m = Team<TEAM>::rank(); m < p.n_ranks; m += TEAM) ((S*)p.values)[n * p.n_ranks + m] = (S)0;
}

template <class T>
__device__ Row<T> row_of(const Args& a, const Memory<ArithmeticOf<T>>& memory, int64_t n) {
  const Search& p = a.search;
  const uint64_t seed = (uint64_t)*p.seed;
  const double epsilon = p.schedule ? *p.schedule : p.epsilon;
  Row<T> row{};
  row.scores = {(const T*)p.scores + n * p.row_stride, p.class_stride, p.n_classes};
  row.cut = -infinity<ArithmeticOf<T>>(), row.direct = true, row.n = (int32_t)p.n_classes;
  row.lists = memory.lists, row.prefix = memory.prefix;
  row.segments = a.layout.segments, row.capacity = a.layout.capacity;
  row.number = (uint32_t)(p.first_row + n), row.key0 = (uint32_t)seed, row.key1 = (uint32_t)(seed >> 32);
  row.first_class = (int32_t)p.first_class;
  row.epsilon = (ArithmeticOf<T>)epsilon, row.rough_epsilon = bound_epsilon(epsilon);
  return row;
}

// Searches a row for all samples and writes what is made of them.
template <class T, class L, int TEAM, class S>
__device__ void search_row(const Args& a, const Memory<S>& memory, int64_t n) {
  using Threads = Team<TEAM>;
  const Search& p = a.search;
  Row<T> row = row_of<T>(a, memory, n);
  if (a.layout.row_in_shared) row.scores = copy_row<TEAM>(row.scores, (T*)memory.row);
  bool nan = a.planned && find_contenders<TEAM>(a, memory, n, row);
  const Survivors survivors{(Survivor*)memory.work, memory.counts, a.layout.held};
  const Lists<S> lists{memory.best_values, memory.best_classes, (int)p.k};
  S sum = (S)0;
  for (Samples samples{0, 0}; samples.first < p.n_sample; samples.first += samples.count) {
    const int64_t left = p.n_sample - samples.first;
    samples.count = left < a.layout.samples ? (int)left : a.layout.samples;
    if (!nan) nan = draw<L, TEAM>(row, samples, survivors, lists, memory.scratch);
    if (!nan && row.cut > -infinity<S>())
      for (int b = Threads::warp(); b < samples.count; b += TEAM / 32)
        walk<L>(row, samples.first + b, a.inverse_l, lists[b]);
    Threads::sync();
    if (!p.n_ranks)
      write_lists<TEAM>(p, n, samples, lists, nan);
    else if (!nan)
      sum = write_ranks<TEAM>(p, n, samples, lists, memory.counts, sum);
    Threads::sync();
  }
  if (p.n_ranks && Threads::warp() == 0) write_excess<T>(a, n, sum, nan);
}

}  // namespace
}  // namespace topk_fast
