// The k best of s + epsilon * Z for every row and sample, on CPU; compiled once per instruction set.
//
// Formula and sampler: topk_fast/reference.py; draws: noise.h. One pass over a row finds the cut from some group
// maxima (a sixth of a long row), a second one collects the classes above it. They get a draw per sample in blocks
// of kTile; the others enter as arrivals, in rounds over all samples of the row.
// Fused: noise never leaves registers and L1; legal because the k best of a union come from the k bests of its
// parts, and a value below a lower bound of the k-th best cannot enter.
// Bytes: the row once, a sixth of it twice, B arrivals' look-ups; work items are (row, share of the samples).
// Bits: every rounding is noise.h's or one written here; order is (value descending, class ascending).

#include "cut.h"
#include "simd.h"
#include "topk_cpu.h"

namespace topk_fast {
namespace TOPK_FAST_ISA {

namespace {

constexpr int kTile = 512;      // contenders drawn at a time
constexpr int kArrivals = 512;  // arrivals drawn at a time, over all samples
constexpr int kMaxima = 1024;   // `plan` looks at fewer groups than this
constexpr int kPairs = 64;      // up to so many values are ranked by comparing all pairs
constexpr int kAhead = 4096;    // bytes of a row asked for ahead of their use
constexpr int kGroup = 16;      // samples whose arrivals are walked side by side

template <class V, class S>
static inline void store(V v, S* x) {
  memcpy(x, &v, sizeof v);
}

typedef uint32_t Four __attribute__((vector_size(16)));

static inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

// One row's samples [b0, b1) and their k best so far, best first, (-inf, -1) where there are fewer.
template <class T>
struct Row {
  using S = typename Arithmetic<T>::type;
  using V = Vector<S>;
  const Search& p;
  const T* scores;
  const Keys keys;
  const int width;  // of a list: k and padding
  S* values;        // [b1 - b0, width]
  int32_t* ids;     // [b1 - b0, width]
  uint32_t row = 0;
  int64_t b0 = 0, b1 = 0;
  float average = 16;       // number of arrivals walked for a sample, so far: moves cost, never results
  S cut = 0, last_cut = 0;  // of the row before: where the search for this row's begins
  int64_t contenders = 0;
  bool nan = false;
  int tile = 0;
  alignas(64) int32_t tile_ids[kTile + 80] = {};  // the contenders that wait for their draws
  alignas(64) S tile_scores[kTile + 80] = {};

  static constexpr S inf = (S)__builtin_inf();

  // The k-th largest of m[0..width), counted over all pairs.
  template <int kFixed>
  S kth_of(const S* m, int width) const {
    const int n = kFixed ? kFixed : width;  // a fixed length unrolls
    S bound = -inf;
    for (int i = 0; i < n; i += V::n) {
      const typename V::type v = V::load(m + i);
      typename V::mask reach = {};
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) reach -= m[j] >= v;
      const S here = V::largest(reach >= (typename V::lane)p.k ? v : V::all(-inf));
      bound = here > bound ? here : bound;
    }
    return bound;
  }

  // A lower bound of the k-th largest of x[0..n): the k-th largest of maxima over disjoint parts.
  S lower_bound(const S* x, int n) const {
    alignas(64) S m[kTile + 64];
    int parts = round_up((int)(p.k < kTile ? 2 * p.k : n), kLanes);
    parts = parts < n ? parts : n;
    if (p.k > parts) return -inf;
    for (int i = 0; i < parts; i += V::n) {
      typename V::type v = V::load(x + i);
      for (int j = i + parts; j < n; j += parts) v = V::larger(v, V::load(x + j));
      store(v, m + i);
    }
    if (parts == kLanes) return kth_of<kLanes>(m, parts);
    return parts > kPairs ? rank_select(m, parts, (int)p.k, cut) : kth_of<0>(m, parts);
  }

  // The noised scores x[0..n) of the tile into a sample's list.
  void enter(S* v, int32_t* c, const S* x, int n) {
    const S kth = v[p.k - 1];
    const S bound = kth > -inf ? kth : lower_bound(x, n);
    alignas(64) S best[kTile + 80];
    alignas(64) int32_t best_ids[kTile + 80];
    int m = 0;
    for (int i = 0; i < n; i += kLanes)
      m += append(x + i, tile_ids + i, hits_at_least(x + i, bound), best + m, best_ids + m);
    if (contenders || m > kLanes) {
      for (int i = 0; i < m; ++i) insert(v, c, (int)p.k, best[i], best_ids[i], true);
      return;
    }
    // The list is empty: each goes where its rank says, in loops of fixed length, for a mispredicted end of a short
    // one costs more than all of it. Ids ascend, so the earlier of two equal ones comes first.
    for (int i = 0; i < kLanes; ++i) best[i] = i < m ? best[i] : -inf;
    alignas(64) typename V::lane number[kLanes], rank[kLanes];
    alignas(64) S sorted[kLanes];
    alignas(64) int32_t sorted_ids[kLanes];
    for (int i = 0; i < kLanes; ++i) number[i] = i;
    for (int i = 0; i < kLanes; i += V::n) {
      const typename V::type mine = V::load(best + i);
      const typename V::mask place = V::lanes(number + i);
      typename V::mask before = {};
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) before -= (best[j] > mine) | ((best[j] == mine) & (place > j));
      memcpy(rank + i, &before, sizeof before);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sorted[rank[i]] = best[i], sorted_ids[rank[i]] = best_ids[i];
    for (int i = 0; i < p.k && i < kLanes; ++i) v[i] = sorted[i], c[i] = sorted[i] > -inf ? sorted_ids[i] : -1;
  }

  // The tile's scores with the noise of n words: x = s + (epsilon * z).
  void noised(const uint32_t* words, S* x, int n) const {
    alignas(64) float z[kTile + 64];
    const S epsilon = (S)p.epsilon;
    for (int i = 0; i < n; i += Vector<float>::n) store(normal<Wide>(Wide::load(words + i)), z + i);
    for (int i = 0; i < n; ++i) x[i] = tile_scores[i] + epsilon * (S)z[i];
  }

  // Draws for the waiting contenders, all samples, and the best of them into the lists.
  void flush() {
    const int n = round_up(tile, kLanes);
    for (int i = tile; i < n; ++i) tile_ids[i] = 0, tile_scores[i] = -inf;
    typename V::mask bad = {};
    for (int i = 0; i < n; i += V::n) bad += V::load(tile_scores + i) != V::load(tile_scores + i);
    nan |= V::count(bad) > 0;
    alignas(64) uint32_t words[4][kTile + 64];
    alignas(64) S x[4][kTile + 64];
    for (int64_t quad = b0 / 4; quad * 4 < b1; ++quad) {
      philox_block(keys, (const uint32_t*)tile_ids, row, nullptr, (uint32_t)quad, 0, n, words[0], words[1], words[2],
                   words[3]);
      const int64_t count = b1 - quad * 4 < 4 ? b1 - quad * 4 : 4;
      // All of their draws before the first selection: a short list's draws and selection are long chains of
      // dependent steps, and only what stands side by side overlaps.
      for (int64_t w = 0; w < count; ++w) noised(words[w], x[w], n);
      for (int64_t w = 0; w < count; ++w) {
        const int64_t b = quad * 4 + w - b0;
        enter(values + b * width, ids + b * width, x[w], n);
      }
    }
    contenders += tile;
    tile = 0;
  }

  static void clear(S* v, int32_t* c) {
    for (int i = 0; i < kLanes; i += V::n) store(V::all(-inf), v + i);
    memset(c, 0xff, kLanes * sizeof *c);  // -1
  }

  // Every class above the cut into the tile; a NaN counts as above it and ends the row.
  void collect() {
    contenders = tile = 0;
    nan = false;
    for (int64_t b = 0; b < b1 - b0; ++b)
      for (int i = 0; i < width; i += kLanes) clear(values + b * width + i, ids + b * width + i);
    alignas(64) S wide[64];
    for (int64_t start = 0; start < p.n_classes; start += 64) {
      // Mispredicted hits empty the pipeline, and with it the loads under way: these are not lost.
      for (size_t i = 0; i < 64 * sizeof(T); i += 64) __builtin_prefetch((const char*)(scores + start) + kAhead + i);
      const S* x;
      const int64_t count = p.n_classes - start < 64 ? p.n_classes - start : 64;
      if (sizeof(T) == sizeof(S) && count == 64) {
        x = (const S*)(scores + start);
      } else {
        for (int64_t i = 0; i < count; ++i) wide[i] = widen(scores[start + i]);
        for (int64_t i = count; i < 64; ++i) wide[i] = -inf;
        x = wide;
      }
      const uint32_t hits[4] = {hits_above(x, cut), hits_above(x + 16, cut), hits_above(x + 32, cut),
                                hits_above(x + 48, cut)};
      if (!(hits[0] | hits[1] | hits[2] | hits[3])) continue;
      alignas(64) int32_t numbers[64];
      for (int i = 0; i < 64; ++i) numbers[i] = (int32_t)(p.first_class + start) + i;
      for (int i = 0; i < 64; i += 16)
        tile += append(x + i, numbers + i, hits[i / 16], tile_scores + tile, tile_ids + tile);
      if (tile >= kTile) flush();
      if (nan) return;
    }
    flush();
  }

  void choose_cut() {
    cut = -inf;
    const Plan plan_ = plan(p.n_classes, p.k);
    if (p.dense || plan_.all) return;
    alignas(64) S maxima[kMaxima + kLanes];
    const int64_t groups = (p.n_classes + plan_.group - 1) / plan_.group;
    const int n = (int)((groups + plan_.stride - 1) / plan_.stride), padded = round_up(n, kLanes);
    switch (plan_.group) {
      case 1: group_maxima<1>(scores, p.n_classes, plan_.stride, maxima, n); break;
      case 2: group_maxima<2>(scores, p.n_classes, plan_.stride, maxima, n); break;
      case 4: group_maxima<4>(scores, p.n_classes, plan_.stride, maxima, n); break;
      case 8: group_maxima<8>(scores, p.n_classes, plan_.stride, maxima, n); break;
      case 16: group_maxima<16>(scores, p.n_classes, plan_.stride, maxima, n); break;
      default: group_maxima<32>(scores, p.n_classes, plan_.stride, maxima, n);
    }
    for (int i = n; i < padded; ++i) maxima[i] = -inf;
    cut = last_cut = rank_select(maxima, padded, plan_.rank, last_cut);
    if (cut == inf) cut = -inf;
  }

  bool fewer_finite_than(int64_t m) const {
    int64_t finite = 0;
    for (int64_t i = 0; i < p.n_classes && finite < m; ++i) finite += widen(scores[i]) > -inf;
    return finite < m;
  }

  // Enters n arrivals of sample b, in order, while they can matter; returns how many it looked at. Reads kLanes on.
  int follow(int64_t b, const S* clean, const S* shift, const int32_t* drawn, int n) const {
    S* v = values + b * width;
    int32_t* c = ids + b * width;
    for (int start = 0; start < n; start += kLanes) {
      alignas(64) S level[kLanes], value[kLanes];
      for (int i = 0; i < kLanes; ++i) level[i] = cut + shift[start + i];
      for (int i = 0; i < kLanes; ++i) value[i] = clean[start + i] + shift[start + i];
      const int count = n - start < kLanes ? n - start : kLanes;
      const uint32_t here = (1u << count) - 1;
      uint32_t hits = hits_at_least(value, v[p.k - 1]) & ~hits_above(clean + start, cut) & here;
      uint32_t end = ~hits_above(level, v[p.k - 1]) & here;  // its first bit is where the walk stops
      for (; hits; hits &= hits - 1) {
        const int i = __builtin_ctz(hits);
        const uint32_t upto = (2u << i) - 1;
        insert(v, c, (int)p.k, value[i], (int32_t)p.first_class + drawn[start + i], !(end & upto));
        end = (end & upto) | (~hits_above(level, v[p.k - 1]) & here & ~upto);
      }
      if (end) return start + __builtin_ctz(end);
    }
    return n;
  }

  // The background: arrivals in falling order until none can enter, side by side for up to kGroup samples.
  void walk(int64_t from, int64_t to) {
    int64_t active[kGroup], sum[kGroup];
    int n_active = 0;
    for (int64_t b = from; b < to; ++b) active[n_active] = b, sum[n_active++] = 0;
    const float inverse_l = 1.0f / (float)p.n_classes;
    const S epsilon = (S)p.epsilon;
    alignas(64) uint32_t c0[kArrivals / 2], c2[kArrivals / 2], words[4][kArrivals / 2];
    alignas(64) int32_t gaps[2][kArrivals / 2];
    alignas(64) int64_t times[kArrivals];
    alignas(64) float z[kArrivals];
    alignas(64) int32_t drawn[kArrivals];  // classes, from 0 on
    alignas(64) S clean[kArrivals + kLanes], shift[kArrivals + kLanes];
    uint32_t done = 0;  // pairs of arrivals behind us
    int64_t walked = 0;
    for (int round = 0; n_active; ++round) {
      int pairs = round ? 8 : ((int)average + 8) / 8 * 4;
      const int most = kArrivals / 2 / n_active / 4 * 4;
      pairs = pairs > most ? most : pairs;
      if (round > 1) pairs = most < 16 ? most : 16;
      const int calls = n_active * pairs, padded = round_up(calls, kLanes);
      for (int a = 0; a < n_active; ++a)
        for (int i = 0; i < pairs; i += 4) {
          const uint32_t first = done + (uint32_t)i, sample = (uint32_t)(b0 + active[a]);
          store(Four{first, first + 1, first + 2, first + 3}, c0 + a * pairs + i);
          store(Four{sample, sample, sample, sample}, c2 + a * pairs + i);
        }
      for (int i = calls; i < padded; ++i) c0[i] = c2[i] = 0;
      philox_block(keys, c0, row, c2, 0, 1 + (uint32_t)p.first_class, padded, words[0], words[1], words[2], words[3]);
      for (int i = 0; i < padded; i += Vector<float>::n) {
        store(gap<Wide>(Wide::load(words[0] + i)), gaps[0] + i);
        store(gap<Wide>(Wide::load(words[2] + i)), gaps[1] + i);
      }
      for (int a = 0; a < n_active; ++a)
        for (int i = a * pairs; i < (a + 1) * pairs; ++i) {
          times[2 * i] = sum[a] += gaps[0][i];
          times[2 * i + 1] = sum[a] += gaps[1][i];
        }
      for (int i = 2 * calls; i < 2 * padded; ++i) times[i] = 1;
      for (int i = 0; i < 2 * padded; ++i) z[i] = arrival_time(times[i], inverse_l);
      for (int i = 0; i < 2 * padded; i += Vector<float>::n) store(hazard_quantile<Wide>(Wide::load(z + i)), z + i);
      for (int i = 0; i < 2 * padded; ++i) shift[i] = epsilon * (S)z[i];
      scaled_pairs(words[1], words[3], (uint32_t)p.n_classes, padded, drawn);
      for (int i = 0; i < 2 * calls; ++i) clean[i] = widen(scores[drawn[i]]);
      int still = 0;
      for (int a = 0; a < n_active; ++a) {
        const int from = 2 * a * pairs,
                  stopped = follow(active[a], clean + from, shift + from, drawn + from, 2 * pairs);
        walked += stopped;
        if (stopped == 2 * pairs) active[still] = active[a], sum[still++] = sum[a];
      }
      n_active = still;
      done += (uint32_t)pairs;
    }
    average += ((float)walked / (float)(to - from) - average) * 0.125f;
  }

  void search() {
    choose_cut();
    collect();
    if (!nan && cut > -inf && contenders < p.k && fewer_finite_than(plan(p.n_classes, p.k).contenders)) {
      cut = -inf;
      collect();
    }
    if (nan || cut == -inf) return;
    for (int64_t b = 0; b < b1 - b0; b += kGroup) walk(b, b + kGroup < b1 - b0 ? b + kGroup : b1 - b0);
  }
};

template <class T>
void search_items(const Search& p, int64_t begin, int64_t end, void* workspace) {
  using S = typename Arithmetic<T>::type;
  const int width = list_width(p);
  S* values = (S*)(((uintptr_t)workspace + 63) / 64 * 64);
  int32_t* ids = (int32_t*)(values + p.samples_per_split * width);
  const int64_t keep = p.keep_all ? p.k : 1;
  Row<T> row{p, nullptr, Keys(p.seed), width, values, ids};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / p.n_split;
    if (p.target && p.target[n] == p.ignore_index) continue;
    row.scores = (const T*)p.scores + n * p.row_stride;
    row.row = (uint32_t)(p.first_row + n);
    row.b0 = item % p.n_split * p.samples_per_split;
    row.b1 = row.b0 + p.samples_per_split < p.n_sample ? row.b0 + p.samples_per_split : p.n_sample;
    row.search();
    for (int64_t b = row.b0; b < row.b1; ++b) {
      S* v = (S*)p.values + (n * p.n_sample + b) * keep;
      int64_t* c = p.classes + (n * p.n_sample + b) * keep;
      for (int64_t i = 0; i < keep; ++i) {
        const int64_t from = (b - row.b0) * width + (p.keep_all ? i : p.k - 1);
        v[i] = row.nan ? (S)__builtin_nan("") : values[from];
        c[i] = row.nan ? -1 : ids[from];
      }
    }
  }
}

}  // namespace

void search(const Search& p, int64_t begin, int64_t end, void* workspace) {
  switch (p.dtype) {
    case Dtype::kFloat: return search_items<float>(p, begin, end, workspace);
    case Dtype::kDouble: return search_items<double>(p, begin, end, workspace);
    case Dtype::kBFloat16: return search_items<BFloat16>(p, begin, end, workspace);
    case Dtype::kHalf: return search_items<Half>(p, begin, end, workspace);
  }
}

}  // namespace TOPK_FAST_ISA
}  // namespace topk_fast
