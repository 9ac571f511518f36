// The k best of s + epsilon * Z for every row and sample, on CPU; compiled once per instruction set.
//
// Formula and sampler: topk_fast/reference.py; draws: noise.h. One pass over a row finds the cut from some group
// maxima (a sixth of a long row), a second one collects the classes above it. In blocks of kTile each gets a word per
// sample, and a normal where that word can matter (bounds.h); the others enter as arrivals (walk.h).
// Fused: noise never leaves registers and L1; legal because the k best of a union come from the k bests of its
// parts, and a value below a lower bound of the k-th best cannot enter.
// Bytes: the row once, a sixth of it twice, B arrivals' look-ups; work items are (row, share of the samples).
// Bits: every rounding is noise.h's or one written here; order is (value descending, class ascending).

#include "walk.h"

namespace topk_fast {
namespace TOPK_FAST_ISA {

namespace {

constexpr int kTile = 512;    // contenders drawn at a time
constexpr int kAhead = 4096;  // bytes of a row asked for ahead of their use
constexpr int kHeld = 256;    // words that passed their bounds and wait for their normals

// A value's average over the rows so far, and how far it strays: for guesses, which move cost and never results.
template <class S>
struct Usual {
  S mean = 0, spread = (S)__builtin_inf();
  void learn(S x, S first_spread) {
    const S off = x - mean, size = off < 0 ? -off : off;
    const bool first = !(spread < (S)__builtin_inf());
    mean = first ? x : mean + off * (S)0.125;
    spread = first ? first_spread : spread + (size - spread) * (S)0.125;
  }
};

// One row's samples [b0, b1) and their k best so far.
template <class T>
struct Row {
  using S = typename Arithmetic<T>::type;
  using V = Vector<S>;
  const Search& p;
  const Keys keys;
  const T* scores = nullptr;
  Key<S>* lists = nullptr;  // [groups of kLists samples][k][kLists]
  uint32_t row = 0;
  int64_t b0 = 0, b1 = 0;
  S cut = 0;
  Usual<S> usual_cut = {}, usual_rise = {};  // rise: of the worst sample's k-th best over the cut, after the first tile
  int64_t contenders = 0;
  bool nan = false;
  alignas(64) int32_t tile_ids[kTile + 80] = {};  // the contenders that wait for their draws
  alignas(64) S tile_scores[kTile + 80] = {};

  static constexpr S inf = (S)__builtin_inf();

  int64_t groups() const { return (b1 - b0 + kLists - 1) / kLists; }
  Key<S>* list(int64_t b) const { return lists + b / kLists * kLists * p.k + b % kLists; }
  S worst() const {
    S least = inf;
    for (int64_t b = 0; b < b1 - b0; ++b) {
      const S kth = kth_value<S>(list(b), (int)p.k);
      least = kth < least ? kth : least;
    }
    return least;
  }

  // Words of a group's samples that passed their bounds, with their contenders.
  struct Held {
    int counts[kLists] = {};  // of each sample
    alignas(64) uint32_t words[kHeld + 64];
    alignas(64) int32_t ids[kHeld + 64];
    alignas(64) S scores[kHeld + 64];
    alignas(64) int32_t places[kHeld + 64];  // among the rows that enter the lists
  };

  // Noised scores s + (epsilon * z) of the words held, into the lists.
  void settle(Held& held, int n, int64_t group) const {
    alignas(64) float z[kHeld + 64];
    alignas(64) Key<S> noised[kHeld + 64], rows[kHeld * kLists];
    const S epsilon = (S)p.epsilon;
    for (int i = 0; i < n; i += Vector<float>::n) store(normal<Wide>(Wide::load(held.words + i)), z + i);
    for (int i = 0; i < n; ++i) noised[i] = key_of(held.scores[i] + epsilon * (S)z[i], held.ids[i]);
    int deepest = 0;
    for (int l = 0; l < kLists; ++l) deepest = held.counts[l] > deepest ? held.counts[l] : deepest, held.counts[l] = 0;
    deepest = round_up(deepest, kAbreast);
    for (int i = 0; i < deepest * kLists; ++i) rows[i] = key_of(-inf, -1);
    for (int i = 0; i < n; ++i) rows[held.places[i]] = noised[i];
    sift(list(group * kLists), (int)p.k, rows, deepest);
  }

  // Draws of a group's samples for the tile's n contenders, and the best of them into its lists.
  void draw(int64_t group, const int32_t* bounds, int n) const {
    const int64_t first = b0 + group * kLists;
    const int count = b1 - first < kLists ? (int)(b1 - first) : kLists;
    Held held;
    int m = 0;
    alignas(64) uint32_t words[4][kLanes];
    for (int i = 0; i < n; i += kLanes) {
      for (int list = 0; list < count; list += 4) {
        philox_block(keys, (const uint32_t*)tile_ids + i, row, (uint32_t)(first + list) / 4, 0, kLanes, words[0],
                     words[1], words[2], words[3]);
        for (int l = list; l < count && l < list + 4; ++l) {
          const uint32_t hits = hits_within(words[l - list], bounds + i);
          for (int j = 0; j < kLanes; ++j) held.places[m + j] = (held.counts[l] + j) * kLists + l;
          const int passed = append(words[l - list], tile_ids + i, tile_scores + i, hits, held.words + m, held.ids + m,
                                    held.scores + m);
          held.counts[l] += passed, m += passed;
        }
      }
      if (m <= kHeld - kLists * kLanes && i + kLanes < n) continue;
      settle(held, m, group);
      m = 0;
    }
  }

  // Draws for the waiting contenders, all samples, and the best of them into the lists. A word is looked at closely
  // only where it can lift its contender to `reach`, which every sample's k-th best attains: known from the second
  // tile on, a guess in the first, which is drawn again if that was too high.
  void flush(int tile) {
    const int n = round_up(tile, kLanes);
    for (int i = 0; i < tile; ++i) tile_scores[i] = widen(scores[tile_ids[i] - p.first_class]);
    for (int i = tile; i < n; ++i) tile_ids[i] = 0, tile_scores[i] = -inf;
    typename V::mask bad = {};
    for (int i = 0; i < n; i += V::n) bad += V::load(tile_scores + i) != V::load(tile_scores + i);
    nan |= V::count(bad) > 0;
    if (nan || !tile) return;
    const bool first = contenders == 0;
    const S base = cut > -inf ? cut : 0;
    S reach = first ? base + (usual_rise.mean - 2 * usual_rise.spread) : worst();
    for (;;) {
      alignas(64) int32_t bounds[kTile + 64];
      alignas(64) float narrow[kTile + 64];
      for (int i = 0; i < n; ++i) narrow[i] = (float)tile_scores[i];
      for (int i = 0; i < n; i += Vector<float>::n)
        store(word_bound<Wide>(Wide::load(narrow + i), Wide::floats((float)reach), bound_epsilon(p.epsilon)),
              bounds + i);
      for (int i = tile; i < n; ++i) bounds[i] = -1;
      for (int64_t group = 0; group < groups(); ++group) draw(group, bounds, n);
      if (!first || !(worst() < reach)) break;
      reach = -inf;
      clear();
    }
    const S least = worst();
    if (first && least > -inf && least < inf) usual_rise.learn(least - base, (S)p.epsilon * (S)0.125);
    contenders += tile;
  }

  void clear() const {
    for (int64_t i = 0; i < groups() * kLists * p.k; ++i) lists[i] = key_of(-inf, -1);
  }

  // Every class above the cut into the tile; a NaN counts as above it and ends the row.
  void collect() {
    contenders = 0;
    nan = false;
    clear();
    alignas(64) S wide[64];
    const S level = cut;
    int waiting = 0;  // what the loop touches lies in registers: stores of ids may alias members
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
      const uint32_t hits[4] = {hits_above(x, level), hits_above(x + 16, level), hits_above(x + 32, level),
                                hits_above(x + 48, level)};
      if (!(hits[0] | hits[1] | hits[2] | hits[3])) continue;
      const int32_t id = (int32_t)(p.first_class + start);
      for (int j = 0; j < 4; ++j) waiting += append_numbers(id + j * kLanes, hits[j], tile_ids + waiting);
      if (waiting < kTile) continue;
      flush(waiting);
      waiting = 0;
      if (nan) return;
    }
    flush(waiting);
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
    cut = rank_near(maxima, padded, plan_.rank, usual_cut.mean, 3 * usual_cut.spread);
    if (cut == inf) cut = -inf;
    if (cut > -inf) usual_cut.learn(cut, (cut < 0 ? -cut : cut) * (S)0.0625);
  }

  bool fewer_finite_than(int64_t m) const {
    int64_t finite = 0;
    for (int64_t i = 0; i < p.n_classes && finite < m; ++i) finite += widen(scores[i]) > -inf;
    return finite < m;
  }

  // The contenders of a row into lists of samples [b0, b1); true where its background is to be walked after it.
  bool search(const T* row_scores, uint32_t row_number, int64_t from, int64_t to, Key<S>* row_lists) {
    scores = row_scores, row = row_number, b0 = from, b1 = to, lists = row_lists;
    choose_cut();
    collect();
    if (!nan && cut > -inf && contenders < p.k && fewer_finite_than(plan(p.n_classes, p.k).contenders)) {
      cut = -inf;
      collect();
    }
    return !nan && cut > -inf;
  }
};

// A row's results.
template <class S>
void write(const Search& p, const Key<S>* lists, int64_t n, int64_t b0, int64_t b1, bool nan) {
  const int64_t keep = p.keep_all ? p.k : 1;
  for (int64_t b = b0; b < b1; ++b) {
    S* v = (S*)p.values + (n * p.n_sample + b) * keep;
    int64_t* c = p.classes + (n * p.n_sample + b) * keep;
    const Key<S>* list = lists + (b - b0) / kLists * kLists * p.k + (b - b0) % kLists;
    for (int64_t i = 0; i < keep; ++i) {
      const Key<S> key = list[(p.keep_all ? i : p.k - 1) * kLists];
      v[i] = nan ? (S)__builtin_nan("") : value_of<S>(key);
      c[i] = nan ? -1 : class_of<S>(key);
    }
  }
}

template <class T>
void search_items(const Search& p, int64_t begin, int64_t end, void* workspace) {
  using S = typename Arithmetic<T>::type;
  Key<S>* lists = (Key<S>*)(((uintptr_t)workspace + 63) / 64 * 64);
  Row<T> row{p, Keys(p.seed)};
  Walker<T> walkers[kWalkers];
  bool nan[kWalkers];
  const int64_t together = items_together(p), keys = item_keys(p);
  for (int64_t first = begin; first < end; first += together) {
    const int64_t items = end - first < together ? end - first : together;
    const auto each = [&](auto do_item) {
      for (int64_t i = 0; i < items; ++i) {
        const int64_t n = (first + i) / p.n_split, b0 = (first + i) % p.n_split * p.samples_per_split;
        if (p.target && p.target[n] == p.ignore_index) continue;
        do_item(i, n, b0, b0 + p.samples_per_split < p.n_sample ? b0 + p.samples_per_split : p.n_sample);
      }
    };
    int walking = 0;
    each([&](int64_t i, int64_t n, int64_t b0, int64_t b1) {
      const T* scores = (const T*)p.scores + n * p.row_stride;
      const uint32_t number = (uint32_t)(p.first_row + n);
      const bool walks = row.search(scores, number, b0, b1, lists + i * keys);
      nan[i] = row.nan;
      for (int64_t b = 0; walks && b < b1 - b0; ++b) {
        walkers[walking++] = {scores, row.cut, number, (uint32_t)(b0 + b), row.list(b)};
        if (walking < kWalkers) continue;
        walk(p, row.keys, walkers, walking);
        walking = 0;
      }
    });
    walk(p, row.keys, walkers, walking);
    each([&](int64_t i, int64_t n, int64_t b0, int64_t b1) { write<S>(p, lists + i * keys, n, b0, b1, nan[i]); });
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
