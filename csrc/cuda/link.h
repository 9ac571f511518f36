// The losses that a criterion makes of the excesses, row by row as in ../link.h.
//
// A thread takes whole rows, and one launch does all that torch's operations on [N, M] numbers would take a dozen for.
// A loss that is reduced takes one block, whose thread t adds its rows t, t + 1024, ... in this order; then the lanes
// of a warp are added pairwise, and the warps in order. So a sum's bits depend on its terms and their number only.
#pragma once

#include "../link.h"
#include "team.h"

namespace topk_fast {
namespace {

constexpr int kLinkBlock = 1024;

template <class S>
__device__ void write_losses(const Link& p, int64_t* scratch) {
  RowLoss<S> sums{0, 0};
  for (int64_t n = (int64_t)blockIdx.x * kLinkBlock + threadIdx.x; n < p.n_rows; n += (int64_t)gridDim.x * kLinkBlock) {
    if (!has_numbers(p, n)) TOPK_FAST_STOP("target out of bounds");
    const RowLoss<S> row = link_row<S, true>(p, n);
    sums.loss += row.loss, sums.share += row.share;
  }
  if (p.reduction != Reduction::kNone)
    sums = {Block<kLinkBlock>::sum(sums.loss, scratch), Block<kLinkBlock>::sum(sums.share, scratch)};
  if (blockIdx.x || threadIdx.x) return;
  const S divisor = p.reduction == Reduction::kMean ? sums.share : (S)1;
  *(S*)p.divisor = divisor;
  if (p.reduction != Reduction::kNone) *(S*)p.losses = sums.loss / divisor;
}

}  // namespace
}  // namespace topk_fast
