// Search for the k best of s + epsilon * Z of every row and sample on CPU, and the excesses made of them; compiled once
// per instruction set.
//
// Formula and sampler: topk_fast/reference.py; draws: noise.h. `cut_of` finds the cut from some group maxima (a sixth
// of a long row), `collect` takes the classes above it in one pass, `draw` gives each a draw where that can matter,
// and `walk` enters the others as arrivals, 32 samples of several rows side by side. `write` picks the ranks, and
// `finish_row` takes the means in sample order.
// Bytes: the row once, what `cut_of` looks at (a sixth of a long row) twice, one look-up an arrival. Work items are
// (row, share of the samples).
// Bits: every rounding is noise.h's or stands here; the order is (value descending, class ascending).
#pragma once

#include "draw.h"
#include "walk.h"

namespace topk_fast {
namespace TOPK_FAST_ISA {
namespace {

// A row and the samples [b0, b1) of it that are searched together.
struct Item {
  int64_t n, b0, b1;
};

// The contenders of a row into its lists; false where a score is NaN.
template <class L, class T, class S>
bool enter_contenders(Row<T>& row, Tile<S>& tile, Learned<S>& learned) {
  const S inf = (S)__builtin_inf();
  for (;;) {
    int64_t contenders = 0;
    bool nan = false;
    row.clear();
    collect(row, tile, [&](int n) {
      nan = !draw<L>(row, tile, n, contenders, learned);
      contenders += n;
      return !nan;
    });
    if (nan) return false;
    const bool enough = contenders >= row.p.k || !(row.cut > -inf);
    if (enough || !finite_are_fewer(row.p, row.scores, plan(row.p.n_classes, row.p.k, row.p.law).contenders))
      return true;
    row.cut = -inf;  // the walk over the others might find too few: every class contends
  }
}

// A row's excesses [n_ranks] from the values picked [n_sample, n_ranks]; a NaN marks all its class ids.
template <class T, class S>
void finish_row(const Search& p, int64_t n, const S* picked) {
  const S inverse = (S)(1.0 / (double)p.n_sample);
  S* out = (S*)p.values + n * p.n_ranks;
  bool nan = false;
  for (int m = 0; m < p.n_ranks; ++m) {
    S sum = picked[m];
    for (int64_t b = 1; b < p.n_sample; ++b) sum += picked[b * p.n_ranks + m];
    out[m] = sum * inverse;
    if (p.target) out[m] -= (S)widen(((const T*)p.scores)[n * p.row_stride + p.target[n]]);
    nan |= out[m] != out[m];
  }
  int64_t* classes = p.classes + n * p.n_sample * p.n_ranks;
  for (int64_t i = 0; nan && i < p.n_sample * p.n_ranks; ++i) classes[i] = -2;
}

// The results of an item: all k best, or what its ranks pick; NaN where `lists` is null.
template <class T, class S>
void write(const Job& job, const Item& item, const Key<S>* lists, S* picked) {
  const Search& p = job.p;
  const int64_t n = item.n, entries = p.n_ranks ? p.n_ranks : p.k;
  S* values = p.n_ranks ? picked : (S*)p.values + n * p.n_sample * p.k;
  if (p.n_ranks && job.n_split > 1) values = (S*)job.picked + n * p.n_sample * p.n_ranks;
  for (int64_t b = item.b0; b < item.b1; ++b) {
    const int64_t sample = b - item.b0;
    const Key<S>* list = lists ? lists + sample / kLists * kLists * p.k + sample % kLists : nullptr;
    for (int64_t m = 0; m < entries; ++m) {
      int64_t i = p.n_ranks ? p.ranks[m] - 1 : m;
      if (list && p.exclude_target) {  // the true class pushes back the others that come after it
        bool ahead = false;
        for (int64_t j = 0; j < i; ++j) ahead |= class_of<S>(list[j * kLists]) == p.target[n];
        i -= !ahead;
      }
      values[b * entries + m] = list ? value_of<S>(list[i * kLists]) : (S)__builtin_nan("");
      p.classes[(n * p.n_sample + b) * entries + m] = list ? class_of<S>(list[i * kLists]) : -2;
    }
  }
  if (p.n_ranks && job.n_split == 1) finish_row<T>(p, n, picked);
}

void write_ignored(const Search& p, int64_t n) {
  const int64_t item = p.type == ScoreType::kFloat64 ? 8 : 4;
  memset((char*)p.values + n * p.n_ranks * item, 0, (size_t)(p.n_ranks * item));
  for (int64_t i = 0; i < p.n_sample * p.n_ranks; ++i) p.classes[n * p.n_sample * p.n_ranks + i] = -1;
}

template <class L, class T>
void search_items(const Job& job, int64_t begin, int64_t end, void* workspace) {
  using S = typename Arithmetic<T>::type;
  const Search& p = job.p;
  const Keys philox_keys((uint64_t)*p.seed);
  const int64_t together = items_together(job), keys = item_keys(job);
  Key<S>* lists = (Key<S>*)(((uintptr_t)workspace + 63) / 64 * 64);
  S* picked = (S*)(lists + together * keys);
  Tile<S> tile;
  Learned<S> learned;
  Walker<T> walkers[kWalkers];
  bool nan[kWalkers];
  for (int64_t first = begin; first < end; first += together) {
    const int64_t items = end - first < together ? end - first : together;
    const auto each = [&](auto do_item) {
      for (int64_t i = 0; i < items; ++i) {
        const int64_t n = (first + i) / job.n_split, b0 = (first + i) % job.n_split * job.samples_per_split;
        const int64_t b1 = b0 + job.samples_per_split < p.n_sample ? b0 + job.samples_per_split : p.n_sample;
        if (!p.target || p.target[n] != p.ignore_index)
          do_item(i, Item{n, b0, b1});
        else if (b0 == 0)
          write_ignored(p, n);
      }
    };
    int walking = 0;
    each([&](int64_t i, const Item& item) {
      const T* scores = (const T*)p.scores + item.n * p.row_stride;
      Row<T> row{p, philox_keys, scores, (uint32_t)(p.first_row + item.n), item.b0, item.b1, lists + i * keys, 0};
      row.cut = cut_of(p, scores, learned.cut);
      const int64_t next = (first + i + 1) / job.n_split;
      if (first + i + 1 < end && next != item.n) {
        const uintptr_t begins = (uintptr_t)((const T*)p.scores + next * p.row_stride);
        tile.ahead = {begins, begins + p.n_classes * sizeof(T)};
      }
      nan[i] = !enter_contenders<L>(row, tile, learned);
      if (nan[i] || !(row.cut > -(S)__builtin_inf())) return;
      for (int64_t b = item.b0; b < item.b1; ++b) {
        walkers[walking++] = {scores, row.cut, row.number, (uint32_t)b, row.list(b - item.b0)};
        if (walking < kWalkers) continue;
        walk<L>(p, philox_keys, walkers, walking);
        walking = 0;
      }
    });
    walk<L>(p, philox_keys, walkers, walking);
    each([&](int64_t i, const Item& item) { write<T, S>(job, item, nan[i] ? nullptr : lists + i * keys, picked); });
  }
}

template <class F>
void with_scores(ScoreType type, F f) {
  switch (type) {
    case ScoreType::kFloat32: return f(float());
    case ScoreType::kFloat64: return f(double());
    case ScoreType::kBFloat16: return f(BFloat16());
    case ScoreType::kFloat16: return f(Half());
  }
}

}  // namespace

void search(const Job& job, int64_t begin, int64_t end, void* workspace) {
  with_scores(job.p.type, [&](auto score) {
    using T = decltype(score);
    if (job.p.law == Law::kGumbel)
      search_items<GumbelLaw, T>(job, begin, end, workspace);
    else
      search_items<NormalLaw, T>(job, begin, end, workspace);
  });
}

void finish(const Job& job) {
  with_scores(job.p.type, [&](auto score) {
    using T = decltype(score);
    using S = typename Arithmetic<T>::type;
    const int64_t row = job.p.n_sample * job.p.n_ranks;
    for (int64_t n = 0; n < job.p.n_rows; ++n)
      if (!job.p.target || job.p.target[n] != job.p.ignore_index)
        finish_row<T>(job.p, n, (const S*)job.picked + n * row);
  });
}

}  // namespace TOPK_FAST_ISA
}  // namespace topk_fast
