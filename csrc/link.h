// The losses that a criterion makes of a row's excesses, and their slopes: topk_fast/criterion.py's formula. Host and
// device code like noise.h.
//
// Bits: one rounding a step, in the formula's order. Only the softplus's exp and log1p may round otherwise than
// torch's.
#pragma once

#include <cmath>

#include "noise.h"

namespace topk_fast {

constexpr int kLinearFrom = 50;  // where softplus and its argument are equal in double

template <class S>
struct Linked {
  S value, slope;
};

// Without a softplus no function of the C library is needed, whose bits and versions differ between systems.
template <class S, bool HAS_SOFTPLUS>
TOPK_FAST_FN Linked<S> linked(LinkKind kind, S x, S beta) {
  if (kind == LinkKind::kIdentity) return {x, (S)1};
  if constexpr (HAS_SOFTPLUS) {
    if (kind == LinkKind::kSoftplus) {
      if (x * beta > kLinearFrom) return {x, (S)1};
      const S z = std::exp(x * beta);
      return {std::log1p(z) / beta, z / (z + 1)};
    }
  }
  return x > 0 ? Linked<S>{x, (S)1} : x <= 0 ? Linked<S>{0, 0} : Linked<S>{x, x};
}

// The class whose margin and weight a row takes; an ignored row takes class 0's, which do not count.
TOPK_FAST_FN int64_t class_of_row(const Link& p, int64_t n) { return p.target[n] == p.ignore_index ? 0 : p.target[n]; }

// Whether that class is one of the margins and weights, where there are any.
TOPK_FAST_FN bool has_numbers(const Link& p, int64_t n) {
  const int64_t y = class_of_row(p, n);
  return (!p.margins && !p.weight) || (y >= 0 && y < p.n_classes);
}

// A row's loss, and its share in a mean.
template <class S>
struct RowLoss {
  S loss, share;
};

// The loss of row n, for which `has_numbers` holds. Its slope is written, and the loss where rows are wanted.
template <class S, bool HAS_SOFTPLUS>
TOPK_FAST_FN RowLoss<S> link_row(const Link& p, int64_t n) {
  const S beta = (S)(1 / p.temperature), scale = (S)p.scale;
  const bool valid = p.target[n] != p.ignore_index;
  const int64_t y = class_of_row(p, n);
  const S margin = p.margins ? ((const S*)p.margins)[y] : (S)p.margin;
  const S weight = !p.weight ? (S)1 : valid ? ((const S*)p.weight)[y] : (S)0;
  S loss = 0;
  for (int64_t m = 0; m < p.n_ranks; ++m) {
    const int64_t at = n * p.n_ranks + m;
    const Linked<S> one = linked<S, HAS_SOFTPLUS>(p.kind, ((const S*)p.excess)[at] + margin, beta);
    const S share = (S)p.rank_weights[m], term = one.value * scale * share;
    loss = m ? loss + term : term;
    ((S*)p.slope)[at] = one.slope * share * weight * scale;
  }
  loss = valid ? loss * weight : (S)0;
  if (p.rows) ((S*)p.rows)[n] = loss;
  return {loss, valid ? weight : (S)0};
}

}  // namespace topk_fast
