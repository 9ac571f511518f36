// Launch shapes and where things lie, by (N, L, dtype, k, n_sample): the one table of them.
#pragma once

#include "team.h"

namespace topk_fast {
namespace {

constexpr int kGroups = 1024;  // more than `plan` ever looks at
constexpr int kMaxParts = 16;  // blocks that share a row
constexpr int kSharedBudget = 46 << 10;

template <class S>
struct Contender {
  S score;
  int32_t class_id;  // from 0 on, of the slice
};

struct Survivor {
  uint32_t word;
  int32_t contender;
};

// Where things lie, in bytes from the start of a team's part of shared memory or of the workspace.
struct Layout {
  int team, teams;  // threads a row, teams a block
  int parts;        // blocks that collect a row
  int segments;     // warps' shares of a row, each with a list
  int capacity;     // of a list
  int samples;      // searched side by side: 4, 8, 12 or 16
  int held;         // words of a sample that wait for their normals
  int bags_in_shared, lists_in_shared, row_in_shared;
  int reduce_at, prefix_at, counts_at, work_at, bags_at, lists_at, row_at, shared;
  int64_t blocks, workspace_lists, workspace_slot, workspace_headers, workspace;
};

struct Args {
  CudaSearch p;
  Plan plan;
  Layout l;
  int32_t looked_at;
  float inverse_l;
  int32_t planned;
};

int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

Args arguments(const CudaSearch& p) {
  Args a{};
  a.p = p;
  a.plan = plan(p.n_classes, p.k);
  a.planned = !(p.dense || a.plan.all);
  a.inverse_l = 1.0f / (float)p.n_classes;
  const int64_t groups = (p.n_classes + a.plan.group - 1) / a.plan.group;
  a.looked_at = a.planned ? (int32_t)((groups + a.plan.stride - 1) / a.plan.stride) : 0;
  const int item = p.dtype == kFloat32 ? 4 : p.dtype == kFloat64 ? 8 : 2, wide = p.dtype == kFloat64 ? 8 : 4;
  const int contender = 2 * wide;
  Layout& l = a.l;
  l.team = p.n_classes <= 2048 ? 32 : kBlock;
  l.teams = kBlock / l.team;
  l.parts = 1;
  if (a.planned && l.team == kBlock)
    while (l.parts < kMaxParts && p.n_rows * l.parts < 8 * (int64_t)p.n_processors && p.n_classes >= 65536 * l.parts)
      l.parts *= 2;
  l.segments = l.parts * (l.team / 32);
  const int64_t per_warp = 4 * a.plan.contenders / l.segments;
  l.capacity = a.planned ? (int)(per_warp > 64 ? per_warp : 64) : 1;
  l.samples = p.n_sample >= 16 ? 16 : (int)(p.n_sample + 3) / 4 * 4;
  l.held = l.team + (l.team < 64 ? 32 : 64);
  int at = 0;
  const auto place = [&at](int64_t bytes) {
    const int start = at;
    at += (int)aligned(bytes);
    return start;
  };
  l.reduce_at = place(kBlock / 32 * 8);
  l.prefix_at = place((l.segments + 1) * 4);
  l.counts_at = place(16 * 4);
  const int64_t survivors = (int64_t)l.samples * l.held * sizeof(Survivor),
                keys = a.planned ? (int64_t)kGroups * wide : 0;
  l.work_at = place(survivors > keys ? survivors : keys);
  const int64_t budget = kSharedBudget / l.teams;
  const int64_t bags = (int64_t)l.samples * p.k * (wide + 4), lists = (int64_t)l.segments * l.capacity * contender;
  l.bags_in_shared = at + aligned(bags) <= budget;
  l.bags_at = l.bags_in_shared ? place(bags) : 0;
  l.lists_in_shared = l.parts == 1 && at + aligned(lists) <= budget;
  l.lists_at = l.lists_in_shared ? place(lists) : 0;
  const int64_t row = (int64_t)p.n_classes * item + 16;
  l.row_in_shared = l.parts == 1 && row <= 16384 / l.teams && at + aligned(row) <= budget;
  l.row_at = l.row_in_shared ? place(row) : 0;
  l.shared = at;
  const int64_t most = 16 * (int64_t)p.n_processors * l.teams;  // teams at work at a time
  const int64_t slots = p.n_rows < 1 ? 1 : l.parts > 1 || p.n_rows < most ? p.n_rows : most;
  l.blocks = (slots + l.teams - 1) / l.teams;
  l.workspace_lists = l.bags_in_shared ? 0 : aligned(bags);
  l.workspace_slot = l.workspace_lists + (l.lists_in_shared ? 0 : aligned(lists));
  l.workspace_headers = l.parts > 1 ? aligned(16 + l.segments * 4) : 0;
  l.workspace = p.n_rows * l.workspace_headers + l.blocks * l.teams * l.workspace_slot;
  return a;
}

}  // namespace
}  // namespace topk_fast
