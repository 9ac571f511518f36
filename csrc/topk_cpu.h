// Search for the k best noised scores of every (row, sample): what the dispatcher and the kernels share.
#pragma once

#include <stdint.h>

namespace topk_fast {

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

// Work item i is row i / n_split and the i % n_split-th share of that row's samples.
struct Search {
  const void* scores;  // [n_rows, n_classes] of `dtype`, unit class stride
  Dtype dtype;
  int64_t n_rows, n_classes, row_stride;
  const int64_t* target;  // null, or [n_rows]: rows whose target is ignore_index are left out
  int64_t ignore_index;
  uint64_t seed;
  int64_t first_row, first_class;
  int64_t k, n_sample;
  double epsilon;
  bool dense;
  bool keep_all;     // outputs hold the k best, best first, or the k-th alone
  void* values;      // [n_rows, n_sample, k or 1], double where scores are double, else float
  int64_t* classes;  // the same shape, global class ids, -1 where fewer than k scores are finite
  int64_t n_split, samples_per_split;
};

constexpr int kLists = 8;     // samples whose lists stand side by side
constexpr int kWalkers = 32;  // samples, of one or more rows, whose arrivals are walked side by side

// Keys of the lists of one item: k for each sample, samples rounded up to whole groups of lists.
inline int64_t item_keys(const Search& p) { return (p.samples_per_split + kLists - 1) / kLists * kLists * p.k; }

// Items that a thread searches together: as many as fill the walkers and keep their lists in its cache.
inline int64_t items_together(const Search& p) {
  const int64_t samples = p.samples_per_split < p.n_sample ? p.samples_per_split : p.n_sample;
  const int64_t filling = kWalkers / samples, fitting = (1 << 16) / item_keys(p);
  const int64_t items = filling < fitting ? filling : fitting;
  return items > 1 ? items : 1;
}

// 64-bit words that a thread needs.
inline int64_t workspace_words(const Search& p) {
  return items_together(p) * item_keys(p) * (p.dtype == Dtype::kDouble ? 2 : 1) + 8;
}

using SearchFn = void (*)(const Search& p, int64_t begin, int64_t end, void* workspace);

// The search compiled for the best instruction set of this machine, or for the one chosen in module.cpp.
SearchFn search_function();

namespace baseline {
void search(const Search& p, int64_t begin, int64_t end, void* workspace);
}
#if defined(__x86_64__)
namespace avx2 {
void search(const Search& p, int64_t begin, int64_t end, void* workspace);
}
namespace avx512 {
void search(const Search& p, int64_t begin, int64_t end, void* workspace);
}
#endif

}  // namespace topk_fast
