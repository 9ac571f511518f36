// The k best noised scores of a sample so far, kept in (value, class) order by a warp.
//
// The order is total, so no list depends on the order in which noised scores come. Lists of up to 32 entries lie in the
// lanes' registers while a warp works on them, and in memory between its stages; longer ones stay in memory.
#pragma once

#include "team.h"

namespace topk_fast {
namespace {

// The lists of the samples that a team searches side by side, best first, (-inf, -1) where there are fewer than k.
template <class S>
struct Lists {
  S* values;         // [samples, k]
  int32_t* classes;  // [samples, k]
  int32_t k;

  __device__ __forceinline__ S* values_of(int sample) const { return values + (int64_t)sample * k; }
  __device__ __forceinline__ int32_t* classes_of(int sample) const { return classes + (int64_t)sample * k; }
  __device__ __forceinline__ S worst(int sample) const { return values_of(sample)[k - 1]; }

  __device__ void clear(int sample) const {
    for (int i = lane_of(); i < k; i += 32) values_of(sample)[i] = -infinity<S>(), classes_of(sample)[i] = -1;
  }

  // The place of a class in a sample's list, or k where it does not hold it.
  __device__ int place_of(int sample, int32_t c) const {
    for (int start = 0; start < k; start += 32) {
      const int i = start + lane_of();
      const unsigned found = __ballot_sync(kFull, i < k && classes_of(sample)[i] == c);
      if (found) return start + first_lane(found);
    }
    return k;
  }
};

// A sample's list in the hands of a warp.
template <class S>
struct Best {
  const Lists<S>& lists;
  int sample;
  S value;  // this lane's entry
  int32_t class_id;
  S worst;  // the k-th entry
  int32_t worst_class;

  static __device__ __forceinline__ bool better(S v, int32_t c, S w, int32_t d) { return v > w || (v == w && c < d); }

  __device__ __forceinline__ bool is_short() const { return lists.k <= 32; }

  __device__ __forceinline__ bool admits(S v, int32_t c) const { return better(v, c, worst, worst_class); }

  __device__ __forceinline__ void find_worst() {
    const int last = lists.k - 1;
    worst = is_short() ? __shfl_sync(kFull, value, last) : lists.values_of(sample)[last];
    worst_class = is_short() ? __shfl_sync(kFull, class_id, last) : lists.classes_of(sample)[last];
  }

  __device__ Best(const Lists<S>& lists_, int sample_)
      : lists(lists_), sample(sample_), value(-infinity<S>()), class_id(-1) {
    const int lane = lane_of();
    if (is_short() && lane < lists.k) value = lists.values_of(sample)[lane], class_id = lists.classes_of(sample)[lane];
    find_worst();
  }

  // Leaves the list in memory, where its warp can read it.
  __device__ __forceinline__ void store() const {
    const int lane = lane_of();
    if (is_short() && lane < lists.k) lists.values_of(sample)[lane] = value, lists.classes_of(sample)[lane] = class_id;
    __syncwarp();
  }

  // Whether the list holds a class.
  __device__ __forceinline__ bool has(int32_t c) const {
    return is_short() ? __any_sync(kFull, class_id == c) : lists.place_of(sample, c) < lists.k;
  }

  // Enters (v, c), which is the same in all lanes and is admitted.
  __device__ __forceinline__ void enter(S v, int32_t c) {
    if (!is_short()) return enter_long(v, c);
    const int lane = lane_of();
    const int place = __popc(__ballot_sync(kFull, lane < lists.k && better(value, class_id, v, c)));
    const S before = __shfl_up_sync(kFull, value, 1);
    const int32_t class_before = __shfl_up_sync(kFull, class_id, 1);
    if (lane > place && lane < lists.k) value = before, class_id = class_before;
    if (lane == place) value = v, class_id = c;
    find_worst();
  }

  // Enters those of the lanes' noised scores that are admitted; their classes differ and are not in the list.
  __device__ __forceinline__ void take(bool valid, S v, int32_t c) {
    const unsigned fit = __ballot_sync(kFull, valid && admits(v, c));
    if (!fit) return;
    if (is_short() && 2 * __popc(fit) >= lists.k)
      select(fit, v, c);
    else
      enter_lanes(valid, v, c);
  }

 private:
  // The lane with the best of the lanes' entries, by their values' keys; equal ones are (-inf, -1).
  template <class K>
  static __device__ __forceinline__ int best_lane(K key, int32_t c) {
    const K top = most_of_lanes(key);
    unsigned tied = __ballot_sync(kFull, key == top);
    if (tied & (tied - 1)) {
      const int32_t least = ~most_of_lanes(key == top ? ~c : (int32_t)0x80000000);
      tied = __ballot_sync(kFull, key == top && c == least);
    }
    return first_lane(tied);
  }

  // The k best of the list and of the lanes' noised scores in `fit`: k rounds of a maximum over both.
  __device__ __forceinline__ void select(unsigned fit, S v, int32_t c) {
    const int lane = lane_of();
    S first = value, second = -infinity<S>();
    int32_t first_class = class_id, second_class = -1;
    if (fit >> lane & 1) {
      const bool ahead = better(v, c, value, class_id);
      first = ahead ? v : value, first_class = ahead ? c : class_id;
      second = ahead ? value : v, second_class = ahead ? class_id : c;
    }
    auto key = ordered(first);
    const auto second_key = ordered(second);
#pragma unroll 1
    for (int i = 0; i < lists.k; ++i) {
      const int from = best_lane(key, first_class);
      const S top = __shfl_sync(kFull, first, from);
      const int32_t top_class = __shfl_sync(kFull, first_class, from);
      if (lane == i) value = top, class_id = top_class;
      if (lane != from) continue;
      const bool again = first_class == second_class;  // both of this lane's are taken
      first = again ? -infinity<S>() : second, key = again ? ordered(-infinity<S>()) : second_key;
      first_class = second_class;
    }
    find_worst();
  }

  // The best comes first, so that at most k of the lanes' noised scores are entered.
  __device__ __forceinline__ void enter_lanes(bool valid, S v, int32_t c) {
    for (;;) {
      const bool fits = valid && admits(v, c);
      if (!__any_sync(kFull, fits)) return;
      const int from = best_lane(ordered(fits ? v : -infinity<S>()), fits ? c : -1);
      enter(__shfl_sync(kFull, v, from), __shfl_sync(kFull, c, from));
      if (lane_of() == from) valid = false;
    }
  }

  __device__ void enter_long(S v, int32_t c) {
    S* values = lists.values_of(sample);
    int32_t* classes = lists.classes_of(sample);
    const int lane = lane_of(), k = lists.k;
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
    find_worst();
  }
};

}  // namespace
}  // namespace topk_fast
