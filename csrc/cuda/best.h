// The k best noised scores of a sample so far, kept in (value, class) order by a warp.
//
// The order is total, so no list depends on the order in which noised scores come.
#pragma once

#include "../order.h"
#include "team.h"

namespace topk_fast {
namespace {

// Best first, (-inf, -1) where there are fewer than k.
template <class S>
struct Best {
  S* values;
  int32_t* classes;
  int k;

  __device__ __forceinline__ S worst() const { return values[k - 1]; }
  __device__ __forceinline__ int32_t worst_class() const { return classes[k - 1]; }

  static __device__ __forceinline__ bool better(S v, int32_t c, S w, int32_t d) { return v > w || (v == w && c < d); }

  __device__ void clear() const {
    for (int i = (int)(threadIdx.x % 32); i < k; i += 32) values[i] = -infinity<S>(), classes[i] = -1;
    __syncwarp();
  }

  // The place of a class, or k where the list does not hold it.
  __device__ int place_of(int32_t c) const {
    for (int start = 0; start < k; start += 32) {
      const int i = start + (int)(threadIdx.x % 32);
      const unsigned found = __ballot_sync(kFull, i < k && classes[i] == c);
      if (found) return start + __ffs(found) - 1;
    }
    return k;
  }

  // Enters (v, c), which is the same in all lanes and better than the worst.
  __device__ void enter(S v, int32_t c) const {
    const int lane = (int)(threadIdx.x % 32);
    int place = 0;
    for (int start = 0; start < k; start += 32) {
      const int i = start + lane;
      const unsigned ahead = __ballot_sync(kFull, i < k && better(values[i], classes[i], v, c));
      place += __popc(ahead);
      if (ahead != kFull) break;
    }
    for (int start = (k - 1) / 32 * 32; start >= 0 && start + 31 >= place; start -= 32) {
      const int i = start + lane;
      S moved = v;
      int32_t moved_class = c;
      if (i > place && i < k) moved = values[i - 1], moved_class = classes[i - 1];
      __syncwarp();
      if (i >= place && i < k) values[i] = moved, classes[i] = moved_class;
      __syncwarp();
    }
  }

  // Enters those of the lanes' noised scores that are good enough; their classes differ and are not in the list. The
  // best comes first, so that at most k of them are entered.
  __device__ void enter_lanes(bool valid, S v, int32_t c) const {
    const auto key = ordered(v);
    for (;;) {
      const bool fits = valid && better(v, c, worst(), worst_class());
      const unsigned mask = __ballot_sync(kFull, fits);
      if (!mask) return;
      const auto top = most_of_lanes(fits ? key : ordered(-infinity<S>()));
      const int source = __ffs(__ballot_sync(kFull, fits && key == top)) - 1;
      enter(__shfl_sync(kFull, v, source), __shfl_sync(kFull, c, source));
      if ((int)(threadIdx.x % 32) == source) valid = false;
    }
  }
};

// The lists of the samples that a team searches side by side.
template <class S>
struct Lists {
  S* values;         // [samples, k]
  int32_t* classes;  // [samples, k]
  int k;
  __device__ __forceinline__ Best<S> operator[](int sample) const {
    return {values + (int64_t)sample * k, classes + (int64_t)sample * k, k};
  }
};

}  // namespace
}  // namespace topk_fast
