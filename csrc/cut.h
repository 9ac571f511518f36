// What the cut is made of: maxima of groups of scores, and the rank-th largest of them.
#pragma once

#include "simd.h"

namespace topk_fast {
namespace TOPK_FAST_ISA {

constexpr int kMaxima = 1024;  // `plan` looks at fewer groups than this

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(BFloat16 x) { return widen_bfloat16(x.bits); }
static inline float widen(Half x) { return widen_half(x.bits); }

// Totally ordered integer keys of floats, for the last steps of a bisection.
static inline float key_middle(float lo, float hi) {
  const auto key = [](float x) {
    const uint32_t b = (uint32_t)Scalar::as_int(x);
    return (int64_t)(int32_t)(b & 0x80000000u ? 0x80000000u - b : b);
  };
  const int64_t mid = key(lo) + (key(hi) - key(lo)) / 2;
  return Scalar::as_float((int32_t)(mid < 0 ? 0x80000000u - (uint32_t)mid : (uint32_t)mid));
}
static inline double key_middle(double lo, double hi) {
  const auto key = [](double x) {
    int64_t b;
    memcpy(&b, &x, 8);
    return b < 0 ? (int64_t)(0x8000000000000000ull - (uint64_t)b) : b;
  };
  const int64_t a = key(lo), b = key(hi), mid = (a & b) + ((a ^ b) >> 1);
  const uint64_t bits = mid < 0 ? 0x8000000000000000ull - (uint64_t)mid : (uint64_t)mid;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

// The rank-th largest of x[0..n), n a multiple of kLanes padded with -inf; no NaN, 1 <= rank <= n.
// Counts how many reach a bound and closes in on it; a count is n / 16 vector steps without a branch. Bounds are
// `guess` first, then interpolated, every third one halfway.
template <class S>
static S rank_select(const S* x, int n, int rank, S guess) {
  using V = Vector<S>;
  const S inf = (S)__builtin_inf();
  const auto count = [&](S bound) {
    typename V::mask c = {};
    for (int i = 0; i < n; i += V::n) c += V::load(x + i) >= bound;
    return V::count(c);
  };
  const auto least_from = [&](S bound) {
    typename V::type least = V::all(inf);
    for (int i = 0; i < n; i += V::n) {
      const typename V::type v = V::load(x + i);
      least = V::smaller(v >= bound ? v : V::all(inf), least);
    }
    return -V::largest(-least);
  };
  typename V::type top = V::all(-inf), bottom = V::all(inf);
  typename V::mask finite = {};
  for (int i = 0; i < n; i += V::n) {
    const typename V::type v = V::load(x + i);
    top = V::larger(v, top);
    bottom = V::smaller(v > -inf ? v : V::all(inf), bottom);
    finite += v > -inf;
  }
  S lo = -V::largest(-bottom), hi = V::largest(top);
  int reach_lo = V::count(finite), reach_hi = 0;  // hi itself is known to be an upper end, not how many reach it
  if (reach_lo < rank) return -inf;
  if (lo == hi) return hi;
  if (hi == inf) {
    if (count(inf) >= rank) return inf;
    hi = sizeof(S) == 4 ? (S)3.40282347e+38 : (S)1.7976931348623157e+308;
  }
  // From here on reach_lo >= rank, and reach_hi < rank or hi is the answer. Halves of floats shrink a range of many
  // magnitudes slowly: after 16 bounds those of the floats' ordered bits take over, at most 64 of them.
  for (int step = 0;; ++step) {
    S bound = guess;
    if (step > 0) bound = lo + (hi - lo) * (((S)(reach_lo - rank) + (S)0.5) / (S)(reach_lo - reach_hi));
    if (step % 3 == 2 || !(bound > lo && bound < hi)) bound = lo * (S)0.5 + hi * (S)0.5;
    if (step >= 16 || !(bound > lo && bound < hi)) bound = key_middle(lo, hi);
    if (!(bound > lo && bound < hi)) return count(hi) >= rank ? hi : lo;
    const int reach = count(bound);
    if (reach == rank) return least_from(bound);
    if (reach < rank) {
      hi = bound, reach_hi = reach;
      continue;
    }
    lo = bound, reach_lo = reach;
    if (step >= 8) {  // many equal values: step from one of them to the next
      lo = least_from(bound);
      typename V::mask above = {};
      for (int i = 0; i < n; i += V::n) above += V::load(x + i) > lo;
      if (V::count(above) < rank) return lo;
    }
  }
}

// The rank-th largest of x[0..n) as above, found at once where it lies within `around` of `guess`.
template <class S>
static S rank_near(const S* x, int n, int rank, S guess, S around) {
  using V = Vector<S>;
  constexpr int kFew = 96;
  alignas(64) S near[kMaxima + 2 * kLanes];
  int above = 0, m = 0;
  for (int i = 0; i < n; i += kLanes) {
    const uint32_t high = hits_at_least(x + i, guess + around);
    above += __builtin_popcount(high);
    m += append(x + i, hits_at_least(x + i, guess - around) & ~high, near + m);
  }
  rank -= above;
  if (rank < 1 || m < rank || m > kFew) return rank_select(x, n, rank + above, guess);
  const S inf = (S)__builtin_inf();
  for (int i = 0; i < kLanes; ++i) near[m + i] = -inf;
  S found = -inf;
  for (int i = 0; i < m; i += V::n) {
    const typename V::type v = V::load(near + i);
    typename V::mask reach = {};
    for (int j = 0; j < m; ++j) reach -= near[j] >= v;
    const S here = V::largest(reach >= (typename V::lane)rank ? v : V::all(-inf));
    found = here > found ? here : found;
  }
  return found;
}

static inline Vector<float>::type load(const float* x) { return Vector<float>::load(x); }
static inline Vector<double>::type load(const double* x) { return Vector<double>::load(x); }
template <class T>
static inline Vector<float>::type load(const T* x) {
  using V = Vector<float>;
  float wide[V::n];
  for (int i = 0; i < V::n; ++i) wide[i] = widen(x[i]);
  return V::load(wide);
}

// Maxima of kCount groups of G classes whose starts lie `step` apart, each spread over V::n / kCount lanes. Groups
// shorter than a vector must be consecutive.
template <int G, int kCount, class T>
static inline typename Vector<typename Arithmetic<T>::type>::type group_vector(const T* x, int64_t step) {
  using V = Vector<typename Arithmetic<T>::type>;
  if constexpr (kCount * G == V::n) {
    return load(x);
  } else if constexpr (kCount == 1) {
    return V::larger(group_vector<G / 2, 1>(x, step), group_vector<G / 2, 1>(x + G / 2, step));
  } else {
    const int64_t half = kCount / 2;
    return V::pair_maxima(group_vector<G, kCount / 2>(x, step), group_vector<G, kCount / 2>(x + half * step, step));
  }
}

template <class T, class S>
static S maximum(const T* x, int64_t n) {
  using V = Vector<S>;
  S m = -(S)__builtin_inf();
  int64_t i = 0;
  if (n >= V::n) {
    typename V::type v = load(x);
    for (i = V::n; i + V::n <= n; i += V::n) v = V::larger(v, load(x + i));
    m = V::largest(v);
  }
  for (; i < n; ++i) m = widen(x[i]) > m ? widen(x[i]) : m;
  return m;
}

// out[i] = maximum of the i-th group looked at. A NaN may spoil one: its row ends as NaN whatever the cut.
template <int G, class T, class S>
static void group_maxima(const T* row, int64_t n_classes, int64_t stride, S* out, int n) {
  using V = Vector<S>;
  int i = 0;
  if (G < V::n && stride > 1) {  // all groups, many at a time; then those looked at
    for (int64_t group = 0; (group + V::n) * G <= n_classes; group += V::n) {
      S all[V::n];
      const typename V::type v = group_vector<G, V::n>(row + group * G, G);
      memcpy(all, &v, sizeof all);
      for (; i * stride < group + V::n; ++i) out[i] = all[i * stride - group];
    }
  } else {
    for (const int64_t step = stride * G; (i + V::n - 1) * step + G <= n_classes; i += V::n) {
      for (int j = 0; step > G && j < V::n; ++j)
        __builtin_prefetch(row + (i + V::n + j) * step), __builtin_prefetch(row + (i + V::n + j) * step + G - 1);
      const typename V::type v = group_vector<G, V::n>(row + i * step, step);
      memcpy(out + i, &v, sizeof v);
    }
  }
  for (; i < n; ++i) {
    const int64_t start = i * stride * G;
    out[i] = maximum<T, S>(row + start, n_classes - start < G ? n_classes - start : G);
  }
}

}  // namespace TOPK_FAST_ISA
}  // namespace topk_fast
