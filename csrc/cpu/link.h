// The losses that a criterion makes of the excesses on CPU, row by row as in ../link.h; torch adds them up.
#pragma once

#include "../link.h"
#include "../stable_tensor.h"

namespace topk_fast {

// Writes the rows' losses and slopes, and the divisor.
template <class S>
void write_losses(const Link& p) {
  S share = 0;
  for (int64_t n = 0; n < p.n_rows; ++n) {
    STD_TORCH_CHECK(has_numbers(p, n), "target out of bounds");
    share += link_row<S, false>(p, n).share;
  }
  *(S*)p.divisor = p.reduction == Reduction::kMean ? share : (S)1;
}

}  // namespace topk_fast
