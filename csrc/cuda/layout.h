// Launch shapes and the places of everything in memory, by (N, L, dtype, k, n_sample) and the GPU.
#pragma once

#include <cmath>
#include <new>
#include <type_traits>

#include "../bounds.h"
#include "best.h"

namespace topk_fast {
namespace {

constexpr int kMaxParts = 16;           // blocks that share a row
constexpr int kSamples = 16;            // samples of a row that are searched side by side, at most
constexpr int kFewest = 2;              // of these, where rows should stay in L2
constexpr int kPilot = 32;              // contenders whose draws make the first bound
constexpr int kDrawn = 512;             // contenders that are drawn before anybody looks at their survivors, at most
constexpr int kMostAtOnce = 4096;       // contenders in a team's list, about
constexpr int kBlockBudget = 46 << 10;  // bytes of shared memory that every GPU gives a block
constexpr int kKept = 1 << 10;          // those of each block that CUDA keeps for itself
constexpr int kGranule = 256;           // by which it hands them out, or by half as many

// Clean scores of a row, widened when they are read.
template <class T>
struct Scores {
  const T* at;
  int64_t stride, n;
  // Where they start. The compiler is told that it is global memory: a pointer kept in shared memory may point
  // anywhere.
  __device__ __forceinline__ const T* start() const {
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(at));
#endif
    return at;
  }
  __device__ __forceinline__ ArithmeticOf<T> operator[](int64_t c) const { return widen(start()[c * stride]); }
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

// Threads of a search that run on a multiprocessor at a time, by their registers, and those of its largest team;
// float64 takes more registers.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 7 * kBlock : 8 * kBlock;
template <class T>
constexpr int kLargest = sizeof(T) == 8 ? kBlock : 2 * kBlock;
constexpr int kMostWarps = kLargest<float> / 32;
template <class Threads>
constexpr int kBlockOf = Threads::kSize < kBlock ? kBlock : Threads::kSize;

// The places of everything, in bytes from the start of a team's part of shared memory or of the workspace.
struct Layout {
  int team, teams;    // threads a row, teams a block
  int parts;          // blocks that collect a row
  int part_capacity;  // of the list of each
  int capacity;       // of a team's list of contenders
  int samples;        // searched side by side: 4, 8 or 16
  int held;           // survivors of a sample that wait for their draws
  int best_in_shared, list_in_shared;
  int keys_at, best_at, list_at, shared;  // the team's state comes first
  int64_t blocks, workspace_list, workspace_slot, workspace_header, workspace_row, workspace;
};

// The argument of the kernels.
struct Args {
  Search search;
  Plan plan;
  Layout layout;
  char* workspace;
  int32_t planned;    // whether there is a cut
  int32_t looked_at;  // groups that the cut is made of
  float pilot_above;  // mean distances of the contenders from the cut, by which the pilot's scores exceed it
  float inverse_l;
  double inverse_b;
};

// The lists that the parts of a row leave for its search.
template <class S>
struct Parts {
  S* cut;
  int32_t* counts;     // [parts]: -1 where there are more contenders than a list holds
  Contender<S>* list;  // [parts, part_capacity]

  __device__ Parts(const Args& a, int64_t n) {
    char* own = a.workspace + n * a.layout.workspace_row;
    cut = (S*)own;
    counts = (int32_t*)(own + 16);
    list = (Contender<S>*)(own + a.layout.workspace_header);
  }
};

// A row as the stages of its search see it.
template <class T>
struct Row {
  using S = ArithmeticOf<T>;
  Scores<T> scores;
  S cut;
  S epsilon;
  float rough_epsilon;  // as the bounds take it
  uint32_t number, key0, key1;
  int32_t first_class;

  __device__ __forceinline__ Words words(uint32_t c0, uint32_t c2, uint32_t stream) const {
    return philox(c0, number, c2, stream, key0, key1);
  }
};

// How far a warp has come in a pass over the tiles of a row.
struct Progress {
  int32_t tile;   // its next one
  int32_t taken;  // hits of this tile that an earlier list has
};

// Contenders in a team's list.
template <class S>
struct Listed {
  Contender<S>* at;
  int32_t capacity;
  int32_t found;            // how many the list would hold if it were long enough
  S above_cut[kMostWarps];  // the sum of the distances of their scores from the cut, by warps
  bool nan;                 // whether a score is NaN
  bool whole;               // whether they are all of the row's

  __device__ __forceinline__ int32_t size() const { return found < capacity ? found : capacity; }
  __device__ __forceinline__ bool is_last() const { return found <= capacity; }  // of the pass
};

// The knowledge of a team. It lies in shared memory, so that it takes no registers: a thread reads what it needs.
template <class T>
struct State {
  using S = ArithmeticOf<T>;
  int64_t n;             // the row
  int64_t first_sample;  // of those that are searched side by side
  int32_t n_samples;
  Row<T> row;
  Progress progress[kMostWarps];  // of the warps
  int32_t step;                   // from a tile to the next one
  Listed<S> listed;
  int32_t counts[kSamples];  // survivors of each sample
  int32_t n_pilot;
  int32_t pilot[kPilot];        // their places in the list
  S sums[kMaxRanks];            // of the ranks' values, over the samples so far
  int64_t scratch[kMostWarps];  // of reductions
  Lists<S> lists;
  S reach;  // every sample's k-th best attains it

  __device__ State(const Args& a, char* shared, int64_t slot) : n(slot) {
    const Layout& l = a.layout;
    char* own = a.workspace + a.search.n_rows * l.workspace_row + slot * l.workspace_slot;
    lists.values = (S*)(l.best_in_shared ? shared + l.best_at : own);
    lists.classes = (int32_t*)(lists.values + l.samples * a.search.k);
    lists.k = (int32_t)a.search.k;
    const uint64_t seed = (uint64_t)*a.search.seed;
    const double epsilon = a.search.schedule ? *a.search.schedule : a.search.epsilon;
    row.key0 = (uint32_t)seed, row.key1 = (uint32_t)(seed >> 32);
    row.epsilon = (S)epsilon, row.rough_epsilon = bound_epsilon(epsilon);
    row.first_class = (int32_t)a.search.first_class;
    listed.at = (Contender<S>*)(l.list_in_shared ? shared + l.list_at : own + l.workspace_list);
    listed.capacity = l.capacity;
    n_pilot = 0;
  }

  // What lies behind the state.
  __device__ __forceinline__ char* keys(const Layout& l) { return (char*)this + l.keys_at; }
  __device__ __forceinline__ Survivor* survivors(const Layout& l,
                                                 int sample) {  // [held]; the keys are not used any more
    return (Survivor*)((char*)this + l.keys_at) + sample * l.held;
  }
};

// A team's state, made in its part of shared memory; a barrier, too.
template <class Threads, class T>
__device__ __forceinline__ State<T>& make_state(const Args& a, char* shared, int64_t slot) {
  State<T>* state = (State<T>*)shared;
  if (Threads::rank() == 0) new (state) State<T>(a, shared, slot);
  Threads::sync();
  return *state;
}

__device__ __forceinline__ bool is_ignored(const Search& search, int64_t n) {
  return search.target && search.target[n] == search.ignore_index;
}

int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

Args arguments(const Search& search, const Gpu& gpu) {
  const int64_t n_rows = search.n_rows, n_classes = search.n_classes;
  Args a{};
  a.search = search;
  a.plan = plan(n_classes, search.k, search.law);
  a.planned = !(search.dense || a.plan.all);
  // As many as the pilot has exceed this, if scores have an exponential tail.
  a.pilot_above = logf((float)a.plan.contenders / kPilot);
  a.inverse_l = 1.0f / (float)n_classes;
  a.inverse_b = 1.0 / (double)search.n_sample;
  const int64_t groups = (n_classes + a.plan.group - 1) / a.plan.group;
  a.looked_at = a.planned ? (int32_t)((groups + a.plan.stride - 1) / a.plan.stride) : 0;
  const bool is_double = search.type == ScoreType::kFloat64;
  const int item = search.type == ScoreType::kFloat32 ? 4 : is_double ? 8 : 2, wide = is_double ? 8 : 4;
  const int64_t threads = (is_double ? kResident<double> : kResident<float>)*(int64_t)gpu.processors;  // at a time
  const int64_t fit = gpu.cache ? gpu.cache / (n_classes * item) : n_rows;                             // rows in L2
  Layout& l = a.layout;
  l.parts = 1;
  if (a.planned && kBlock * n_rows < threads)
    while (l.parts < kMaxParts && n_rows * l.parts < 16 * (int64_t)gpu.processors && n_classes >= 16384 * l.parts)
      l.parts *= 2;
  if (n_classes <= 2048 && n_rows >= 16 * (int64_t)gpu.processors) {  // short rows that fill the GPU: a warp each
    l.team = 32, l.teams = kBlock / 32;
  } else {  // a block each, the larger one where so few rows, or so few that fit into L2, leave room for it
    const int64_t rows = l.parts == 1 && fit < n_rows ? fit : n_rows;
    const int64_t largest = is_double ? kLargest<double> : kLargest<float>;
    l.team = largest * rows <= threads ? (int)largest : kBlock, l.teams = 1;
  }
  const auto capacity_for = [](int64_t contenders) { return (int)((contenders + 63) / 32 * 32); };
  const int64_t expected = a.planned ? a.plan.contenders : n_classes;
  l.capacity = capacity_for(expected < kMostAtOnce ? expected * 5 / 4 : kMostAtOnce);
  l.part_capacity = capacity_for(expected * 3 / 2 / l.parts);
  if (l.parts > 1) l.capacity = l.parts * l.part_capacity;

  const int64_t blocks = threads / (l.team * l.teams * (int64_t)gpu.processors);  // on a multiprocessor
  const int64_t budget_of_block = (gpu.shared_memory / blocks - kKept) / kGranule * kGranule;
  const int64_t budget = (budget_of_block < kBlockBudget ? budget_of_block : kBlockBudget) / l.teams;
  int at = 0;
  const auto place = [&at](int64_t bytes) {
    const int start = at;
    at += (int)aligned(bytes);
    return start;
  };
  place(is_double ? sizeof(State<double>) : sizeof(State<float>));
  const int64_t entries = search.k * (wide + 4);  // of a sample's list
  l.held = l.team == 32 ? 32 : budget < 16 << 10 ? 96 : 128;
  const auto survivors = [&l] { return (int64_t)l.samples * l.held * (int64_t)sizeof(Survivor); };
  l.samples = search.n_sample > 8 ? 16 : search.n_sample > 4 ? 8 : 4;
  while (l.samples > 4 && at + survivors() + (search.k > 32 ? 0 : l.samples * entries) > budget) l.samples /= 2;
  const int64_t keys = (int64_t)a.looked_at * wide;
  l.keys_at = place(survivors() > keys ? survivors() : keys);
  const int64_t best = l.samples * entries, list = (int64_t)l.capacity * 2 * wide;
  l.best_in_shared = at + aligned(best) <= budget;
  l.best_at = l.best_in_shared ? place(best) : 0;
  l.list_in_shared = at + aligned(list) <= budget;
  l.list_at = l.list_in_shared ? place(list) : 0;
  l.shared = at;
  const int64_t taken = (l.shared * l.teams + kGranule - 1) / kGranule * kGranule + kKept;
  const int64_t resident = blocks * taken > gpu.shared_memory ? gpu.shared_memory / taken : blocks;
  int64_t most = resident * l.teams * gpu.processors;  // teams at work at a time; each takes many rows
  const int64_t fewest = kFewest * (int64_t)gpu.processors;
  if (gpu.has_slow_memory && gpu.cache && l.parts == 1 && fit < most) most = fit > fewest ? fit : fewest;
  const int64_t teams = n_rows < 1 ? 1 : n_rows < most ? n_rows : most;
  l.blocks = (teams + l.teams - 1) / l.teams;
  l.workspace_list = l.best_in_shared ? 0 : aligned(best);
  l.workspace_slot = l.workspace_list + (l.list_in_shared ? 0 : aligned(list));
  l.workspace_header = aligned(16 + l.parts * 4);
  l.workspace_row = l.parts > 1 ? l.workspace_header + aligned((int64_t)l.parts * l.part_capacity * 2 * wide) : 0;
  l.workspace = n_rows * l.workspace_row + l.blocks * l.teams * l.workspace_slot;
  return a;
}

}  // namespace
}  // namespace topk_fast
