// Branches and convergence, barriers, and what lanes tell each other.
#pragma once

#include "warp.h"

namespace model {

// Lets groups go on, as one, where all whom they wait for have come; then picks the group that runs.
inline void settle(Warp& w) {
  std::vector<Group>& groups = w.groups;
  for (size_t k = 0; k < groups.size(); ++k)
    if (!groups[k].mask) groups.erase(groups.begin() + (long)k--);
  for (size_t k = 0; k < groups.size(); ++k) {
    Group& g = groups[k];
    if (g.wait != Wait::kConverge && g.wait != Wait::kWarp) continue;
    const uint32_t want = g.wait == Wait::kWarp ? g.waits_for : w.converge[g.barrier][__builtin_ctz(g.mask)];
    const auto belongs = [&](const Group& x) {
      return x.wait == g.wait && x.at == g.at && x.barrier == g.barrier && (x.mask & want);
    };
    uint32_t have = 0;
    for (const Group& x : groups) have |= belongs(x) ? x.mask : 0;
    if (want & w.alive & ~have) continue;
    const Group joined{g.at, have};
    for (size_t j = groups.size(); j-- > 0;)
      if (belongs(groups[j])) groups[j].mask = 0;
    for (size_t j = groups.size(); j-- > 0;)
      if (!groups[j].mask) groups.erase(groups.begin() + (long)j);
    groups.push_back(joined);
    k = (size_t)-1;  // others may be ready now
  }
  for (w.current = (int)groups.size() - 1; w.current >= 0; --w.current)
    if (groups[w.current].wait == Wait::kNone) break;
}

// The lanes of this instruction become a group of their own.
inline Group& apart(Warp& w) {
  Group& g = w.group();
  const uint32_t others = g.mask & ~w.exec;
  if (!others) return g;
  g.mask = others;
  w.groups.push_back({g.at, w.exec});
  w.current = (int)w.groups.size() - 1;
  return w.groups.back();
}

inline void go_to(Warp& w, int target) {
  if (w.exec) apart(w).at = target;
}

inline void branch(Warp& w, const Instruction& i) {
  if (i.has(Mod::kDIV) || i.has(Mod::kCONV)) {
    const uint32_t wanted = Source(w, i.src[0]).integer(0);
    const bool apart_now = wanted & w.alive & ~w.group().mask;
    if (apart_now != i.has(Mod::kDIV)) return;
  } else if (i.n_ps) {
    w.exec &= w.predicate(i.ps[0]);
  }
  if (i.has(Mod::kU) && w.exec != w.group().mask) return;  // taken by all lanes or none; code for some of them follows
  go_to(w, i.target);
}
inline void call(Warp& w, const Instruction& i) {
  if (!w.exec) return;
  if (i.target < 0) throw Error("a call outside the kernel, as of an assertion that failed");
  go_to(w, i.target);
}
inline void give_back(Warp& w, const Instruction& i) {
  if (w.exec) go_to(w, (int)(w.r[i.src[0].reg][__builtin_ctz(w.exec)] / 16));
}
inline void leave(Warp& w, const Instruction& i) {
  if (i.n_ps) w.exec &= w.predicate(i.ps[0]);
  w.alive &= ~w.exec, w.group().mask &= ~w.exec;
  settle(w);
}

inline void open_convergence(Warp& w, const Instruction& i) {
  for (int l = 0; l < kLanes; ++l)
    if (w.exec >> l & 1) w.converge[i.barrier][l] = w.exec;
}
inline void leave_convergence(Warp& w, const Instruction& i) {
  const uint32_t leaves = i.n_ps ? w.exec & w.predicate(i.ps[0]) : w.exec;
  for (uint32_t& mask : w.converge[i.barrier]) mask &= ~leaves;
  const int at = w.group().at;
  const uint32_t mask = w.group().mask;
  settle(w);
  for (int k = 0; k < (int)w.groups.size(); ++k)  // this group goes on first
    if (w.groups[k].at == at && w.groups[k].mask == mask && w.groups[k].wait == Wait::kNone) w.current = k;
}
inline void converge(Warp& w, const Instruction& i) {
  if (!w.exec) return;
  Group& g = apart(w);
  g.wait = Wait::kConverge, g.barrier = i.barrier;
  settle(w);
}
inline void converge_warp(Warp& w, const Instruction& i) {
  if (!w.exec) return;
  const uint32_t wanted = i.has(Mod::kALL) ? kAll : Source(w, i.src[0]).integer(__builtin_ctz(w.exec));
  Group& g = apart(w);
  g.wait = Wait::kWarp, g.barrier = 0, g.waits_for = wanted;
  settle(w);
}
inline void move_convergence(Warp& w, const Instruction& i) {
  if (i.special) {  // to the barrier
    const Source a(w, i.src[0]);
    for (int l = 0; l < kLanes; ++l)
      if (w.exec >> l & 1) w.converge[i.barrier][l] = a.raw(l);
    return;
  }
  to_lanes(w, i, [&](int l) { return w.converge[i.barrier][l]; });
}

inline void block_barrier(Warp& w, const Instruction& i) {
  if (!w.exec) return;
  if (i.src[0].kind != Kind::kImmediate || i.n_src > 1) throw Error("a barrier of a part of the block");
  Group& g = apart(w);
  g.wait = Wait::kBlock, g.barrier = (int)i.src[0].value;
  settle(w);
}

inline void shuffle(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]), b(w, i.src[1]), c(w, i.src[2]);
  uint32_t inside = 0;
  to_lanes(w, i, [&](int l) {
    const int by = (int)(b.raw(l) & 31), clamp = (int)(c.raw(l) & 31), segment = (int)(c.raw(l) >> 8 & 31);
    const int first = l & segment, last = first | (clamp & ~segment);
    int from = i.has(Mod::kIDX)    ? first | (by & ~segment)
               : i.has(Mod::kUP)   ? l - by
               : i.has(Mod::kDOWN) ? l + by
                                   : l ^ by;
    const bool in = i.has(Mod::kUP) ? from >= last : from <= last;
    inside |= (uint32_t)in << l;
    return a.raw(in ? from : l);
  });
  if (i.n_pd) w.set_predicate(i.pd[0], inside);
}
inline void vote(Warp& w, const Instruction& i) {
  const uint32_t found = w.predicate(i.ps[0]) & w.exec;
  const bool holds = i.has(Mod::kALL) ? found == w.exec : i.has(Mod::kANY) ? found != 0 : !found || found == w.exec;
  if (i.dst >= kUniform)
    w.set_uniform(i.dst, found);
  else
    to_lanes(w, i, [&](int) { return found; });
  if (!i.n_pd) return;
  if (i.pd[0].index >= 8 && i.pd[0].index != kUniformTrue) w.p[i.pd[0].index] = holds ? kAll : 0;
  w.set_predicate(i.pd[0], holds ? kAll : 0);
}
inline void match(Warp& w, const Instruction& i) {
  const Source a(w, i.src[0]);
  to_lanes(w, i, [&](int l) { return lanes_where([&](int k) { return w.exec >> k & 1 && a.raw(k) == a.raw(l); }); });
}
inline void reduce(Warp& w, const Instruction& i) {
  if (!w.exec) return;
  const Source a(w, i.src[0]);
  const int first = __builtin_ctz(w.exec);
  uint32_t x = a.raw(first);
  for (int l = first + 1; l < kLanes; ++l) {
    if (!(w.exec >> l & 1)) continue;
    const uint32_t y = a.raw(l);
    const bool less = i.has(Mod::kS32) ? (int32_t)x < (int32_t)y : x < y;
    x = i.has(Mod::kSUM)                       ? x + y
        : i.has(Mod::kMAX) || i.has(Mod::kMIN) ? (less == i.has(Mod::kMAX) ? y : x)
        : i.has(Mod::kOR)                      ? x | y
        : i.has(Mod::kXOR)                     ? x ^ y
                                               : x & y;
  }
  w.set_uniform(i.dst, x);
}
inline void to_uniform(Warp& w, const Instruction& i) {
  if (w.exec) w.set_uniform(i.dst, Source(w, i.src[0]).raw(__builtin_ctz(w.exec)));
}

inline void nothing(Warp&, const Instruction&) {}

}  // namespace model
