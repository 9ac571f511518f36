// The classes of a row that get draws of their own: the cut, and one pass over the row.
//
// Rule: topk_fast/reference.py's `cut`. Scores come in 16-byte loads, kUnroll of them in flight a thread. For few long
// rows several blocks collect a row each its part (`collect_kernel`).
#pragma once

#include "layout.h"

namespace topk_fast {
namespace {

constexpr int kUnroll = 4;  // 16-byte loads in flight a thread

// The rank-th largest of keys[0..n), or below it all where fewer than `rank` are above -inf: a bisection by counts,
// with interpolated bounds and every third one halfway.
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
  uint64_t width = (uint64_t)largest - (uint64_t)low + 1;  // [low, low + width): low reaches, its end does not
  int reach_high = 0;
  for (int step = 0; width > 1 && reach_low > rank; ++step) {
    const float share = ((float)(reach_low - rank) + 0.5f) / (float)(reach_low - reach_high);
    uint64_t ahead = step % 3 == 2 ? width / 2 : (uint64_t)((double)width * share);
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
template <class T, class S, int TEAM>
__device__ S cut_of(const Args& a, const T* row, int64_t class_stride, void* keys_, int64_t* scratch) {
  using K = decltype(ordered(S()));
  K* keys = (K*)keys_;
  const int64_t step = (int64_t)a.plan.group * a.plan.stride;
  for (int q = Team<TEAM>::rank(); q < a.looked_at; q += TEAM) {
    const int64_t first = q * step, end = first + a.plan.group < a.p.n_classes ? first + a.plan.group : a.p.n_classes;
    S top = -infinity<S>();
    for (int64_t c = first; c < end; ++c) {
      const S x = widen(row[c * class_stride]);
      top = x > top ? x : top;
    }
    keys[q] = ordered(top);
  }
  Team<TEAM>::sync();
  const S cut = unordered(kth_largest<TEAM>(keys, a.looked_at, a.plan.rank, ordered(-infinity<S>()), scratch));
  Team<TEAM>::sync();  // the keys' place is used again
  return cut < infinity<S>() ? cut : -infinity<S>();
}

// Bits of the scores of a vector that are above the cut, or NaN.
template <class T, class S>
__device__ __forceinline__ unsigned above(const T (&x)[16 / sizeof(T)], S cut) {
  unsigned hits = 0;
  for (int i = 0; i < (int)(16 / sizeof(T)); ++i) hits |= !(widen(x[i]) <= cut) ? 1u << i : 0u;
  return hits;
}

// Keeps the classes [begin, end) above the cut, with their scores, in this warp's list of `capacity` entries. Returns
// how many there are, -1 where one is NaN. Ballots give each its place: lists are the same in every run.
template <class T, class S, int TEAM>
__device__ int collect(const T* row, int64_t class_stride, int64_t begin, int64_t end, S cut, Contender<S>* list,
                       int capacity) {
  constexpr int W = 16 / sizeof(T);
  const int lane = Team<TEAM>::lane();
  const unsigned before = (1u << lane) - 1;
  int count = 0;
  bool nan = false;
  // Places: class + lead, so that base + a multiple of W is a multiple of 16 bytes.
  const int lead = class_stride == 1 ? (int)((uintptr_t)(row + begin) % 16 / sizeof(T)) : 0;
  const T* base = row + (begin - lead) * class_stride;
  const int64_t n = end - begin + lead;
  for (int64_t start = 0; start < n; start += TEAM * W * kUnroll) {
    T x[kUnroll][W];
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t p = start + (int64_t)(u * TEAM + Team<TEAM>::rank()) * W;
      if (class_stride == 1 && p >= lead && p + W <= n) {
        const uint4 v = *(const uint4*)(base + p);
        memcpy(x[u], &v, 16);
      } else {
        for (int i = 0; i < W; ++i) {
          x[u][i] = T{};
          if (p + i >= lead && p + i < n) x[u][i] = base[(p + i) * class_stride];
        }
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t p = start + (int64_t)(u * TEAM + Team<TEAM>::rank()) * W;
      unsigned hits = above<T, S>(x[u], cut);
      if (hits && (p < lead || p + W > n))  // places beside the row hold anything
        for (int i = 0; i < W; ++i)
          if (p + i < lead || p + i >= n) hits &= ~(1u << i);
      if (!__ballot_sync(kFull, hits != 0)) continue;
      for (int i = 0; i < W; ++i) {
        const bool hit = hits >> i & 1;
        const unsigned mask = __ballot_sync(kFull, hit);
        const int to = count + __popc(mask & before);
        const S score = hit ? (S)widen(x[u][i]) : (S)0;
        nan |= score != score;
        if (hit && to < capacity) list[to] = {score, (int32_t)(begin + p + i - lead)};
        count += __popc(mask);
      }
    }
  }
  return __ballot_sync(kFull, nan) ? -1 : count;
}

// Whether fewer scores of the row than `wanted` are above -inf.
template <class T, class S, int TEAM>
__device__ bool finite_are_fewer(const T* row, int64_t class_stride, int64_t n, int64_t wanted, int64_t* scratch) {
  int64_t finite = 0;
  for (int64_t start = 0; start < n && finite < wanted; start += 64 * TEAM) {
    int64_t here = 0;
    for (int64_t c = start + Team<TEAM>::rank(); c < n && c < start + 64 * TEAM; c += TEAM)
      here += (S)widen(row[c * class_stride]) > -infinity<S>();
    finite += Team<TEAM>::reduce(here, scratch, Sum<int64_t>());
  }
  return finite < wanted;
}

// The lists of one part of a row, [rows * parts] blocks: for few rows, long ones, and many processors.
template <class T, class S>
__global__ void __launch_bounds__(kBlock) collect_kernel(const Args a) {
  TOPK_FAST_SHARED(shared);
  using Threads = Team<kBlock>;
  const int64_t n = blockIdx.x / a.l.parts, part = blockIdx.x % a.l.parts;
  const T* row = (const T*)a.p.scores + n * a.p.row_stride;
  const S cut =
      cut_of<T, S, kBlock>(a, row, a.p.class_stride, shared + a.l.work_at, (int64_t*)(shared + a.l.reduce_at));
  char* header = (char*)a.p.workspace + n * a.l.workspace_headers;
  Contender<S>* lists = (Contender<S>*)((char*)a.p.workspace + a.p.n_rows * a.l.workspace_headers +
                                        n * a.l.workspace_slot + a.l.workspace_lists);
  const int64_t share = (a.p.n_classes + a.l.parts - 1) / a.l.parts, begin = part * share;
  const int64_t end = begin + share < a.p.n_classes ? begin + share : a.p.n_classes;
  const int segment = (int)part * (kBlock / 32) + Threads::warp();
  const int count = begin < end ? collect<T, S, kBlock>(row, a.p.class_stride, begin, end, cut,
                                                        lists + (int64_t)segment * a.l.capacity, a.l.capacity)
                                : 0;
  if (Threads::lane() == 0) ((int32_t*)(header + 16))[segment] = count;
  if (part == 0 && Threads::rank() == 0) *(S*)header = cut;
}

}  // namespace
}  // namespace topk_fast
