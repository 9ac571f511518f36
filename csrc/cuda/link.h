// The losses that a criterion makes of the excesses, and their slopes: topk_fast/criterion.py's formula.
//
// A thread takes whole rows, and one launch does all that torch's operations on [N, M] numbers would take a dozen for.
// A loss that is reduced takes one block, whose thread t adds its rows t, t + 1024, ... in this order; then the lanes
// of a warp are added pairwise, and the warps in order. So a sum's bits depend on its terms and their number only.
// Bits: one rounding a step, in the formula's order. Only the softplus's exp and log1p may round otherwise than
// torch's.
#pragma once

#include <cmath>

#include "team.h"

namespace topk_fast {
namespace {

constexpr int kLinkBlock = 1024;
constexpr int kLinearFrom = 50;  // where softplus and its argument are equal in double

template <class S>
struct Linked {
  S value, slope;
};

template <class S>
__device__ __forceinline__ Linked<S> linked(LinkKind kind, S x, S beta) {
  if (kind == LinkKind::kIdentity) return {x, (S)1};
  if (kind == LinkKind::kHinge) return x > 0 ? Linked<S>{x, (S)1} : x <= 0 ? Linked<S>{0, 0} : Linked<S>{x, x};
  if (x * beta > kLinearFrom) return {x, (S)1};
  const S z = std::exp(x * beta);
  return {std::log1p(z) / beta, z / (z + 1)};
}

// A class's number, or `otherwise` without any.
template <class S>
__device__ __forceinline__ S number_of(const Link& p, const void* numbers, int64_t y, double otherwise) {
  if (!numbers) return (S)otherwise;
  if (y >= 0 && y < p.n_classes) return ((const S*)numbers)[y];
  TOPK_FAST_STOP("target out of bounds");
  return (S)0;
}

template <class S>
__device__ void write_losses(const Link& p, int64_t* scratch) {
  using Threads = Team<kLinkBlock>;
  const S beta = (S)(1 / p.temperature), scale = (S)p.scale;
  S losses = 0, shares = 0;  // the shares of the rows in a mean
  for (int64_t n = (int64_t)blockIdx.x * kLinkBlock + threadIdx.x; n < p.n_rows; n += (int64_t)gridDim.x * kLinkBlock) {
    const bool valid = p.target[n] != p.ignore_index;
    const int64_t y = valid ? p.target[n] : 0;
    const S margin = number_of<S>(p, p.margins, y, p.margin), weight = number_of<S>(p, p.weight, y, 1);
    S loss = 0;
    for (int64_t m = 0; m < p.n_ranks; ++m) {
      const int64_t at = n * p.n_ranks + m;
      const Linked<S> one = linked<S>(p.kind, ((const S*)p.excess)[at] + margin, beta);
      const S share = (S)p.rank_weights[m], term = one.value * scale * share;
      loss = m ? loss + term : term;
      ((S*)p.slope)[at] = one.slope * share * weight * scale;
    }
    loss = valid ? loss * weight : (S)0;
    if (p.reduction == Reduction::kNone) ((S*)p.losses)[n] = loss;
    losses += loss, shares += valid ? weight : (S)0;
  }
  if (p.reduction != Reduction::kNone) losses = Threads::sum(losses, scratch), shares = Threads::sum(shares, scratch);
  if (blockIdx.x || threadIdx.x) return;
  const S divisor = p.reduction == Reduction::kMean ? shares : (S)1;
  *(S*)p.divisor = divisor;
  if (p.reduction != Reduction::kNone) *(S*)p.losses = losses / divisor;
}

}  // namespace
}  // namespace topk_fast
