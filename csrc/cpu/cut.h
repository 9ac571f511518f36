// The cut of a row on CPU: the rank-th largest of the maxima of the groups that the plan looks at.
//
// Rule: topk_fast/reference.py's `cut_of`. Maxima and counts are taken on vectors of the scores as they are; CUDA's
// kth_largest works on the integer keys of order.h, which would have to be made of every score first.
#pragma once

#include "../order.h"
#include "../scalar.h"
#include "simd.h"

namespace topk_fast {
namespace TOPK_FAST_ISA {

constexpr int kMaxima = 1024;  // `plan` looks at fewer groups than this

// Halfway between two floats in their order as bits.
template <class S>
static inline S middle(S lo, S hi) {
  const auto a = ordered(lo), b = ordered(hi);
  return unordered((a & b) + ((a ^ b) >> 1));
}

// The rank-th largest of x[0..n), n a multiple of kLanes padded with -inf; no NaN, 1 <= rank <= n.
// Counts how many reach a bound and closes in on it; a count is n / 16 vector steps without a branch. Bounds are
// `guess` first, then interpolated, every third one halfway.
template <class S>
static S kth_largest(const S* x, int n, int rank, S guess) {
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
    if (step >= 16 || !(bound > lo && bound < hi)) bound = middle(lo, hi);
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
static S kth_largest_near(const S* x, int n, int rank, S guess, S around) {
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
  if (rank < 1 || m < rank || m > kFew) return kth_largest(x, n, rank + above, guess);
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
    // The lanes of every stride-th group, from the first one on.
    uint32_t every = 0;
    for (int64_t j = 0; j < kLanes; j += stride) every |= 1u << j;
    for (int64_t group = 0; (group + kLanes) * G <= n_classes; group += kLanes) {
      if (i * stride >= group + kLanes) continue;
      alignas(64) S all[kLanes];
      for (int j = 0; j < kLanes; j += V::n) store(group_vector<G, V::n>(row + (group + j) * G, G), all + j);
      i += append(all, every << (i * stride - group) & 0xffff, out + i);
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

// A value's average over the rows so far, and how far it strays: for guesses, which move cost and never results.
template <class S>
struct Usual {
  S mean = 0, spread = (S)__builtin_inf();
  void learn(S x, S first_spread) {
    const S off = x - mean, size = off < 0 ? -off : off;
    const bool first = !(spread < (S)__builtin_inf());
    mean = first ? x : mean + off * (S)0.125;
    spread = first ? first_spread : spread + (size - spread) * (S)0.125;
  }
};

// The cut of a row; -inf where every class is a contender.
template <class T, class S>
static S cut_of(const Search& p, const T* scores, Usual<S>& usual) {
  const S inf = (S)__builtin_inf();
  const Plan plan_ = plan(p.n_classes, p.k, p.law);
  if (p.dense || plan_.all) return -inf;
  alignas(64) S maxima[kMaxima + kLanes];
  const int64_t groups = (p.n_classes + plan_.group - 1) / plan_.group;
  const int n = (int)((groups + plan_.stride - 1) / plan_.stride), padded = round_up(n, kLanes);
  switch (plan_.group) {
    case 1: group_maxima<1>(scores, p.n_classes, plan_.stride, maxima, n); break;
    case 2: group_maxima<2>(scores, p.n_classes, plan_.stride, maxima, n); break;
    case 4: group_maxima<4>(scores, p.n_classes, plan_.stride, maxima, n); break;
    case 8: group_maxima<8>(scores, p.n_classes, plan_.stride, maxima, n); break;
    case 16: group_maxima<16>(scores, p.n_classes, plan_.stride, maxima, n); break;
    default: group_maxima<32>(scores, p.n_classes, plan_.stride, maxima, n);
  }
  for (int i = n; i < padded; ++i) maxima[i] = -inf;
  S cut = kth_largest_near(maxima, padded, plan_.rank, usual.mean, 3 * usual.spread);
  if (cut == inf) cut = -inf;
  if (cut > -inf) usual.learn(cut, (cut < 0 ? -cut : cut) * (S)0.0625);
  return cut;
}

}  // namespace TOPK_FAST_ISA
}  // namespace topk_fast
