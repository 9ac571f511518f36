// What cannot matter: bounds on words and on arrivals beyond which no noised score reaches a known value.
//
// Host and device code like noise.h. They move cost and never results: what is not certain passes. float64 searches
// use them on values rounded to float32, which the slack of `certain_below` covers.
#pragma once

#include "noise.h"

namespace topk_fast {

// epsilon as the bounds take it: a positive one stays so, and may only grow.
TOPK_FAST_FN float bound_epsilon(double epsilon) {
  return epsilon > 0 && epsilon < 1.17549435e-38 ? 1.17549435e-38f : (float)epsilon;
}

template <class O>
TOPK_FAST_FN typename O::F magnitude(typename O::F x) {
  return O::as_float(O::as_int(x) & 0x7fffffff);
}

// An x such that score + epsilon * z is below `reach` for every draw z < x: (reach - score) / epsilon, lowered by more
// than the roundings of the noised score and of z amount to. -inf or NaN where there is none.
template <class O>
TOPK_FAST_FN typename O::F certain_below(typename O::F score, typename O::F reach, float epsilon) {
  const auto x = ((reach - score) - (magnitude<O>(reach) + magnitude<O>(score)) * 4e-7f) / epsilon;
  return x - (magnitude<O>(x) * 4e-6f + 2e-5f);
}

// A q >= 1 - Phi(x) for x >= 0: phi(x) * 2 / (x + sqrt(x^2 + 8 / pi)), Pollak 1956, up to a sixteenth too large.
// It is clamped at 7.5, beyond which the error of noise.h's quantiles exceeds the slack of `certain_below`.
template <class O>
TOPK_FAST_FN typename O::F upper_tail(typename O::F x) {
  x = x < 7.5f ? x : O::floats(7.5f);
  return exp_minus<O>(x * x * 0.5f) * 0.79796f / (x + O::root(x * x + 2.5464790894703255f));
}

// -ln F(x) for Gumbel's law less its mean, exp(-(x + Euler's constant)), which bounds 1 - F(x) from above; a 10000th
// covers the error of `exp_minus`. It is infinite for x <= 0, where a larger epsilon would not be on the safe side.
template <class O>
TOPK_FAST_FN typename O::F gumbel_hazard(typename O::F x) {
  const auto q = exp_minus<O>((x > 0.0f ? x : O::floats(0.0f)) + 0.5772156f) * 1.0001f;
  return x > 0.0f ? q : O::floats(__builtin_inff());
}

// A bound on word >> 8 beyond which score + epsilon * draw(word) is below `reach`.
template <class L, class O>
TOPK_FAST_FN typename O::I word_bound(typename O::F score, typename O::F reach, float epsilon) {
  if (epsilon == 0.0f) return score < reach ? O::ints(-1) : O::ints(0x7fffffff);
  const auto x = certain_below<O>(score, reach, epsilon);
  typename O::F q;
  if constexpr (L::kLaw == Law::kGumbel)
    q = gumbel_hazard<O>(x);
  else
    q = upper_tail<O>(x > 0.0f ? x : O::floats(0.0f));
  const auto bound = O::truncate((x > 0.0f ? q : O::floats(0.0f)) * 16777216.0f + 2.0f);
  return x > 0.0f ? bound : O::ints(0x7fffffff);
}

// A bound on an arrival's time beyond which cut + epsilon * level is below `reach`; infinite where there is none.
// For the normal law -ln(1 - q) <= q + q^2 for q <= 1/2.
template <class L, class O>
TOPK_FAST_FN typename O::F time_bound(typename O::F cut, typename O::F reach, float epsilon) {
  if (epsilon == 0.0f) return cut < reach ? O::floats(0.0f) : O::floats(__builtin_inff());
  const auto x = certain_below<O>(cut, reach, epsilon);
  if constexpr (L::kLaw == Law::kGumbel) {
    return gumbel_hazard<O>(x);
  } else {
    const auto q = upper_tail<O>(x > 0.0f ? x : O::floats(0.0f));
    return x > 0.0f ? (q + q * q) * 1.00001f : O::floats(__builtin_inff());
  }
}

}  // namespace topk_fast
