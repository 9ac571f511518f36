// Runs the CPU search and gradient on random requests over arrays of exact size, as many as the argument says, and
// prints a checksum of the results after each 300. test_compilers.py builds it with the address and undefined-behaviour
// sanitizers, and compares the checksums of compilers. Other tests compare values with the reference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "checksum.h"
#include "cpu/gradient.h"
#include "cpu/kernel.h"

using namespace topk_fast;

namespace {

std::mt19937 engine(5);
int between(int low, int high) { return low + (int)(engine() % (unsigned)(high - low + 1)); }

enum Kind { kNormal, kFlat, kTies, kMasked, kNan, kInfinite };

float score(int kind) {
  const float z = normal<Scalar>((int32_t)engine());  // the same on every machine, as no library's is
  switch (kind) {
    case kFlat: return 0;
    case kTies: return std::round(z * 2) / 2;
    case kMasked: return between(0, 99) ? -INFINITY : z;
    case kNan: return between(0, 499) ? z : NAN;
    case kInfinite: return between(0, 49) ? z : INFINITY;
    default: return z;
  }
}

void fill(char* x, size_t n, ScoreType type, int kind) {
  for (size_t i = 0; i < n; ++i) {
    const float v = score(kind);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (type == ScoreType::kFloat32)
      ((float*)x)[i] = v;
    else if (type == ScoreType::kFloat64)
      ((double*)x)[i] = v;
    else
      ((uint16_t*)x)[i] = (uint16_t)(bits >> 16);  // any 16 bits are a half, too
  }
}

template <class T>
void add_gradient(Checksum& sum, const Gradient& g) {
  gradient_rows<T>(g, 0, g.n_rows);
  for (int64_t i = 0; i < g.n_rows * g.n_classes; ++i) sum.add(((const T*)g.out)[i]);
}

}  // namespace

int main(int, char** arguments) {
  Checksum sum;
  const int rounds = std::atoi(arguments[1]);
  const int lengths[] = {1, 2, 5, 15, 16, 17, 31, 63, 64, 65, 100, 129, 255, 257, 1000, 1023, 2049, 5000, 20011, 70001};
  for (int round = 0; round < rounds; ++round) {
    if (round && round % 300 == 0) std::printf("ok %016llx\n", sum.value);
    Job job{};
    Search& p = job.p;
    p.n_classes = p.row_stride = lengths[between(0, 19)], p.n_rows = between(1, p.n_classes < 300 ? 70 : 3);
    p.n_sample = between(1, p.n_classes > 5000 ? 5 : 33);
    p.n_ranks = between(0, 4), p.exclude_target = p.n_ranks && between(0, 1);
    for (int m = 0; m < std::max(p.n_ranks, 1); ++m) {
      p.ranks[m] = between(1 + p.exclude_target, round % 7 ? 21 : 130);
      p.k = std::max<int64_t>(p.k, p.ranks[m]);
    }
    p.type = (ScoreType)between(0, 3), p.law = (Law)between(0, 1), p.dense = between(0, 3) == 0;
    const int64_t seed = engine();
    p.seed = &seed, p.first_row = between(0, 9), p.first_class = p.n_ranks ? 0 : between(0, 1000);
    p.epsilon = between(0, 4) * 0.5;
    const int64_t quads = (p.n_sample + 3) / 4;
    job.samples_per_split = std::max<int64_t>((quads + 1) / between(1, 2) * 4, 4);
    job.n_split = (p.n_sample + job.samples_per_split - 1) / job.samples_per_split;

    const size_t n_scores = (size_t)(p.n_rows * p.n_classes), size = p.type == ScoreType::kFloat64 ? 8 : 4;
    const size_t item = p.type < ScoreType::kBFloat16 ? size : 2;
    const size_t n_ids = (size_t)(p.n_rows * p.n_sample * (p.n_ranks ? p.n_ranks : p.k));
    const size_t n_values = p.n_ranks ? (size_t)(p.n_rows * p.n_ranks) : n_ids;
    const std::unique_ptr<char[]> scores(new char[n_scores * item]), values(new char[n_values * size]());
    const std::unique_ptr<char[]> picked(new char[n_ids * size]), gradient(new char[n_scores * item]);
    const std::unique_ptr<int64_t[]> classes(new int64_t[n_ids]()), workspace(new int64_t[workspace_words(job)]);
    const std::unique_ptr<int64_t[]> target(new int64_t[p.n_rows]);
    for (int64_t n = 0; n < p.n_rows; ++n) target[n] = between(0, 9) ? between(0, (int)p.n_classes - 1) : -100;
    if (p.n_ranks && (p.exclude_target || between(0, 1))) p.target = target.get(), p.ignore_index = -100;
    fill(scores.get(), n_scores, p.type, between(kNormal, kInfinite));
    p.scores = scores.get(), p.values = values.get(), p.classes = classes.get();
    job.picked = job.n_split > 1 ? picked.get() : nullptr;
    const Kernel& kernel = kernels()[(size_t)round % kernels().size()];
    kernel.search(job, 0, p.n_rows * job.n_split, workspace.get());
    if (p.n_ranks && job.n_split > 1) kernel.finish(job);
    for (size_t i = 0; i < n_ids; ++i)
      if (classes[i] < -2 || classes[i] >= p.first_class + p.n_classes) return std::puts("class out of range"), 1;
    for (size_t i = 0; i < n_ids; ++i) sum.add(classes[i]);
    for (size_t i = 0; i < n_values; ++i)
      size == 8 ? sum.add(((double*)values.get())[i]) : sum.add(((float*)values.get())[i]);
    if (!p.n_ranks) continue;
    Gradient g{};
    g.grad = values.get(), g.classes = classes.get(), g.target = p.target, g.ignore_index = -100;
    g.n_rows = p.n_rows, g.n_sample = p.n_sample, g.n_ranks = p.n_ranks, g.n_classes = p.n_classes;
    g.type = p.type, g.out = gradient.get();
    switch (p.type) {
      case ScoreType::kFloat32: add_gradient<float>(sum, g); break;
      case ScoreType::kFloat64: add_gradient<double>(sum, g); break;
      case ScoreType::kBFloat16: add_gradient<BFloat16>(sum, g); break;
      case ScoreType::kFloat16: add_gradient<Half>(sum, g); break;
    }
  }
  std::printf("ok %016llx\n", sum.value);
}
