// The cut of a row: the score above which a class is a contender and gets draws of its own.
//
// The rule is that of topk_fast/reference.py's `cut_of`; the numbers of groups and the rank come from noise.h's `plan`.
#pragma once

#include "../order.h"
#include "layout.h"

namespace topk_fast {
namespace {

// The rank-th largest of keys[0..n), or `none` where fewer than `rank` are above it: a bisection by counts. The bounds
// are interpolated, but every third one lies halfway.
template <int TEAM, class K>
__device__ K kth_largest(const K* keys, int n, int rank, K none, int64_t* scratch) {
  using Threads = Team<TEAM>;
  K low = none, high = none;
  bool met = false;
  int count = 0;
  for (int i = Threads::rank(); i < n; i += TEAM) {
    const K x = keys[i];
    if (x > none) {
      low = met && low < x ? low : x;
      high = met && high > x ? high : x;
      met = true;
      ++count;
    }
  }
  int reach_low = Threads::reduce(count, scratch, Sum<int>());
  if (reach_low < rank) return none;
  K largest = Threads::reduce(high, scratch, Most<K>());
  low = Threads::reduce(met ? low : largest, scratch, Least<K>());
  uint64_t width = (uint64_t)largest - (uint64_t)low + 1;  // [low, low + width): low reaches the rank, the end does not
  int reach_high = 0;
  for (int step = 0; width > 1 && reach_low > rank; ++step) {
    const float share = ((float)(reach_low - rank) + 0.5f) / (float)(reach_low - reach_high);
    const uint64_t part = step % 3 == 2 ? 1 << 15 : (uint64_t)(share * 65536.0f);  // in fixed point: no FP64
    uint64_t ahead = width >> 48 ? (width >> 16) * part : width * part >> 16;
    ahead = ahead < 1 ? 1 : ahead > width - 1 ? width - 1 : ahead;
    const K middle = (K)((uint64_t)low + ahead);
    int reach = 0;
    for (int i = Threads::rank(); i < n; i += TEAM) reach += keys[i] >= middle;
    reach = Threads::reduce(reach, scratch, Sum<int>());
    if (reach >= rank)
      low = middle, width -= ahead, reach_low = reach;
    else
      width = ahead, reach_high = reach;
  }
  K found = largest;
  for (int i = Threads::rank(); i < n; i += TEAM)
    if (keys[i] >= low && keys[i] < found) found = keys[i];
  return Threads::reduce(found, scratch, Least<K>());
}

// The rank-th largest maximum of groups 0, stride, ... of classes; -inf where that is +inf.
template <int TEAM, class T>
__device__ ArithmeticOf<T> cut_of(const Args& a, const Scores<T>& scores, const Memory<ArithmeticOf<T>>& memory) {
  using S = ArithmeticOf<T>;
  using K = decltype(ordered(S()));
  K* keys = (K*)memory.work;
  const int64_t step = (int64_t)a.plan.group * a.plan.stride;
  for (int q = Team<TEAM>::rank(); q < a.looked_at; q += TEAM) {
    const int64_t first = q * step, end = first + a.plan.group < scores.n ? first + a.plan.group : scores.n;
    S top = -infinity<S>();
    for (int64_t c = first; c < end; ++c) {
      const S x = scores[c];
      top = x > top ? x : top;
    }
    keys[q] = ordered(top);
  }
  Team<TEAM>::sync();
  const K none = ordered(-infinity<S>());
  const S cut = unordered(kth_largest<TEAM>(keys, a.looked_at, a.plan.rank, none, memory.scratch));
  Team<TEAM>::sync();  // the keys' place is used again
  return cut < infinity<S>() ? cut : -infinity<S>();
}

}  // namespace
}  // namespace topk_fast
