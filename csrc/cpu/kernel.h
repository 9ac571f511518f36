// A search on CPU as its callers see it: the job, the kernels for each instruction set, and the choice among them.
#pragma once

#include <vector>

#include "../request.h"

namespace topk_fast {

// Work item i is row i / n_split and the i % n_split-th share of that row's samples.
struct Job {
  Search p;  // the seed and epsilon are read: p.schedule is null
  int64_t n_split, samples_per_split;
  void* picked;  // [n_rows, n_sample, n_ranks] values where rows are split, which `finish` makes excesses of
};

constexpr int kLists = 8;     // samples whose lists stand side by side
constexpr int kWalkers = 32;  // samples, of one or more rows, whose arrivals are walked side by side

// Keys of the lists of one item: k for each sample, samples rounded up to whole groups of lists.
inline int64_t item_keys(const Job& job) { return (job.samples_per_split + kLists - 1) / kLists * kLists * job.p.k; }

// Items that a thread searches together: as many as fill the walkers and keep their lists in its cache.
inline int64_t items_together(const Job& job) {
  const int64_t samples = job.samples_per_split < job.p.n_sample ? job.samples_per_split : job.p.n_sample;
  const int64_t filling = kWalkers / samples, fitting = (1 << 16) / item_keys(job);
  const int64_t items = filling < fitting ? filling : fitting;
  return items > 1 ? items : 1;
}

// 64-bit words that a thread needs: lists, and one row's picked values.
inline int64_t workspace_words(const Job& job) {
  const int64_t wide = job.p.type == ScoreType::kFloat64 ? 2 : 1;
  return items_together(job) * item_keys(job) * wide + job.p.n_sample * job.p.n_ranks + 8;
}

// The search compiled for one instruction set.
struct Kernel {
  const char* name;
  void (*search)(const Job& job, int64_t begin, int64_t end, void* workspace);
  void (*finish)(const Job& job);
};

const std::vector<Kernel>& kernels();  // those that this machine can run, the best one first
const Kernel& chosen_kernel();
bool choose_kernel(const char* name);  // false where there is none of that name

}  // namespace topk_fast
