// Runs the CPU search on random requests over arrays of exact size; test_sanitizers.py builds it with the address and
// undefined-behaviour sanitizers. Values are held to the reference elsewhere: here only memory is.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "topk_cpu.h"

using namespace topk_fast;

namespace {

std::mt19937 engine(5);
int between(int low, int high) { return low + (int)(engine() % (unsigned)(high - low + 1)); }

enum Kind { kNormal, kFlat, kTies, kMasked, kNan, kInfinite };

float score(int kind) {
  static std::normal_distribution<float> normal;
  const float z = normal(engine);
  switch (kind) {
    case kFlat: return 0;
    case kTies: return std::round(z * 2) / 2;
    case kMasked: return between(0, 99) ? -INFINITY : z;
    case kNan: return between(0, 499) ? z : NAN;
    case kInfinite: return between(0, 49) ? z : INFINITY;
    default: return z;
  }
}

void fill(char* x, size_t n, Dtype dtype, int kind) {
  for (size_t i = 0; i < n; ++i) {
    const float v = score(kind);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (dtype == Dtype::kFloat)
      ((float*)x)[i] = v;
    else if (dtype == Dtype::kDouble)
      ((double*)x)[i] = v;
    else
      ((uint16_t*)x)[i] = (uint16_t)(bits >> 16);  // any 16 bits are a half, too
  }
}

}  // namespace

int main() {
  std::vector<SearchFn> searches = {baseline::search};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) searches.push_back(avx2::search);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) searches.push_back(avx512::search);
#endif
  const int lengths[] = {1, 2, 5, 15, 16, 17, 31, 63, 64, 65, 100, 129, 255, 257, 1000, 1023, 2049, 5000, 20011, 70001};
  for (int round = 0; round < 1500; ++round) {
    Search p{};
    p.n_classes = p.row_stride = lengths[between(0, 19)], p.n_rows = between(1, p.n_classes < 300 ? 70 : 3);
    p.n_sample = between(1, p.n_classes > 5000 ? 5 : 33);
    p.k = between(1, round % 7 ? 21 : 130);
    p.dtype = (Dtype)between(0, 3);
    p.seed = engine(), p.first_row = between(0, 9), p.first_class = between(0, 1000);
    p.epsilon = between(0, 4) * 0.5, p.dense = between(0, 3) == 0, p.keep_all = between(0, 1);
    const int64_t quads = (p.n_sample + 3) / 4;
    p.samples_per_split = (quads + 1) / between(1, 2) * 4;
    p.samples_per_split = p.samples_per_split ? p.samples_per_split : 4;
    p.n_split = (p.n_sample + p.samples_per_split - 1) / p.samples_per_split;

    const size_t n_scores = (size_t)(p.n_rows * p.n_classes), size = p.dtype == Dtype::kDouble ? 8 : 4;
    const size_t n_out = (size_t)(p.n_rows * p.n_sample * (p.keep_all ? p.k : 1));
    const std::unique_ptr<char[]> scores(new char[n_scores * (p.dtype < Dtype::kBFloat16 ? size : 2)]);
    const std::unique_ptr<char[]> values(new char[n_out * size]);
    const std::unique_ptr<int64_t[]> classes(new int64_t[n_out]), workspace(new int64_t[workspace_words(p)]);
    fill(scores.get(), n_scores, p.dtype, between(kNormal, kInfinite));
    p.scores = scores.get(), p.values = values.get(), p.classes = classes.get();
    searches[(size_t)round % searches.size()](p, 0, p.n_rows * p.n_split, workspace.get());
    for (size_t i = 0; i < n_out; ++i)
      if (classes[i] < -1 || classes[i] >= p.first_class + p.n_classes) return std::puts("class out of range"), 1;
  }
  std::puts("ok");
}
