// Prints a checksum of each function of the noise contract over many words; test_compilers.py compares compilers'.
#include <cstdio>
#include <cstring>
#include <vector>

#include "checksum.h"
#include "noise.h"

extern "C" {
void topk_fast_philox(const uint32_t*, uint32_t*);
void topk_fast_normal(const uint32_t*, int64_t, float*);
void topk_fast_gumbel(const uint32_t*, int64_t, float*);
void topk_fast_gap(const uint32_t*, int64_t, int32_t*);
void topk_fast_ln(const float*, int64_t, float*);
void topk_fast_upper_quantile(const float*, int64_t, float*);
void topk_fast_hazard_quantile(const float*, int64_t, float*);
void topk_fast_gumbel_level(const float*, int64_t, float*);
void topk_fast_word_bound(const float*, int64_t, int32_t*, float, double, int32_t);
void topk_fast_time_bound(const float*, int64_t, float*, float, double, int32_t);
void topk_fast_plan(int64_t, int64_t, int32_t, int64_t*);
void topk_fast_widen_half(const uint16_t*, int64_t, float*);
void topk_fast_round_to_half(const float*, int64_t, uint16_t*);
}

namespace {

const int64_t kCount = 1 << 18;

template <class In, class Out, class F, class... More>
void show(const char* name, const std::vector<In>& x, std::vector<Out> out, F function, More... more) {
  out.resize(x.size());
  function(x.data(), (int64_t)x.size(), out.data(), more...);
  Checksum sum;
  for (Out value : out) sum.add(value);
  std::printf("%s %016llx\n", name, sum.value);
}

}  // namespace

int main() {
  std::vector<uint32_t> words(kCount);
  for (int64_t i = 0; i < kCount; i += 4) {
    const uint32_t call[6] = {(uint32_t)i, 3, 5, 0, 7, 11};
    topk_fast_philox(call, &words[i]);
  }
  for (uint32_t i = 0; i < 1000; ++i) words[i] = i, words[1000 + i] = ~i, words[2000 + i] = 0x7fffff00u + i;  // tails
  std::vector<float> normals(kCount), shares(kCount), times(kCount), any(kCount);
  std::vector<uint16_t> halves(1 << 16);
  for (int64_t i = 0; i < kCount; ++i) {
    shares[i] = ((float)(int32_t)(words[i] >> 1) + 0.5f) * 2.3283064365386963e-10f;  // (0, 1/2]
    times[i] = shares[i] * (float)(1 << i % 40 / 2);
    std::memcpy(&any[i], &words[i], 4);
  }
  for (uint32_t i = 0; i < 1 << 16; ++i) halves[i] = (uint16_t)i;
  Checksum sum;
  for (uint32_t word : words) sum.add(word);
  std::printf("philox %016llx\n", sum.value);
  topk_fast_normal(words.data(), kCount, normals.data());
  const std::vector<float> floats;
  show("normal", words, floats, topk_fast_normal);
  show("gumbel", words, floats, topk_fast_gumbel);
  show("gap", words, std::vector<int32_t>(), topk_fast_gap);
  show("ln", times, floats, topk_fast_ln);
  show("upper_quantile", shares, floats, topk_fast_upper_quantile);
  show("hazard_quantile", times, floats, topk_fast_hazard_quantile);
  show("gumbel_level", times, floats, topk_fast_gumbel_level);
  show("widen_half", halves, floats, topk_fast_widen_half);
  show("round_to_half", any, std::vector<uint16_t>(), topk_fast_round_to_half);
  for (int32_t law = 0; law < 2; ++law) {
    show("word_bound", normals, std::vector<int32_t>(), topk_fast_word_bound, 1.5f, 0.7, law);
    show("time_bound", normals, floats, topk_fast_time_bound, 1.5f, 0.7, law);
    Checksum plans;
    for (int64_t n = 1; n < 3000000; n += 1 + n / 7)
      for (int64_t k = 1; k < 200; k += 9) {
        int64_t plan[4];
        topk_fast_plan(n, k, law, plan);
        for (int64_t number : plan) plans.add(number);
      }
    std::printf("plan %016llx\n", plans.value);
  }
}
