// The k best of s + epsilon * Z for every row and sample, the losses made of them, and their gradient, in CUDA.
//
// Formula and sampler: topk_fast/reference.py; draws: noise.h. A team of 32 or 128 threads takes a row: `cut_of` finds
// the cut from groups of classes, `collect` streams the row in 16-byte loads and keeps the classes above the cut,
// `draw` gives them noise, `walk` lets all others come as arrivals, a warp a sample, and the kernel ends with the mean,
// the hinge and the class ids. Few long rows are collected by several blocks first, in a launch of their own.
// Fused: noise lives in registers; a draw costs a comparison of its word, and a normal only where that passes.
// Bytes: the row once (twice where it does not fit into shared memory: 1/stride of it for the cut), 32 for each
// arrival's score; the gradient's once. Bits: every rounding is noise.h's or written here, without contraction
// (--fmad=false); what `word_bound` drops could not have entered. Lists are kept in (value, class) order, which is
// total: no result depends on the order in which threads find things.
#include "topk_cuda.h"

#ifndef TOPK_FAST_LAUNCH  // tests/simt.h has its own
#include <cuda_runtime.h>
#define TOPK_FAST_LAUNCH(kernel, grid, size, shared, stream, ...) kernel<<<grid, size, shared, stream>>>(__VA_ARGS__)
#define TOPK_FAST_SHARED(name)                    \
  extern __shared__ __align__(16) char name##_[]; \
  char* name = name##_
#endif

namespace topk_fast {
namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kBlock = 128;    // threads of a block: one team, or four of a warp
constexpr int kGroups = 1024;  // more than `plan` ever looks at
constexpr int kTile = 32;      // contenders whose draws make the first bound
constexpr int kUnroll = 4;     // 16-byte loads in flight a thread
constexpr int kMaxParts = 16;  // blocks that share a row
constexpr int kSharedBudget = 46 << 10;
constexpr int64_t kGradientBytes = 8192;  // of the output, filled by a block

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return Scalar::as_float((int32_t)((uint32_t)x.bits << 16)); }
__device__ __forceinline__ float widen(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  _Float16 h;
  memcpy(&h, &x, 2);
  return (float)h;
#endif
}

__device__ __forceinline__ void round_to(float x, float* out) { *out = x; }
__device__ __forceinline__ void round_to(double x, double* out) { *out = x; }
__device__ __forceinline__ void round_to(float x, BFloat16* out) {
  const uint32_t b = (uint32_t)Scalar::as_int(x);
  out->bits = (uint16_t)((x == x ? b + 0x7FFF + (b >> 16 & 1) : 0x7FC00000u) >> 16);
}
__device__ __forceinline__ void round_to(float x, Half* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const _Float16 h = (_Float16)x;
  memcpy(out, &h, 2);
#endif
}

template <class S>
__device__ __forceinline__ S infinity() {
  return (S)__builtin_inf();
}

// Integers in the order of floats; -0 equals +0. Nothing but NaN lies below that of -inf.
__device__ __forceinline__ int32_t ordered(float x) {
  const int32_t b = Scalar::as_int(x + 0.0f);
  return b ^ ((b >> 31) & 0x7FFFFFFF);
}
__device__ __forceinline__ int64_t ordered(double x) {
  int64_t b;
  x += 0.0;
  memcpy(&b, &x, 8);
  return b ^ ((b >> 63) & 0x7FFFFFFFFFFFFFFF);
}
__device__ __forceinline__ float unordered(int32_t o) { return Scalar::as_float(o ^ ((o >> 31) & 0x7FFFFFFF)); }
__device__ __forceinline__ double unordered(int64_t o) {
  o ^= (o >> 63) & 0x7FFFFFFFFFFFFFFF;
  double x;
  memcpy(&x, &o, 8);
  return x;
}

template <class S>
struct Contender {
  S score;
  int32_t class_id;  // from 0 on, of the slice
};

struct Survivor {
  uint32_t word;
  int32_t contender;
};

// Where things lie, in bytes from the start of a team's part of shared memory or of the workspace.
struct Layout {
  int team, teams;  // threads a row, teams a block
  int parts;        // blocks that collect a row
  int segments;     // warps' shares of a row, each with a list
  int capacity;     // of a list
  int samples;      // searched side by side: 4, 8, 12 or 16
  int held;         // words of a sample that wait for their normals
  int bags_in_shared, lists_in_shared, row_in_shared;
  int reduce_at, prefix_at, counts_at, work_at, bags_at, lists_at, row_at, shared;
  int64_t blocks, workspace_lists, workspace_slot, workspace_headers, workspace;
};

struct Args {
  CudaSearch p;
  Plan plan;
  Layout l;
  int32_t looked_at;
  float inverse_l;
  int32_t planned;
};

template <int TEAM>
struct Team {
  static __device__ __forceinline__ int rank() { return (int)(threadIdx.x % TEAM); }
  static __device__ __forceinline__ int lane() { return (int)(threadIdx.x % 32); }
  static __device__ __forceinline__ int warp() { return (int)(threadIdx.x % TEAM / 32); }
  static __device__ __forceinline__ void sync() {
    if (TEAM == 32)
      __syncwarp();
    else
      __syncthreads();
  }
  // Combines one value of each thread; all get the result. `scratch` holds a value a warp.
  template <class V, class F>
  static __device__ __forceinline__ V reduce(V v, int64_t* scratch, F combine) {
    for (int by = 16; by > 0; by /= 2) v = combine(v, __shfl_xor_sync(kFull, v, by));
    if (TEAM == 32) return v;
    sync();
    if (lane() == 0) scratch[warp()] = (int64_t)v;
    sync();
    v = (V)scratch[0];
    for (int w = 1; w < TEAM / 32; ++w) v = combine(v, (V)scratch[w]);
    return v;
  }
};

template <class V>
struct Sum {
  __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};
template <class V>
struct Most {
  __device__ __forceinline__ V operator()(V a, V b) const { return a > b ? a : b; }
};
template <class V>
struct Least {
  __device__ __forceinline__ V operator()(V a, V b) const { return a < b ? a : b; }
};

// The rank-th largest of keys[0..n), or below it all where fewer than `rank` are above -inf: a bisection by counts,
// with interpolated bounds and every third one halfway.
template <int TEAM, class K>
__device__ K kth_largest(const K* keys, int n, int rank, K none, int64_t* scratch) {
  using Threads = Team<TEAM>;
  K low = none, high = none;
  bool met = false;
  int count = 0;
  for (int i = Threads::rank(); i < n; i += TEAM) {
    const K x = keys[i];
    if (x > none) {
      low = met && low < x ? low : x;
      high = met && high > x ? high : x;
      met = true;
      ++count;
    }
  }
  int reach_low = Threads::reduce(count, scratch, Sum<int>());
  if (reach_low < rank) return none;
  K largest = Threads::reduce(high, scratch, Most<K>());
  low = Threads::reduce(met ? low : largest, scratch, Least<K>());
  uint64_t width = (uint64_t)largest - (uint64_t)low + 1;  // [low, low + width): low reaches, its end does not
  int reach_high = 0;
  for (int step = 0; width > 1 && reach_low > rank; ++step) {
    const float share = ((float)(reach_low - rank) + 0.5f) / (float)(reach_low - reach_high);
    uint64_t ahead = step % 3 == 2 ? width / 2 : (uint64_t)((double)width * share);
    ahead = ahead < 1 ? 1 : ahead > width - 1 ? width - 1 : ahead;
    const K middle = (K)((uint64_t)low + ahead);
    int reach = 0;
    for (int i = Threads::rank(); i < n; i += TEAM) reach += keys[i] >= middle;
    reach = Threads::reduce(reach, scratch, Sum<int>());
    if (reach >= rank)
      low = middle, width -= ahead, reach_low = reach;
    else
      width = ahead, reach_high = reach;
  }
  K found = largest;
  for (int i = Threads::rank(); i < n; i += TEAM)
    if (keys[i] >= low && keys[i] < found) found = keys[i];
  return Threads::reduce(found, scratch, Least<K>());
}

// The rank-th largest maximum of groups 0, stride, ... of classes; -inf where that is +inf.
template <class T, class S, int TEAM>
__device__ S cut_of(const Args& a, const T* row, int64_t class_stride, void* keys_, int64_t* scratch) {
  using K = decltype(ordered(S()));
  K* keys = (K*)keys_;
  const int64_t step = (int64_t)a.plan.group * a.plan.stride;
  for (int q = Team<TEAM>::rank(); q < a.looked_at; q += TEAM) {
    const int64_t first = q * step, end = first + a.plan.group < a.p.n_classes ? first + a.plan.group : a.p.n_classes;
    S top = -infinity<S>();
    for (int64_t c = first; c < end; ++c) {
      const S x = widen(row[c * class_stride]);
      top = x > top ? x : top;
    }
    keys[q] = ordered(top);
  }
  Team<TEAM>::sync();
  const S cut = unordered(kth_largest<TEAM>(keys, a.looked_at, a.plan.rank, ordered(-infinity<S>()), scratch));
  Team<TEAM>::sync();  // the keys' place is used again
  return cut < infinity<S>() ? cut : -infinity<S>();
}

// Bits of the scores of a vector that are above the cut, or NaN.
template <class T, class S>
__device__ __forceinline__ unsigned above(const T (&x)[16 / sizeof(T)], S cut) {
  unsigned hits = 0;
  for (int i = 0; i < (int)(16 / sizeof(T)); ++i) hits |= !(widen(x[i]) <= cut) ? 1u << i : 0u;
  return hits;
}

// Keeps the classes [begin, end) above the cut, with their scores, in this warp's list of `capacity` entries. Returns
// how many there are, -1 where one is NaN. Ballots give each its place: lists are the same in every run.
template <class T, class S, int TEAM>
__device__ int collect(const T* row, int64_t class_stride, int64_t begin, int64_t end, S cut, Contender<S>* list,
                       int capacity) {
  constexpr int W = 16 / sizeof(T);
  const int lane = Team<TEAM>::lane();
  const unsigned before = (1u << lane) - 1;
  int count = 0;
  bool nan = false;
  // Places: class + lead, so that base + a multiple of W is a multiple of 16 bytes.
  const int lead = class_stride == 1 ? (int)((uintptr_t)(row + begin) % 16 / sizeof(T)) : 0;
  const T* base = row + (begin - lead) * class_stride;
  const int64_t n = end - begin + lead;
  for (int64_t start = 0; start < n; start += TEAM * W * kUnroll) {
    T x[kUnroll][W];
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t p = start + (int64_t)(u * TEAM + Team<TEAM>::rank()) * W;
      if (class_stride == 1 && p >= lead && p + W <= n) {
        const uint4 v = *(const uint4*)(base + p);
        memcpy(x[u], &v, 16);
      } else {
        for (int i = 0; i < W; ++i) {
          x[u][i] = T{};
          if (p + i >= lead && p + i < n) x[u][i] = base[(p + i) * class_stride];
        }
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t p = start + (int64_t)(u * TEAM + Team<TEAM>::rank()) * W;
      unsigned hits = above<T, S>(x[u], cut);
      if (hits && (p < lead || p + W > n))  // places beside the row hold anything
        for (int i = 0; i < W; ++i)
          if (p + i < lead || p + i >= n) hits &= ~(1u << i);
      if (!__ballot_sync(kFull, hits != 0)) continue;
      for (int i = 0; i < W; ++i) {
        const bool hit = hits >> i & 1;
        const unsigned mask = __ballot_sync(kFull, hit);
        const int to = count + __popc(mask & before);
        const S score = hit ? (S)widen(x[u][i]) : (S)0;
        nan |= score != score;
        if (hit && to < capacity) list[to] = {score, (int32_t)(begin + p + i - lead)};
        count += __popc(mask);
      }
    }
  }
  return __ballot_sync(kFull, nan) ? -1 : count;
}

// A bound on word >> 8 beyond which score + epsilon * normal(word) is certainly below `reach`.
//
// Q(x) <= phi(x) * 2 / (x + sqrt(x^2 + 8 / pi)) for x >= 0 (Pollak 1956), at an x lowered by more than all roundings of
// the noised score and of `normal` can amount to. What is not certain passes.
__device__ __forceinline__ int32_t word_bound(float score, float reach, float epsilon) {
  if (epsilon == 0.0f) return score < reach ? -1 : 0x7FFFFFFF;
  const float gap = (reach - score) / epsilon;
  const float slack = (fabsf(reach) + fabsf(score)) / epsilon * 4e-7f + fabsf(gap) * 4e-6f + 2e-5f;
  const float x = gap - slack;
  if (!(x > 0.0f)) return 0x7FFFFFFF;  // also where any of them is infinite or NaN
  const float e = x * x * 0.5f;
  if (!(e < 80.0f)) return 2;
  const float f = e * -1.44269504f;
  const int32_t i = (int32_t)(f - 0.5f);
  const float g = (f - (float)i) * 0.69314718f;
  float y = g * 0.0013888889f + 0.0083333338f;
  y = y * g + 0.041666668f;
  y = y * g + 0.16666667f;
  y = y * g + 0.5f;
  y = y * g + 1.0f;
  y = y * g + 1.0f;
  const float exp = Scalar::as_float(Scalar::as_int(y) + (int32_t)((uint32_t)i << 23));
  const float q = exp * 0.79796f / (x + Scalar::root(x * x + 2.5464790894703255f));
  return (int32_t)(q * 16777216.0f + 2.0f);
}
__device__ __forceinline__ int32_t word_bound(double, double, double) { return 0x7FFFFFFF; }  // draws all

// A list of the k best noised scores of a sample, best first, (-inf, -1) where there are fewer; a warp's.
template <class S>
struct Bag {
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

  __device__ bool holds(int32_t c) const {
    bool found = false;
    for (int i = (int)(threadIdx.x % 32); i < k; i += 32) found |= classes[i] == c;
    return __ballot_sync(kFull, found) != 0;
  }

  // Enters (v, c), the same in all lanes and better than the worst.
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

  // Enters whichever of the lanes' candidates are good enough, all of different classes that are not in the list.
  __device__ void enter_lanes(bool valid, S v, int32_t c) const {
    for (;;) {
      const unsigned mask = __ballot_sync(kFull, valid && better(v, c, worst(), worst_class()));
      if (!mask) return;
      const int source = __ffs(mask) - 1;
      enter(__shfl_sync(kFull, v, source), __shfl_sync(kFull, c, source));
      if ((int)(threadIdx.x % 32) == source) valid = false;
    }
  }
};

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

template <class S>
__device__ __forceinline__ Bag<S> bag_of(S* values, int32_t* classes, int sample, int k) {
  return {values + (int64_t)sample * k, classes + (int64_t)sample * k, k};
}

// The contenders' draws for samples [first, first + count): the k best of each into its bag. True where one is NaN.
template <class T, class S, int TEAM>
__device__ bool draw(const Args& a, const Row<T, S>& row, int64_t first, int count, S* bag_values, int32_t* bag_classes,
                     Survivor* survivors, int* counts, int64_t* scratch) {
  using Threads = Team<TEAM>;
  const int rank = Threads::rank(), lane = Threads::lane(), k = (int)a.p.k, held = a.l.held;
  const unsigned before = (1u << lane) - 1;
  const S epsilon = (S)a.p.epsilon;
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
      const int32_t bound = here && c.score > row.cut ? word_bound(c.score, reach, epsilon) : -1;
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
template <class T, class S>
__device__ void walk(const Args& a, const Row<T, S>& row, int64_t sample, const Bag<S>& bag) {
  const int lane = (int)(threadIdx.x % 32);
  const S epsilon = (S)a.p.epsilon;
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
    const int32_t drawn = (int32_t)(((uint64_t)class_word * (uint64_t)a.p.n_classes) >> 32);
    const int32_t class_id = drawn + (int32_t)a.p.first_class;
    const S shift = (S)hazard_quantile<Scalar>(arrival_time(time, a.inverse_l)) * epsilon;
    const S clean = (S)widen(row.scores[drawn * row.class_stride]);
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

// Whether fewer scores of the row than `wanted` are above -inf.
template <class T, class S, int TEAM>
__device__ bool finite_are_fewer(const T* row, int64_t class_stride, int64_t n, int64_t wanted, int64_t* scratch) {
  int64_t finite = 0;
  for (int64_t start = 0; start < n && finite < wanted; start += 64 * TEAM) {
    int64_t here = 0;
    for (int64_t c = start + Team<TEAM>::rank(); c < n && c < start + 64 * TEAM; c += TEAM)
      here += (S)widen(row[c * class_stride]) > -infinity<S>();
    finite += Team<TEAM>::reduce(here, scratch, Sum<int64_t>());
  }
  return finite < wanted;
}

// The lists of one part of a row, [rows * parts] blocks: for few rows, long ones, and many processors.
template <class T, class S>
__global__ void __launch_bounds__(kBlock) collect_kernel(const Args a) {
  TOPK_FAST_SHARED(shared);
  using Threads = Team<kBlock>;
  const int64_t n = blockIdx.x / a.l.parts, part = blockIdx.x % a.l.parts;
  const T* row = (const T*)a.p.scores + n * a.p.row_stride;
  const S cut =
      cut_of<T, S, kBlock>(a, row, a.p.class_stride, shared + a.l.work_at, (int64_t*)(shared + a.l.reduce_at));
  char* header = (char*)a.p.workspace + n * a.l.workspace_headers;
  Contender<S>* lists = (Contender<S>*)((char*)a.p.workspace + a.p.n_rows * a.l.workspace_headers +
                                        n * a.l.workspace_slot + a.l.workspace_lists);
  const int64_t share = (a.p.n_classes + a.l.parts - 1) / a.l.parts, begin = part * share;
  const int64_t end = begin + share < a.p.n_classes ? begin + share : a.p.n_classes;
  const int segment = (int)part * (kBlock / 32) + Threads::warp();
  const int count = begin < end ? collect<T, S, kBlock>(row, a.p.class_stride, begin, end, cut,
                                                        lists + (int64_t)segment * a.l.capacity, a.l.capacity)
                                : 0;
  if (Threads::lane() == 0) ((int32_t*)(header + 16))[segment] = count;
  if (part == 0 && Threads::rank() == 0) *(S*)header = cut;
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

// A block fills its share of the flat output with zeros, 16 bytes a store, then writes the entries that fall into it.
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

int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// The one table of launch shapes, by (N, L, dtype, k, n_sample).
Args arguments(const CudaSearch& p) {
  Args a{};
  a.p = p;
  a.plan = plan(p.n_classes, p.k);
  a.planned = !(p.dense || a.plan.all);
  a.inverse_l = 1.0f / (float)p.n_classes;
  const int64_t groups = (p.n_classes + a.plan.group - 1) / a.plan.group;
  a.looked_at = a.planned ? (int32_t)((groups + a.plan.stride - 1) / a.plan.stride) : 0;
  const int item = p.dtype == kFloat32 ? 4 : p.dtype == kFloat64 ? 8 : 2, wide = p.dtype == kFloat64 ? 8 : 4;
  const int contender = 2 * wide;
  Layout& l = a.l;
  l.team = p.n_classes <= 2048 ? 32 : kBlock;
  l.teams = kBlock / l.team;
  l.parts = 1;
  if (a.planned && l.team == kBlock)
    while (l.parts < kMaxParts && p.n_rows * l.parts < 8 * (int64_t)p.n_processors && p.n_classes >= 65536 * l.parts)
      l.parts *= 2;
  l.segments = l.parts * (l.team / 32);
  const int64_t per_warp = 4 * a.plan.contenders / l.segments;
  l.capacity = a.planned ? (int)(per_warp > 64 ? per_warp : 64) : 1;
  l.samples = p.n_sample >= 16 ? 16 : (int)(p.n_sample + 3) / 4 * 4;
  l.held = l.team + (l.team < 64 ? 32 : 64);
  int at = 0;
  const auto place = [&at](int64_t bytes) {
    const int start = at;
    at += (int)aligned(bytes);
    return start;
  };
  l.reduce_at = place(kBlock / 32 * 8);
  l.prefix_at = place((l.segments + 1) * 4);
  l.counts_at = place(16 * 4);
  const int64_t survivors = (int64_t)l.samples * l.held * sizeof(Survivor),
                keys = a.planned ? (int64_t)kGroups * wide : 0;
  l.work_at = place(survivors > keys ? survivors : keys);
  const int64_t budget = kSharedBudget / l.teams;
  const int64_t bags = (int64_t)l.samples * p.k * (wide + 4), lists = (int64_t)l.segments * l.capacity * contender;
  l.bags_in_shared = at + aligned(bags) <= budget;
  l.bags_at = l.bags_in_shared ? place(bags) : 0;
  l.lists_in_shared = l.parts == 1 && at + aligned(lists) <= budget;
  l.lists_at = l.lists_in_shared ? place(lists) : 0;
  const int64_t row = (int64_t)p.n_classes * item + 16;
  l.row_in_shared = l.parts == 1 && row <= 16384 / l.teams && at + aligned(row) <= budget;
  l.row_at = l.row_in_shared ? place(row) : 0;
  l.shared = at;
  const int64_t most = 16 * (int64_t)p.n_processors * l.teams;  // teams at work at a time
  const int64_t slots = p.n_rows < 1 ? 1 : l.parts > 1 || p.n_rows < most ? p.n_rows : most;
  l.blocks = (slots + l.teams - 1) / l.teams;
  l.workspace_lists = l.bags_in_shared ? 0 : aligned(bags);
  l.workspace_slot = l.workspace_lists + (l.lists_in_shared ? 0 : aligned(lists));
  l.workspace_headers = l.parts > 1 ? aligned(16 + l.segments * 4) : 0;
  l.workspace = p.n_rows * l.workspace_headers + l.blocks * l.teams * l.workspace_slot;
  return a;
}

template <class T, class S>
void launch_search(const Args& a, cudaStream_t stream) {
  const unsigned shared = (unsigned)(a.l.shared * a.l.teams);
  if (a.l.parts > 1) {
    const auto kernel = collect_kernel<T, S>;
    TOPK_FAST_LAUNCH(kernel, (unsigned)(a.p.n_rows * a.l.parts), kBlock, shared, stream, a);
  }
  const auto kernel = a.l.team == 32 ? search_kernel<T, S, 32> : search_kernel<T, S, kBlock>;
  TOPK_FAST_LAUNCH(kernel, (unsigned)a.l.blocks, kBlock, shared, stream, a);
}

template <class T, class S>
void launch_gradient(const CudaGradient& g, cudaStream_t stream) {
  const int64_t share = kGradientBytes / sizeof(T);
  const auto kernel = gradient_kernel<T, S>;
  TOPK_FAST_LAUNCH(kernel, (unsigned)((g.n_rows * g.n_classes + share - 1) / share), kBlock, 0, stream, g);
}

int last_error() {
#ifdef __CUDACC__
  return (int)cudaGetLastError();
#else
  return 0;
#endif
}

}  // namespace
}  // namespace topk_fast

using namespace topk_fast;

#ifdef __CUDACC__
extern "C" int topk_cuda_processors(int device) {
  int n = 0;
  return cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && n > 0 ? n : 1;
}
#endif

extern "C" int64_t topk_cuda_workspace(const CudaSearch* search) { return arguments(*search).l.workspace; }

extern "C" int topk_cuda_search(const CudaSearch* search, void* stream_) {
  const Args a = arguments(*search);
  const cudaStream_t stream = (cudaStream_t)stream_;
  switch (search->dtype) {
    case kFloat32: launch_search<float, float>(a, stream); break;
    case kFloat64: launch_search<double, double>(a, stream); break;
    case kBFloat16: launch_search<BFloat16, float>(a, stream); break;
    case kFloat16: launch_search<Half, float>(a, stream); break;
  }
  return last_error();
}

extern "C" int topk_cuda_gradient(const CudaGradient* gradient, void* stream_) {
  const cudaStream_t stream = (cudaStream_t)stream_;
  switch (gradient->dtype) {
    case kFloat32: launch_gradient<float, float>(*gradient, stream); break;
    case kFloat64: launch_gradient<double, double>(*gradient, stream); break;
    case kBFloat16: launch_gradient<BFloat16, float>(*gradient, stream); break;
    case kFloat16: launch_gradient<Half, float>(*gradient, stream); break;
  }
  return last_error();
}
