// The contenders of a row on CPU: one pass over the row, which hands the classes above its cut over in tiles.
//
// Bytes: the row once. Rule: topk_fast/reference.py's `cut_of`.
#pragma once

#include "best.h"
#include "cut.h"
#include "philox.h"

namespace topk_fast {
namespace TOPK_FAST_ISA {

constexpr int kTileContenders = 512;  // contenders that are drawn at a time
constexpr int kAhead = 4096;          // bytes of a row asked for ahead of their use

// A row, and the lists of the k best of its samples [b0, b1).
template <class T>
struct Row {
  using S = typename Arithmetic<T>::type;
  const Search& p;
  const Keys& keys;
  const T* scores;
  uint32_t number;
  int64_t b0, b1;
  Key<S>* lists;  // [groups of kLists samples][k][kLists]
  S cut;

  int64_t groups() const { return (b1 - b0 + kLists - 1) / kLists; }
  Key<S>* list(int64_t b) const { return lists + b / kLists * kLists * p.k + b % kLists; }
  S reach() const {
    S least = (S)__builtin_inf();
    for (int64_t b = 0; b < b1 - b0; ++b) {
      const S kth = kth_value<S>(list(b), (int)p.k);
      least = kth < least ? kth : least;
    }
    return least;
  }
  void clear() const {
    for (int64_t i = 0; i < groups() * kLists * p.k; ++i) lists[i] = key_of(-(S)__builtin_inf(), -1);
  }
};

// The row after this one. Draws wait for no memory, so that it is brought into L2 while they are made.
struct Ahead {
  uintptr_t at = 0, end = 0;

  // Asks for another KiB of it.
  void ask() {
    if (at >= end) return;
    for (uintptr_t line = at; line < at + 1024; line += 64) __builtin_prefetch((const void*)line, 0, 2);
    at += 1024;
  }
};

// Contenders that wait for their draws.
template <class S>
struct Tile {
  alignas(64) int32_t ids[kTileContenders + 80];
  alignas(64) S scores[kTileContenders + 80];
  Ahead ahead;
};

// Calls draw_tile(n) for every full tile of ids above the cut, and for the last one, until one returns false. A NaN
// counts as above the cut.
template <class T, class S, class F>
static void collect(const Row<T>& row, Tile<S>& tile, F draw_tile) {
  alignas(64) S wide[64];
  const Search& p = row.p;
  const T* scores = row.scores;
  const S cut = row.cut;
  int waiting = 0;
  for (int64_t start = 0; start < p.n_classes; start += 64) {
    // Mispredicted hits empty the pipeline, and with it the loads under way: these are not lost.
    for (size_t i = 0; i < 64 * sizeof(T); i += 64)
      __builtin_prefetch((const void*)((uintptr_t)(scores + start) + kAhead + i));
    const S* x;
    const int64_t count = p.n_classes - start < 64 ? p.n_classes - start : 64;
    if (sizeof(T) == sizeof(S) && count == 64) {
      x = (const S*)(scores + start);
    } else {
      for (int64_t i = 0; i < count; ++i) wide[i] = widen(scores[start + i]);
      for (int64_t i = count; i < 64; ++i) wide[i] = -(S)__builtin_inf();
      x = wide;
    }
    const uint32_t hits[4] = {hits_above(x, cut), hits_above(x + 16, cut), hits_above(x + 32, cut),
                              hits_above(x + 48, cut)};
    if (!(hits[0] | hits[1] | hits[2] | hits[3])) continue;
    const uint32_t id = (uint32_t)(p.first_class + start);
    for (uint32_t j = 0; j < 4; ++j) waiting += append_numbers((int32_t)(id + j * kLanes), hits[j], tile.ids + waiting);
    if (waiting < kTileContenders) continue;
    if (!draw_tile(waiting)) return;
    waiting = 0;
  }
  draw_tile(waiting);
}

// Whether fewer scores of a row than `wanted` are above -inf.
template <class T>
static bool finite_are_fewer(const Search& p, const T* scores, int64_t wanted) {
  int64_t finite = 0;
  for (int64_t i = 0; i < p.n_classes && finite < wanted; ++i)
    finite += widen(scores[i]) > -(typename Arithmetic<T>::type)__builtin_inf();
  return finite < wanted;
}

}  // namespace TOPK_FAST_ISA
}  // namespace topk_fast
