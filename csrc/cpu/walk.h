// The walk over the classes at or below the cut on CPU: their arrivals, in falling order, into the lists of the k best.
//
// Sampler: topk_fast/reference.py; draws: noise.h; bounds: bounds.h. Samples of several rows are walked
// side by side, so that their arrivals fill vectors and none waits for another. Bytes: one look-up a drawn arrival.
#pragma once

#include "../bounds.h"
#include "../scalar.h"
#include "best.h"
#include "philox.h"

namespace topk_fast {
namespace TOPK_FAST_ISA {

constexpr int kArrivals = 1024;  // arrivals drawn at a time, over all walkers

// A sample of a row, with its list after the contenders.
template <class T>
struct Walker {
  const T* scores;
  typename Arithmetic<T>::type cut;
  uint32_t row, sample;
  Key<typename Arithmetic<T>::type>* list;
  int64_t sum = 0;    // of the gaps behind it
  uint32_t done = 0;  // pairs of arrivals behind it
};

// Enters n arrivals in order while they can matter; true where one ended the walk. Reads kLanes on.
template <class T, class S>
static inline bool follow(const Search& p, const Walker<T>& w, const S* clean, const S* shift, const int32_t* drawn,
                          int n) {
  const int k = (int)p.k;
  for (int start = 0; start < n; start += kLanes) {
    alignas(64) S level[kLanes], value[kLanes];
    for (int i = 0; i < kLanes; ++i) level[i] = w.cut + shift[start + i];
    for (int i = 0; i < kLanes; ++i) value[i] = clean[start + i] + shift[start + i];
    const int count = n - start < kLanes ? n - start : kLanes;
    const uint32_t here = (1u << count) - 1;
    const S kth = kth_value<S>(w.list, k);
    uint32_t hits = hits_at_least(value, kth) & ~hits_above(clean + start, w.cut) & here;
    uint32_t end = ~hits_above(level, kth) & here;  // its first bit is where the walk stops
    for (; hits; hits &= hits - 1) {
      const int i = __builtin_ctz(hits);
      const uint32_t upto = (2u << i) - 1;
      if (end & upto) break;
      enter<S>(w.list, k, key_of(value[i], (int32_t)p.first_class + drawn[start + i]));
      end = ~hits_above(level, kth_value<S>(w.list, k)) & here & ~upto;
    }
    if (end) return true;
  }
  return false;
}

// Walks n walkers to their ends and spends them.
template <class L, class T>
static void walk(const Search& p, const Keys& keys, Walker<T>* walkers, int n) {
  using S = typename Arithmetic<T>::type;
  constexpr int kCalls = kArrivals / 2;
  const float inverse_l = 1.0f / (float)p.n_classes;
  const S epsilon = (S)p.epsilon;
  alignas(64) uint32_t c0[kCalls + 64], c1[kCalls + 64], c2[kCalls + 64], words[4][kCalls + 64];
  alignas(64) int32_t gaps[2][kCalls + 64];
  alignas(64) int64_t times[kArrivals + 64];
  alignas(64) uint32_t picks[kArrivals + 64];
  alignas(64) float z[kArrivals + 64];
  alignas(64) int32_t drawn[kArrivals + 64];  // classes, from 0 on
  alignas(64) S clean[kArrivals + 64], shift[kArrivals + 64];
  while (n) {
    // No arrival after `last` can enter, and that is all that is known of how many will matter. The first of them push
    // the bound down, so that about half of those before it suffice; what is left is drawn in the next round.
    alignas(64) float cut[kWalkers] = {}, reach[kWalkers] = {}, until[kWalkers];
    int64_t last[kWalkers];
    int pairs[kWalkers], calls = 0;
    for (int a = 0; a < n; ++a)
      cut[a] = (float)walkers[a].cut, reach[a] = (float)kth_value<S>(walkers[a].list, (int)p.k);
    for (int a = 0; a < n; a += Vector<float>::n)
      store(time_bound<L, Wide>(Wide::load(cut + a), Wide::load(reach + a), bound_epsilon(p.epsilon)), until + a);
    for (int a = 0; a < n; ++a) {
      const Walker<T>& w = walkers[a];
      last[a] = until[a] < 1.0f ? (int64_t)((double)until[a] * (double)p.n_classes * 16777216.0) : INT64_MAX;
      const float ahead = until[a] < 1.0f ? (float)(last[a] - w.sum) * 5.9604644775390625e-08f : 2 * (float)p.k;
      const float wanted = 1.0f + (w.done ? 0.5f * (ahead + __builtin_sqrtf(ahead)) : 0.35f * ahead);
      pairs[a] = ahead < 0 ? 0 : wanted < (float)(kCalls / kWalkers) ? (int)wanted : kCalls / kWalkers;
      for (int i = 0; i < pairs[a]; i += kLanes)
        for (int j = 0; j < kLanes; ++j) {
          const int at = calls + i + j;
          c0[at] = w.done + (uint32_t)(i + j), c1[at] = w.row, c2[at] = w.sample;
        }
      calls += pairs[a];
    }
    const int padded = round_up(calls, kLanes);
    for (int i = calls; i < padded; ++i) c0[i] = c1[i] = c2[i] = 0;
    philox_block(keys, Counters<const uint32_t*, const uint32_t*>{c0, c1, c2, 1 + (uint32_t)p.first_class}, padded,
                 words);
    for (int i = 0; i < padded; i += Vector<float>::n) {
      store(gap<Wide>(Wide::load(words[0] + i)), gaps[0] + i);
      store(gap<Wide>(Wide::load(words[2] + i)), gaps[1] + i);
    }
    int ends[kWalkers], m = 0;  // of the arrivals that can matter, one walker's after the other's
    for (int a = 0, call = 0; a < n; call += pairs[a++]) {
      int64_t sum = walkers[a].sum;
      for (int i = call; i < call + pairs[a]; ++i) {
        if ((sum += gaps[0][i]) > last[a]) break;
        times[m] = sum, picks[m++] = words[1][i];
        if ((sum += gaps[1][i]) > last[a]) break;
        times[m] = sum, picks[m++] = words[3][i];
      }
      walkers[a].sum = sum, walkers[a].done += (uint32_t)pairs[a];
      ends[a] = m;
    }
    const int held = round_up(m, kLanes);
    for (int i = m; i < held; ++i) times[i] = 1, picks[i] = 0;
    for (int i = 0; i < held; ++i) z[i] = arrival_time(times[i], inverse_l);
    for (int i = 0; i < held; i += Vector<float>::n) store(L::template level<Wide>(Wide::load(z + i)), z + i);
    for (int i = 0; i < held; ++i) shift[i] = epsilon * (S)z[i];
    scaled(picks, (uint32_t)p.n_classes, held, drawn);
    int still = 0;
    for (int a = 0, start = 0; a < n; start = ends[a++]) {
      const Walker<T>& w = walkers[a];
      for (int i = start; i < ends[a]; ++i) clean[i] = widen(w.scores[drawn[i]]);
      const bool ended = follow(p, w, clean + start, shift + start, drawn + start, ends[a] - start);
      if (!ended && w.sum <= last[a]) walkers[still++] = w;
    }
    n = still;
  }
}

}  // namespace TOPK_FAST_ISA
}  // namespace topk_fast
