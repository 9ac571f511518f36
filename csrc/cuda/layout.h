// Launch shapes and the places of everything in memory, by (N, L, dtype, k, n_sample).
#pragma once

#include "../noise.h"
#include "team.h"

namespace topk_fast {
namespace {

constexpr int kGroups = 1024;  // more than `plan` ever looks at
constexpr int kMaxParts = 16;  // blocks that share a row
constexpr int kSharedBudget = 46 << 10;
constexpr int kResident = 4;  // blocks of a search that run on a multiprocessor at a time, by its registers
constexpr int kSamples = 16;  // samples of a row that are searched side by side, at most

// Clean scores of a row, widened when they are read.
template <class T>
struct Scores {
  const T* at;
  int64_t stride, n;
  __device__ __forceinline__ ArithmeticOf<T> operator[](int64_t c) const { return widen(at[c * stride]); }
};

// A class above the cut.
template <class S>
struct Contender {
  S score;
  int32_t class_id;  // from 0 on, of the slice
};

// A word that passed its bound.
struct Survivor {
  uint32_t word;
  int32_t contender;
};

// The places of everything, in bytes from the start of a team's part of shared memory or of the workspace.
struct Layout {
  int team, teams;  // threads a row, teams a block
  int parts;        // blocks that collect a row
  int segments;     // warps' shares of a row, each with a list
  int capacity;     // of a list
  int samples;      // searched side by side: 4, 8, 12 or 16
  int held;         // survivors of a sample that wait for their draws
  int best_in_shared, lists_in_shared, row_in_shared;
  int reduce_at, prefix_at, counts_at, work_at, best_at, lists_at, row_at, shared;
  int64_t blocks, workspace_lists, workspace_slot, workspace_headers, workspace;
};

// The argument of the kernels.
struct Args {
  Search search;
  Plan plan;
  Layout layout;
  char* workspace;
  int32_t planned;    // whether there is a cut
  int32_t looked_at;  // groups that the cut is made of
  float inverse_l;
  double inverse_b;
};

// The places of a team, by their addresses.
template <class S>
struct Memory {
  int64_t* scratch;       // of reductions
  int32_t* prefix;        // [segments + 1]: how many contenders stand before each segment
  int* counts;            // [kSamples]
  char* work;             // the keys of groups, then survivors [samples, held]
  S* best_values;         // [samples, k]
  int32_t* best_classes;  // [samples, k]
  Contender<S>* lists;    // [segments, capacity]
  char* row;              // the scores, where they are kept

  __device__ Memory(const Args& a, char* shared, int64_t slot) {
    const Layout& l = a.layout;
    char* own = a.workspace + a.search.n_rows * l.workspace_headers + slot * l.workspace_slot;
    scratch = (int64_t*)(shared + l.reduce_at);
    prefix = (int32_t*)(shared + l.prefix_at);
    counts = (int*)(shared + l.counts_at);
    work = shared + l.work_at;
    best_values = (S*)(l.best_in_shared ? shared + l.best_at : own);
    best_classes = (int32_t*)(best_values + l.samples * a.search.k);
    lists = (Contender<S>*)(l.lists_in_shared ? shared + l.lists_at : own + l.workspace_lists);
    row = shared + l.row_at;
  }
};

// What the parts of a row leave for its search: the cut, and 16 bytes on the counts of the segments' contenders.
__device__ __forceinline__ char* header_of(const Args& a, int64_t n) {
  return a.workspace + n * a.layout.workspace_headers;
}

__device__ __forceinline__ bool is_ignored(const Search& search, int64_t n) {
  return search.target && search.target[n] == search.ignore_index;
}

int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

Args arguments(const Search& search, int n_processors) {
  const int64_t n_rows = search.n_rows, n_classes = search.n_classes;
  Args a{};
  a.search = search;
  a.plan = plan(n_classes, search.k, search.law);
  a.planned = !(search.dense || a.plan.all);
  a.inverse_l = 1.0f / (float)n_classes;
  a.inverse_b = 1.0 / (double)search.n_sample;
  const int64_t groups = (n_classes + a.plan.group - 1) / a.plan.group;
  a.looked_at = a.planned ? (int32_t)((groups + a.plan.stride - 1) / a.plan.stride) : 0;
  const bool is_double = search.type == ScoreType::kFloat64;
  const int item = search.type == ScoreType::kFloat32 ? 4 : is_double ? 8 : 2, wide = is_double ? 8 : 4;
  Layout& l = a.layout;
  l.team = n_classes <= 2048 ? 32 : kBlock;
  l.teams = kBlock / l.team;
  l.parts = 1;
  if (a.planned && l.team == kBlock)
    while (l.parts < kMaxParts && n_rows * l.parts < 8 * (int64_t)n_processors && n_classes >= 65536 * l.parts)
      l.parts *= 2;
  l.segments = l.parts * (l.team / 32);
  const int64_t per_warp = 4 * a.plan.contenders / l.segments;
  l.capacity = a.planned ? (int)(per_warp > 64 ? per_warp : 64) : 1;
  l.samples = search.n_sample >= kSamples ? kSamples : (int)(search.n_sample + 3) / 4 * 4;
  l.held = l.team + (l.team < 64 ? 32 : 64);
  int at = 0;
  const auto place = [&at](int64_t bytes) {
    const int start = at;
    at += (int)aligned(bytes);
    return start;
  };
  l.reduce_at = place(kBlock / 32 * 8);
  l.prefix_at = place((l.segments + 1) * 4);
  l.counts_at = place(kSamples * 4);
  const int64_t survivors = (int64_t)l.samples * l.held * sizeof(Survivor),
                keys = a.planned ? (int64_t)kGroups * wide : 0;
  l.work_at = place(survivors > keys ? survivors : keys);
  const int64_t budget = kSharedBudget / l.teams;
  const int64_t best = (int64_t)l.samples * search.k * (wide + 4), lists = (int64_t)l.segments * l.capacity * 2 * wide;
  l.best_in_shared = at + aligned(best) <= budget;
  l.best_at = l.best_in_shared ? place(best) : 0;
  l.lists_in_shared = l.parts == 1 && at + aligned(lists) <= budget;
  l.lists_at = l.lists_in_shared ? place(lists) : 0;
  const int64_t row = n_classes * item + 16;
  l.row_in_shared = l.parts == 1 && row <= 16384 / l.teams && at + aligned(row) <= budget;
  l.row_at = l.row_in_shared ? place(row) : 0;
  l.shared = at;
  const int64_t most = kResident * (int64_t)n_processors * l.teams;  // teams at work at a time; each takes many rows
  const int64_t slots = n_rows < 1 ? 1 : l.parts > 1 || n_rows < most ? n_rows : most;
  l.blocks = (slots + l.teams - 1) / l.teams;
  l.workspace_lists = l.best_in_shared ? 0 : aligned(best);
  l.workspace_slot = l.workspace_lists + (l.lists_in_shared ? 0 : aligned(lists));
  l.workspace_headers = l.parts > 1 ? aligned(16 + l.segments * 4) : 0;
  l.workspace = n_rows * l.workspace_headers + l.blocks * l.teams * l.workspace_slot;
  return a;
}

}  // namespace
}  // namespace topk_fast
