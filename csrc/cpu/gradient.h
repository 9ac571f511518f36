// The gradient of the scores on CPU: zero fill, then at most B * M + 1 entries a row. Formula: topk_fast/reference.py.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "../scalar.h"

namespace topk_fast {

// Rows [begin, end). An id and its rank are one number, so that a sort brings a class's ranks together, in order.
template <class T>
void gradient_rows(const Gradient& g, int64_t begin, int64_t end) {
  using S = typename Arithmetic<T>::type;
  const int64_t n_ids = g.n_sample * g.n_ranks, n_ranks = g.n_ranks, first = g.first_class, n_classes = g.n_classes;
  const S n_sample = (S)g.n_sample;
  const std::unique_ptr<int64_t[]> sorted(new int64_t[n_ids]);
  const int64_t* const last = sorted.get() + n_ids;
  for (int64_t n = begin; n < end; ++n) {
    T* row = (T*)g.out + n * n_classes;
    const int64_t* classes = g.classes + n * n_ids;
    if (classes[0] == -2) {
      for (int64_t i = 0; i < n_classes; ++i) round_to((S)__builtin_nan(""), row + i);
      continue;
    }
    std::memset((void*)row, 0, n_classes * sizeof(T));
    if (g.target && g.target[n] == g.ignore_index) continue;
    const int64_t y = g.target ? g.target[n] : -1;
    const S* grads = (const S*)(g.slope ? g.slope : g.grad) + n * n_ranks;
    const S times = g.slope ? ((const S*)g.grad)[n * g.grad_stride] / *(const S*)g.divisor : (S)1;
    S grad[kMaxRanks];
    for (int64_t m = 0; m < n_ranks; ++m) grad[m] = times * grads[m];
    S total = grad[0];
    for (int64_t m = 1; m < n_ranks; ++m) total += grad[m];
    // Writes the entry of class c, whose ids start at `id` if there are any; returns where the next class's start.
    const auto write = [&](int64_t c, const int64_t* id) {
      const auto share = [&](int64_t m) {
        int64_t count = 0;
        for (; id < last && *id == c * kMaxRanks + m; ++id) ++count;
        return grad[m] * ((S)count / n_sample);
      };
      S value = share(0);
      for (int64_t m = 1; m < n_ranks; ++m) value += share(m);
      if (c >= first && c - first < n_classes) round_to(c == y ? value - total : value, row + (c - first));
      return id;
    };
    for (int64_t b = 0; b < n_ids; b += n_ranks)
      for (int64_t m = 0; m < n_ranks; ++m) sorted[b + m] = classes[b + m] * kMaxRanks + m;
    std::sort(sorted.get(), sorted.get() + n_ids);
    if (g.target) write(y, last);
    const int64_t* id = sorted.get();
    while (id < last && *id < 0) ++id;  // -1 is no class
    while (id < last) id = write(*id / kMaxRanks, id);
  }
}

}  // namespace topk_fast
