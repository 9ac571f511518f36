// The gradient of the scores, or of a slice of the classes: topk_fast/reference.py's `gradient`.
//
// A block finds the entries that fall into its share of the flat output, fills the share with zeros, 16 bytes a store,
// and writes the entries: each byte goes to memory once, except for those. Threads take the entries of all rows.
#pragma once

#include "team.h"

namespace topk_fast {
namespace {

constexpr int64_t kGradientBytes = 8192;  // of the output, filled by a block

// The entry of class c in row n: the sum over the ranks of g_m * (count_m / B), less that of g_m for the target.
template <class S>
__device__ S entry_of(const Gradient& g, int64_t n, int64_t c, bool is_target) {
  const int64_t* classes = g.classes + n * g.n_sample * g.n_ranks;
  const S* grads = (const S*)(g.slope ? g.slope : g.grad) + n * g.n_ranks;
  const S times = g.slope ? ((const S*)g.grad)[n * g.grad_stride] / *(const S*)g.divisor : (S)1;
  S entry = (S)0, total = (S)0;
  for (int64_t m = 0; m < g.n_ranks; ++m) {
    int64_t count = 0;
    for (int64_t b = 0; b < g.n_sample; ++b) count += classes[b * g.n_ranks + m] == c;
    const S grad = times * grads[m], share = grad * ((S)count / (S)g.n_sample);
    entry = m ? entry + share : share;
    total = m ? total + grad : grad;
  }
  return is_target ? entry - total : entry;
}

// What a thread writes for the i-th entry of a share: a value at a place of the flat output, or every `step`-th NaN.
template <class S>
struct Entry {
  int64_t place, end, step;
  S value;
};

// The i-th entry of the rows from `first` on, of which `begin` to `end` of the output are the share.
template <class S>
__device__ __forceinline__ Entry<S> find_entry(const Gradient& g, int64_t first, int64_t i, int64_t begin,
                                               int64_t end) {
  const int64_t ids = g.n_sample * g.n_ranks, entries = ids + 1;  // the target's entry is the last of a row
  const int64_t n = first + i / entries, j = i % entries, start = n * g.n_classes;
  const int64_t y = g.target ? g.target[n] : -1;
  const int64_t c = j < ids ? g.classes[n * ids + j] : y, place = start + c - g.first_class;
  if (g.classes[n * ids] == -2) {
    const int64_t to = start + g.n_classes < end ? start + g.n_classes : end;
    return {(start > begin ? start : begin) + j, to, entries, (S)__builtin_nan("")};
  }
  const bool ignored = g.target && y == g.ignore_index;
  if (ignored || c < 0 || place < start || place >= start + g.n_classes || place < begin || place >= end)
    return {end, end, 1, (S)0};
  return {place, place + 1, 1, entry_of<S>(g, n, c, c == y)};
}

template <class T, class S>
__device__ __forceinline__ void write_entry(const Entry<S>& entry, T* out) {
  for (int64_t at = entry.place; at < entry.end; at += entry.step) round_to(entry.value, out + at);
}

template <class T>
__device__ void write_gradient(const Gradient& g) {
  using S = ArithmeticOf<T>;
  constexpr int W = 16 / sizeof(T);
  constexpr int64_t kShare = kGradientBytes / sizeof(T);
  const int64_t begin = (int64_t)blockIdx.x * kShare, size = g.n_rows * g.n_classes;
  const int64_t end = begin + kShare < size ? begin + kShare : size;
  const int64_t first = begin / g.n_classes, last = (end - 1) / g.n_classes;
  const int64_t n_entries = (last - first + 1) * (g.n_sample * g.n_ranks + 1);
  T* out = (T*)g.out;
  Entry<S> entry{end, end, 1, (S)0};  // the first one's loads are on their way while zeros are stored
  if (threadIdx.x < n_entries) entry = find_entry<S>(g, first, threadIdx.x, begin, end);
  for (int64_t i = begin + (int64_t)threadIdx.x * W; i < end; i += kBlock * W) {
    if (i + W <= end)
      *(uint4*)(out + i) = uint4{0, 0, 0, 0};
    else
      for (int64_t j = i; j < end; ++j) round_to((S)0, out + j);
  }
  __syncthreads();
  write_entry(entry, out);
  for (int64_t i = threadIdx.x + kBlock; i < n_entries; i += kBlock)
    write_entry(find_entry<S>(g, first, i, begin, end), out);
}

}  // namespace
}  // namespace topk_fast
