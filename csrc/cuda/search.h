// The search of a row for all samples: draws for the contenders, arrivals for the others, and what is made of them.
//
// Draws: noise.h. Threads share the contenders, four draws a call; words that pass a bound wait in their sample's list,
// and warps take the samples. What `word_bound` drops could not have entered.
#pragma once

#include "../bounds.h"
#include "bag.h"
#include "contenders.h"

namespace topk_fast {
namespace {

constexpr int kTile = 32;  // contenders whose draws make the first bound

// A row as the stages below see it.
template <class T, class S>
struct Row {
  const T* scores;
  int64_t class_stride;
  S cut;
  bool direct;                // contenders are looked for in the row, not in the lists
  const Contender<S>* lists;  // segments of `capacity`
  const int32_t* prefix;      // [segments + 1]: how many contenders stand before each segment
  int segments, capacity;
  int32_t n;  // contenders, or classes to look through
  uint32_t number;
  uint32_t key0, key1;

  __device__ __forceinline__ Contender<S> contender(int32_t i) const {
    if (direct) return {(S)widen(scores[i * class_stride]), i};
    int low = 0, high = segments;  // the segment with prefix[low] <= i < prefix[low + 1]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (prefix[middle] <= i)
        low = middle;
      else
        high = middle;
    }
    return lists[(int64_t)low * capacity + (i - prefix[low])];
  }
};

// The contenders' draws for samples [first, first + count): the k best of each into its bag. True where one is NaN.
template <class T, class S, int TEAM>
__device__ bool draw(const Args& a, const Row<T, S>& row, int64_t first, int count, S* bag_values, int32_t* bag_classes,
                     Survivor* survivors, int* counts, int64_t* scratch) {
  using Threads = Team<TEAM>;
  const int rank = Threads::rank(), lane = Threads::lane(), k = (int)a.p.k, held = a.l.held;
  const unsigned before = (1u << lane) - 1;
  const S epsilon = (S)a.p.epsilon;
  const float rough = bound_epsilon(a.p.epsilon);
  for (int b = Threads::warp(); b < count; b += TEAM / 32) bag_of(bag_values, bag_classes, b, k).clear();
  if (rank < 16) counts[rank] = 0;
  Threads::sync();
  S reach = -infinity<S>();  // every sample's k-th best is at least this
  bool nan = false;
  int32_t done = 0;
  while (done < row.n) {
    // Tiles until some sample's list is nearly full; the first is small, for it makes the first bound.
    int waiting = 0;
    do {
      const int tile = done == 0 ? kTile : TEAM;
      const int32_t i = done + rank;
      const bool here = rank < tile && i < row.n;
      Contender<S> c = {-infinity<S>(), 0};
      if (here) c = row.contender(i);
      nan |= c.score != c.score;
      const int32_t bound = here && c.score > row.cut ? word_bound<Scalar>((float)c.score, (float)reach, rough) : -1;
      for (int quad = 0; quad * 4 < count; ++quad) {
        const uint32_t class_id = (uint32_t)(c.class_id + (int32_t)a.p.first_class);
        const Words w = philox(class_id, row.number, (uint32_t)(first / 4 + quad), 0, row.key0, row.key1);
        const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
        for (int j = 0; j < 4; ++j) {
          const int b = quad * 4 + j;
          if (b >= count) break;
          const bool pass = (int32_t)(words[j] >> 8) <= bound;
          const unsigned mask = __ballot_sync(kFull, pass);
          if (!mask) continue;
          int at = 0;
          if (lane == 0) at = atomicAdd(&counts[b], __popc(mask));
          at = __shfl_sync(kFull, at, 0) + __popc(mask & before);
          if (pass) survivors[b * held + at] = {words[j], i};
        }
      }
      done += tile;
      Threads::sync();
      waiting = 0;
      for (int b = 0; b < count; ++b) waiting = counts[b] > waiting ? counts[b] : waiting;
      Threads::sync();
    } while (done > kTile && done < row.n && waiting + TEAM <= held);
    for (int b = Threads::warp(); b < count; b += TEAM / 32) {
      const Bag<S> bag = bag_of(bag_values, bag_classes, b, k);
      for (int start = 0; start < counts[b]; start += 32) {
        const bool here = start + lane < counts[b];
        S value = -infinity<S>();
        int32_t class_id = 0;
        if (here) {
          const Survivor s = survivors[b * held + start + lane];
          const Contender<S> c = row.contender(s.contender);
          value = c.score + epsilon * (S)normal<Scalar>((int32_t)s.word);
          class_id = c.class_id + (int32_t)a.p.first_class;
        }
        bag.enter_lanes(here && value > -infinity<S>(), value, class_id);
      }
    }
    Threads::sync();
    reach = infinity<S>();
    for (int b = 0; b < count; ++b) {
      const S worst = bag_of(bag_values, bag_classes, b, k).worst();
      reach = worst < reach ? worst : reach;
    }
    if (rank < 16) counts[rank] = 0;
    Threads::sync();
  }
  return Threads::reduce((int)nan, scratch, Most<int>()) != 0;
}

// The classes at or below the cut into one sample's bag: arrivals at falling levels, a lane each, until none can enter.
// Scores of those that `time_bound` rules out are not read; they end the walk.
template <class T, class S>
__device__ void walk(const Args& a, const Row<T, S>& row, int64_t sample, const Bag<S>& bag) {
  const int lane = (int)(threadIdx.x % 32);
  const S epsilon = (S)a.p.epsilon;
  const float rough = bound_epsilon(a.p.epsilon);
  int64_t sum = 0;
  for (uint32_t pair = 0;; pair += 16) {
    const Words w = philox(pair + (uint32_t)(lane / 2), row.number, (uint32_t)sample, 1 + (uint32_t)a.p.first_class,
                           row.key0, row.key1);
    const uint32_t gap_word = lane % 2 ? w.w2 : w.w0, class_word = lane % 2 ? w.w3 : w.w1;
    int64_t time = gap<Scalar>((int32_t)gap_word);
    for (int by = 1; by < 32; by *= 2) {
      const int64_t other = __shfl_up_sync(kFull, time, (unsigned)by);
      if (lane >= by) time += other;
    }
    time += sum;
    sum = __shfl_sync(kFull, time, 31);
    const float e = arrival_time(time, a.inverse_l);
    const bool matters = e <= time_bound<Scalar>((float)row.cut, (float)bag.worst(), rough);
    if (__ballot_sync(kFull, matters) == 0) return;
    const int32_t drawn = (int32_t)(((uint64_t)class_word * (uint64_t)a.p.n_classes) >> 32);
    const int32_t class_id = drawn + (int32_t)a.p.first_class;
    const S shift = (S)hazard_quantile<Scalar>(e) * epsilon;
    const S clean = matters ? (S)widen(row.scores[drawn * row.class_stride]) : -infinity<S>();
    const S level = row.cut + shift, value = clean + shift;
    const bool fits = clean <= row.cut && value > -infinity<S>();
    int next = 0;  // the first lane that is not dealt with
    for (;;) {
      const bool ahead = lane >= next;
      const unsigned ends = __ballot_sync(kFull, ahead && !(level > bag.worst()));
      const unsigned good =
          __ballot_sync(kFull, ahead && fits && bag.better(value, class_id, bag.worst(), bag.worst_class()));
      const int stop = ends ? __ffs(ends) - 1 : 32, first = good ? __ffs(good) - 1 : 32;
      if (first >= stop) {
        if (stop < 32) return;
        break;
      }
      const S v = __shfl_sync(kFull, value, first);
      const int32_t c = __shfl_sync(kFull, class_id, first);
      if (!bag.holds(c)) bag.enter(v, c);
      next = first + 1;
    }
  }
}

template <class T, class S, int TEAM>
__device__ void search_row(const Args& a, char* shared, char* workspace, int64_t slot, int64_t n, uint64_t seed) {
  using Threads = Team<TEAM>;
  const CudaSearch& p = a.p;
  const int rank = Threads::rank(), warp = Threads::warp(), lane = Threads::lane(), k = (int)p.k;
  int64_t* scratch = (int64_t*)(shared + a.l.reduce_at);
  int32_t* prefix = (int32_t*)(shared + a.l.prefix_at);
  int* counts = (int*)(shared + a.l.counts_at);
  Survivor* survivors = (Survivor*)(shared + a.l.work_at);
  char* own = workspace + p.n_rows * a.l.workspace_headers + slot * a.l.workspace_slot;
  S* bag_values = (S*)(a.l.bags_in_shared ? shared + a.l.bags_at : own);
  int32_t* bag_classes = (int32_t*)(bag_values + (int64_t)a.l.samples * k);
  Contender<S>* lists = (Contender<S>*)(a.l.lists_in_shared ? shared + a.l.lists_at : own + a.l.workspace_lists);

  Row<T, S> row{};
  row.scores = (const T*)p.scores + n * p.row_stride, row.class_stride = p.class_stride;
  row.lists = lists, row.prefix = prefix, row.segments = a.l.segments, row.capacity = a.l.capacity;
  row.number = (uint32_t)(p.first_row + n), row.key0 = (uint32_t)seed, row.key1 = (uint32_t)(seed >> 32);
  row.cut = -infinity<S>(), row.direct = true, row.n = (int32_t)p.n_classes;
  if (a.l.row_in_shared) {
    T* kept = (T*)(shared + a.l.row_at);
    const int lead = p.class_stride == 1 ? (int)((uintptr_t)row.scores % 16 / sizeof(T)) : 0;
    constexpr int W = 16 / sizeof(T);
    const T* base = row.scores - lead * row.class_stride;
    for (int64_t i = (int64_t)rank * W; i < p.n_classes + lead; i += TEAM * W) {
      if (p.class_stride == 1 && i >= lead && i + W <= p.n_classes + lead)
        *(uint4*)(kept + i) = *(const uint4*)(base + i);
      else
        for (int64_t j = i < lead ? lead : i; j < i + W && j < p.n_classes + lead; ++j)
          kept[j] = base[j * row.class_stride];
    }
    row.scores = kept + lead, row.class_stride = 1;
    Threads::sync();
  }
  bool nan = false;
  if (a.planned) {
    const int32_t* found = prefix + 1;  // counts of the segments
    if (a.l.parts > 1) {
      const char* header = workspace + n * a.l.workspace_headers;
      row.cut = *(const S*)header;
      found = (const int32_t*)(header + 16);
    } else {
      row.cut = cut_of<T, S, TEAM>(a, row.scores, row.class_stride, shared + a.l.work_at, scratch);
      const int count = collect<T, S, TEAM>(row.scores, row.class_stride, 0, p.n_classes, row.cut,
                                            lists + (int64_t)warp * a.l.capacity, a.l.capacity);
      if (lane == 0) prefix[1 + warp] = count;
      Threads::sync();
    }
    int64_t total = 0;
    bool over = false;
    for (int s = 0; s < a.l.segments; ++s) {
      nan |= found[s] < 0;
      over |= found[s] > a.l.capacity;
      total += found[s];
    }
    Threads::sync();  // all have read the counts
    if (rank == 0) {
      int32_t sum = 0;
      for (int s = 0; s < a.l.segments; ++s) {
        const int32_t here = found[s];
        prefix[s] = sum, sum += here;
      }
      prefix[a.l.segments] = sum;
    }
    row.direct = over || row.cut == -infinity<S>();
    if (!nan && total < k &&
        finite_are_fewer<T, S, TEAM>(row.scores, row.class_stride, p.n_classes, a.plan.contenders, scratch))
      row.cut = -infinity<S>(), row.direct = true;
    if (!row.direct) row.n = (int32_t)total;
    Threads::sync();
  }
  S sum = (S)0;
  for (int64_t first = 0; first < p.n_sample; first += a.l.samples) {
    const int count = p.n_sample - first < a.l.samples ? (int)(p.n_sample - first) : a.l.samples;
    if (!nan) nan = draw<T, S, TEAM>(a, row, first, count, bag_values, bag_classes, survivors, counts, scratch);
    if (!nan && row.cut > -infinity<S>())
      for (int b = warp; b < count; b += TEAM / 32)
        walk<T, S>(a, row, first + b, bag_of(bag_values, bag_classes, b, k));
    Threads::sync();
    for (int b = warp; b < count; b += TEAM / 32) {
      const Bag<S> bag = bag_of(bag_values, bag_classes, b, k);
      if (p.mode == kCandidates) {
        for (int i = lane; i < k; i += 32) {
          const int64_t to = (n * p.n_sample + first + b) * k + i;
          ((S*)p.values)[to] = nan ? (S)__builtin_nan("") : bag.values[i];
          p.classes[to] = nan ? -1 : bag.classes[i];
        }
      } else if (lane == 0) {
        p.classes[n * p.n_sample + first + b] = nan ? -1 : bag.worst_class();
      }
    }
    for (int b = 0; b < count && p.mode != kCandidates && !nan; ++b) {  // in sample order, for the sum's bits
      const S worst = bag_of(bag_values, bag_classes, b, k).worst();
      sum = first + b == 0 ? worst : sum + worst;
    }
    Threads::sync();
  }
  if (p.mode == kCandidates || rank != 0) return;
  const S top = nan ? (S)__builtin_nan("") : sum * (S)(1.0 / (double)p.n_sample);
  S* out = (S*)p.values + n;
  if (p.mode == kSmoothed) {
    *out = top;
    return;
  }
  const int64_t y = p.target[n];
  if (y < 0 || y >= p.n_classes) {  // stops the device, as torch's own losses do
    __trap();
    return;
  }
  const S margin = p.margins ? ((const S*)p.margins)[y] : (S)1;
  const S true_score = (S)widen(((const T*)p.scores)[n * p.row_stride + y * p.class_stride]);
  const S excess = ((margin + top) - true_score) * (S)p.scale;
  *out = excess <= (S)0 ? (S)0 : excess;
}

template <class T, class S, int TEAM>
__global__ void __launch_bounds__(kBlock, 4) search_kernel(const Args a) {
  TOPK_FAST_SHARED(all_shared);
  using Threads = Team<TEAM>;
  const int team = (int)(threadIdx.x / TEAM), teams = kBlock / TEAM;
  char* shared = all_shared + team * a.l.shared;
  const uint64_t seed = (uint64_t)*a.p.seed;
  const int64_t slot = (int64_t)blockIdx.x * teams + team;
  if (a.p.mode == kLoss && slot == 0) {
    int64_t valid = 0;
    for (int64_t n = Threads::rank(); n < a.p.n_rows; n += TEAM) valid += a.p.target[n] != a.p.ignore_index;
    valid = Threads::reduce(valid, (int64_t*)(shared + a.l.reduce_at), Sum<int64_t>());
    if (Threads::rank() == 0) *(S*)a.p.n_valid = (S)valid;
  }
  for (int64_t n = slot; n < a.p.n_rows; n += (int64_t)gridDim.x * teams) {
    if (a.p.mode == kLoss && a.p.target[n] == a.p.ignore_index) {
      for (int64_t b = Threads::rank(); b < a.p.n_sample; b += TEAM) a.p.classes[n * a.p.n_sample + b] = -1;
      if (Threads::rank() == 0) ((S*)a.p.values)[n] = (S)0;
    } else {
      search_row<T, S, TEAM>(a, shared, (char*)a.p.workspace, slot, n, seed);
    }
    Threads::sync();
  }
}

}  // namespace
}  // namespace topk_fast
