// The gradient of a loss or of a smoothed value, or a slice of it: topk_fast/reference.py's `gradient`.
//
// A block fills its share of the flat output with zeros, 16 bytes a store, then writes the entries that fall into it:
// each byte goes to memory once, but for those entries. One rounding, to the output's dtype.
#pragma once

#include "team.h"

namespace topk_fast {
namespace {

constexpr int64_t kGradientBytes = 8192;  // of the output, filled by a block

template <class T, class S>
__global__ void __launch_bounds__(kBlock) gradient_kernel(const CudaGradient g) {
  constexpr int64_t kShare = kGradientBytes / sizeof(T);
  const int64_t begin = (int64_t)blockIdx.x * kShare, size = g.n_rows * g.n_classes;
  const int64_t end = begin + kShare < size ? begin + kShare : size;
  T* out = (T*)g.out;
  constexpr int W = 16 / sizeof(T);
  for (int64_t i = begin + (int64_t)threadIdx.x * W; i < end; i += kBlock * W) {
    if (i + W <= end)
      *(uint4*)(out + i) = uint4{0, 0, 0, 0};
    else
      for (int64_t j = i; j < end; ++j) round_to((S)0, out + j);
  }
  __syncthreads();
  for (int64_t n = begin / g.n_classes; n <= (end - 1) / g.n_classes; ++n) {
    const S value = ((const S*)g.result)[n];
    const int64_t start = n * g.n_classes;
    if (value != value) {
      const int64_t first = start > begin ? start : begin;
      const int64_t last = start + g.n_classes < end ? start + g.n_classes : end;
      for (int64_t i = first + threadIdx.x; i < last; i += kBlock) round_to((S)__builtin_nan(""), out + i);
      continue;
    }
    if (g.target && !(value > (S)0)) continue;
    const S coefficient = ((const S*)g.grad)[n * g.grad_stride] * (S)g.scale;
    const int64_t* classes = g.classes + n * g.n_sample;
    const int64_t y = g.target ? g.target[n] : -1;
    for (int64_t b = threadIdx.x; b < g.n_sample + (g.target ? 1 : 0); b += kBlock) {  // the true class comes last
      const int64_t c = b < g.n_sample ? classes[b] : y, place = c - g.first_class;
      if (c < 0 || place < 0 || place >= g.n_classes || start + place < begin || start + place >= end) continue;
      int64_t count = c == y ? -g.n_sample : 0;
      for (int64_t i = 0; i < g.n_sample; ++i) count += classes[i] == c;
      round_to(coefficient * ((S)count / (S)g.n_sample), out + start + place);
    }
  }
}

}  // namespace
}  // namespace topk_fast
