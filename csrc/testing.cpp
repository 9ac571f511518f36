// The contract's functions (noise.h) and the bounds (bounds.h) over arrays, for the tests: C functions of the binary
// _C, called through ctypes (tests/testing.py), so that what is tested is what is installed.
#include "bounds.h"
#include "scalar.h"

using namespace topk_fast;

#define TOPK_FAST_HOOK extern "C" __attribute__((visibility("default"))) void

namespace {

template <class In, class Out, class F>
void map(const In* x, int64_t n, Out* out, F f) {
  for (int64_t i = 0; i < n; ++i) out[i] = f(x[i]);
}

}  // namespace

TOPK_FAST_HOOK topk_fast_philox(const uint32_t* counter_and_key, uint32_t* out) {
  const uint32_t* c = counter_and_key;
  const Words w = philox(c[0], c[1], c[2], c[3], c[4], c[5]);
  out[0] = w.w0, out[1] = w.w1, out[2] = w.w2, out[3] = w.w3;
}

TOPK_FAST_HOOK topk_fast_normal(const uint32_t* words, int64_t n, float* out) {
  map(words, n, out, [](uint32_t w) { return normal<Scalar>((int32_t)w); });
}

TOPK_FAST_HOOK topk_fast_gumbel(const uint32_t* words, int64_t n, float* out) {
  map(words, n, out, [](uint32_t w) { return gumbel<Scalar>((int32_t)w); });
}

TOPK_FAST_HOOK topk_fast_gumbel_level(const float* e, int64_t n, float* out) {
  map(e, n, out, [](float v) { return gumbel_level<Scalar>(v); });
}

TOPK_FAST_HOOK topk_fast_gap(const uint32_t* words, int64_t n, int32_t* out) {
  map(words, n, out, [](uint32_t w) { return gap<Scalar>((int32_t)w); });
}

TOPK_FAST_HOOK topk_fast_ln(const float* x, int64_t n, float* out) {
  map(x, n, out, [](float v) { return ln<Scalar>(v); });
}

TOPK_FAST_HOOK topk_fast_upper_quantile(const float* p, int64_t n, float* out) {
  map(p, n, out, [](float v) { return upper_quantile<Scalar>(v); });
}

TOPK_FAST_HOOK topk_fast_hazard_quantile(const float* e, int64_t n, float* out) {
  map(e, n, out, [](float v) { return hazard_quantile<Scalar>(v); });
}

TOPK_FAST_HOOK topk_fast_word_bound(const float* scores, int64_t n, int32_t* out, float reach, double epsilon,
                                    int32_t law) {
  const float e = bound_epsilon(epsilon);
  map(scores, n, out, [=](float s) {
    return (Law)law == Law::kGumbel ? word_bound<GumbelLaw, Scalar>(s, reach, e)
                                    : word_bound<NormalLaw, Scalar>(s, reach, e);
  });
}

TOPK_FAST_HOOK topk_fast_time_bound(const float* cuts, int64_t n, float* out, float reach, double epsilon,
                                    int32_t law) {
  const float e = bound_epsilon(epsilon);
  map(cuts, n, out, [=](float c) {
    return (Law)law == Law::kGumbel ? time_bound<GumbelLaw, Scalar>(c, reach, e)
                                    : time_bound<NormalLaw, Scalar>(c, reach, e);
  });
}

// out: whether every class gets a draw of its own, then group, stride and rank.
TOPK_FAST_HOOK topk_fast_plan(int64_t n_classes, int64_t k, int32_t law, int64_t* out) {
  const Plan p = plan(n_classes, k, (Law)law);
  out[0] = p.all, out[1] = p.group, out[2] = p.stride, out[3] = p.rank;
}

TOPK_FAST_HOOK topk_fast_widen_half(const uint16_t* bits, int64_t n, float* out) {
  map(bits, n, out, [](uint16_t b) { return widen(Half{b}); });
}

TOPK_FAST_HOOK topk_fast_round_to_half(const float* x, int64_t n, uint16_t* out) {
  map(x, n, out, [](float v) {
    Half h;
    round_to(v, &h);
    return h.bits;
  });
}
