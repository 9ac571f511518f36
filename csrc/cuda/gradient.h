// The gradient of the scores, or of a slice of the classes: topk_fast/reference.py's `gradient`.
//
// A block fills its share of the flat output with zeros, 16 bytes a store, then writes the entries that fall into it:
// each byte goes to memory once, but for those entries. Threads take the entries of all rows of the share.
#pragma once

#include "team.h"

namespace topk_fast {
namespace {

constexpr int64_t kGradientBytes = 8192;  // of the output, filled by a block

// The entry of class c in row n: the sum over the ranks of g_m * (count_m / B), less that of g_m for the target.
template <class S>
__device__ S entry_of(const Gradient& g, int64_t n, int64_t c, bool is_target) {
  const S* grad = (const S*)g.grad + n * g.n_ranks;
  const int64_t* classes = g.classes + n * g.n_sample * g.n_ranks;
  S entry = (S)0, total = (S)0;
  for (int64_t m = 0; m < g.n_ranks; ++m) {
    int64_t count = 0;
    for (int64_t b = 0; b < g.n_sample; ++b) count += classes[b * g.n_ranks + m] == c;
    const S share = grad[m] * ((S)count / (S)g.n_sample);
    entry = m ? entry + share : share;
    total = m ? total + grad[m] : grad[m];
  }
  return is_target ? entry - total : entry;
}

template <class T>
__device__ void write_gradient(const Gradient& g) {
  using S = ArithmeticOf<T>;
  constexpr int W = 16 / sizeof(T);
  constexpr int64_t kShare = kGradientBytes / sizeof(T);
  const int64_t begin = (int64_t)blockIdx.x * kShare, size = g.n_rows * g.n_classes;
  const int64_t end = begin + kShare < size ? begin + kShare : size;
  T* out = (T*)g.out;
  for (int64_t i = begin + (int64_t)threadIdx.x * W; i < end; i += kBlock * W) {
    if (i + W <= end)
      *(uint4*)(out + i) = uint4{0, 0, 0, 0};
    else
      for (int64_t j = i; j < end; ++j) round_to((S)0, out + j);
  }
  __syncthreads();
  const int64_t ids = g.n_sample * g.n_ranks, entries = ids + 1;  // the target's entry is the last of a row
  const int64_t first = begin / g.n_classes, last = (end - 1) / g.n_classes;
  for (int64_t i = threadIdx.x; i < (last - first + 1) * entries; i += kBlock) {
    const int64_t n = first + i / entries, j = i % entries, start = n * g.n_classes;
    const int64_t y = g.target ? g.target[n] : -1;
    if (g.classes[n * ids] == -2) {
      const int64_t to = start + g.n_classes < end ? start + g.n_classes : end;
      for (int64_t at = (start > begin ? start : begin) + j; at < to; at += entries)
        round_to((S)__builtin_nan(""), out + at);
      continue;
    }
    if (g.target && y == g.ignore_index) continue;
    const int64_t c = j < ids ? g.classes[n * ids + j] : y, place = c - g.first_class;
    if (c < 0 || place < 0 || place >= g.n_classes || start + place < begin || start + place >= end) continue;
    round_to(entry_of<S>(g, n, c, c == y), out + start + place);
  }
}

}  // namespace
}  // namespace topk_fast
