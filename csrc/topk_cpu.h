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

// Entries of a list of the k best, with the padding that lets kernels read and write whole vectors.
inline int list_width(const Search& p) { return (int)((p.k + 15) / 16 * 16); }

// 64-bit words that a thread needs for the lists of one item.
inline int64_t workspace_words(const Search& p) { return 2 * p.samples_per_split * list_width(p) + 8; }

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
