// Draws for a tile of contenders on CPU: a word for each sample, and a draw only where the word can matter (bounds.h).
//
// Fused: noise never leaves registers and L1. That is legal because the k best of a union come from the k bests of its
// parts, and a value below a lower bound of the k-th best cannot enter.
#pragma once

#include "../bounds.h"
#include "collect.h"

namespace topk_fast {
namespace TOPK_FAST_ISA {

constexpr int kHeld = 256;  // survivors that wait for their draws

// What the rows before suggest of the next one: guesses, which move cost and never results.
template <class S>
struct Learned {
  Usual<S> cut, rise;  // rise: of the worst sample's k-th best over the cut, after the first tile
};

// Words of a group's samples that passed their bounds, with their contenders.
template <class S>
struct Survivors {
  int counts[kLists] = {};  // of each sample
  alignas(64) uint32_t words[kHeld + 64];
  alignas(64) int32_t ids[kHeld + 64];
  alignas(64) S scores[kHeld + 64];
  alignas(64) int32_t places[kHeld + 64];  // among the rows that enter the lists

  // Places from `at` on take a sample's hits among the words of the contenders from `start` on; returns their number.
  int keep(int at, const uint32_t* from, const Tile<S>& tile, int start, uint32_t hits, int sample) {
    const int passed = __builtin_popcount(hits);
#if defined(TOPK_FAST_AVX512)
    for (int j = 0; j < kLanes; ++j) places[at + j] = (counts[sample] + j) * kLists + sample;
    append(from, hits, words + at), append(tile.ids + start, hits, ids + at);
    append(tile.scores + start, hits, scores + at);
#else
    for (int place = counts[sample] * kLists + sample; hits; hits &= hits - 1, ++at, place += kLists) {
      const int i = __builtin_ctz(hits);
      words[at] = from[i], ids[at] = tile.ids[start + i], scores[at] = tile.scores[start + i], places[at] = place;
    }
#endif
    counts[sample] += passed;
    return passed;
  }
};

// Noised scores s + (epsilon * z) of the n survivors, into a group's lists.
template <class L, class T, class S>
static void absorb(const Row<T>& row, Survivors<S>& held, int n, int64_t group) {
  alignas(64) float z[kHeld + 64];
  alignas(64) Key<S> noised[kHeld + 64], rows[kHeld * kLists];
  const S epsilon = (S)row.p.epsilon;
  for (int i = 0; i < n; i += Vector<float>::n) store(L::template draw<Wide>(Wide::load(held.words + i)), z + i);
  for (int i = 0; i < n; ++i) noised[i] = key_of(held.scores[i] + epsilon * (S)z[i], held.ids[i]);
  int deepest = 0;
  for (int l = 0; l < kLists; ++l) deepest = held.counts[l] > deepest ? held.counts[l] : deepest, held.counts[l] = 0;
  deepest = round_up(deepest, kAbreast);
  for (int i = 0; i < deepest * kLists; ++i) rows[i] = key_of(-(S)__builtin_inf(), -1);
  for (int i = 0; i < n; ++i) rows[held.places[i]] = noised[i];
  enter_rows(row.list(group * kLists), (int)row.p.k, rows, deepest);
}

// Draws of a group's samples for the tile's n contenders, and the best of them into its lists.
template <class L, class T, class S>
static void draw_group(const Row<T>& row, Tile<S>& tile, int64_t group, const int32_t* bounds, int n) {
  const int64_t first = row.b0 + group * kLists;
  const int count = row.b1 - first < kLists ? (int)(row.b1 - first) : kLists;
  Survivors<S> held;
  int m = 0;
  alignas(64) uint32_t words[4][kLanes];
  for (int i = 0; i < n; i += kLanes) {
    for (int list = 0; list < count; list += 4) {
      const uint32_t quad = (uint32_t)(first + list) / 4;
      tile.ahead.ask();
      philox_block(row.keys, Counters<uint32_t, uint32_t>{(const uint32_t*)tile.ids + i, row.number, quad, 0}, kLanes,
                   words);
      for (int l = list; l < count && l < list + 4; ++l)
        m += held.keep(m, words[l - list], tile, i, hits_within(words[l - list], bounds + i), l);
    }
    if (m <= kHeld - kLists * kLanes && i + kLanes < n) continue;
    absorb<L>(row, held, m, group);
    m = 0;
  }
}

// Draws for the ids of a tile, all samples, and the best of them into the lists; false where a score is NaN. A word is
// looked at closely only where it can lift its contender to `reach`, which every sample's k-th best attains: known
// once contenders were `drawn_before`, else a guess, after which the tile is drawn again if that was too high.
template <class L, class T, class S>
static bool draw(const Row<T>& row, Tile<S>& tile, int tile_n, int64_t drawn_before, Learned<S>& learned) {
  using V = Vector<S>;
  const S inf = (S)__builtin_inf();
  const int n = round_up(tile_n, kLanes);
  for (int i = 0; i < tile_n; ++i) tile.scores[i] = widen(row.scores[tile.ids[i] - row.p.first_class]);
  for (int i = tile_n; i < n; ++i) tile.ids[i] = 0, tile.scores[i] = -inf;
  typename V::mask bad = {};
  for (int i = 0; i < n; i += V::n) bad += V::load(tile.scores + i) != V::load(tile.scores + i);
  if (V::count(bad) > 0) return false;
  if (!tile_n) return true;
  const float epsilon = bound_epsilon(row.p.epsilon);
  const S base = row.cut > -inf ? row.cut : 0;
  const bool first = drawn_before == 0;
  S reach = first ? base + (learned.rise.mean - 2 * learned.rise.spread) : row.reach();
  for (;;) {
    alignas(64) int32_t bounds[kTileContenders + 64];
    alignas(64) float narrow[kTileContenders + 64];
    for (int i = 0; i < n; ++i) narrow[i] = (float)tile.scores[i];
    for (int i = 0; i < n; i += Vector<float>::n)
      store(word_bound<L, Wide>(Wide::load(narrow + i), Wide::floats((float)reach), epsilon), bounds + i);
    for (int i = tile_n; i < n; ++i) bounds[i] = -1;
    for (int64_t group = 0; group < row.groups(); ++group) draw_group<L>(row, tile, group, bounds, n);
    if (!first || !(row.reach() < reach)) break;
    reach = -inf;
    row.clear();
  }
  const S least = row.reach();
  if (first && least > -inf && least < inf) learned.rise.learn(least - base, (S)row.p.epsilon * (S)0.125);
  return true;
}

}  // namespace TOPK_FAST_ISA
}  // namespace topk_fast
