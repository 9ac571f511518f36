// The contenders of a row: the classes above its cut, which get draws of their own, from one pass over its scores.
//
// A team reads a row in tiles, kUnroll loads of 16 bytes in flight in each thread. A thread turns its scores of a tile
// into one mask, and the masks of a segment of tiles into the list at a time: no thread waits for another's hits. A
// list that is full is drawn for before the pass goes on (search.h), so any number of contenders is right. With few
// long rows several blocks collect a row, each every parts-th tile (kernels.cu).
#pragma once

#include "cut.h"

namespace topk_fast {
namespace {

template <class T>
constexpr int kWide = 16 / sizeof(T);  // scores of a load

#ifdef __CUDA_ARCH__
// Whether each of two scores is above the cut or NaN, all bits of its half.
__device__ __forceinline__ uint32_t above(Half, uint32_t scores, uint32_t cuts) {
  uint32_t halves;
  asm("set.gtu.u32.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(scores), "r"(cuts));
  return halves;
}
template <class T>
constexpr bool kComparesPairs = false;
template <>
constexpr bool kComparesPairs<Half> = true;
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t above(BFloat16, uint32_t scores, uint32_t cuts) {
  uint32_t halves;
  asm("set.gtu.u32.bf16x2 %0, %1, %2;" : "=r"(halves) : "r"(scores), "r"(cuts));
  return halves;
}
template <>
constexpr bool kComparesPairs<BFloat16> = true;
#endif
#endif

// Bits of 16 bytes of scores that are above the cut or NaN. Two-byte scores have those of the even places in the lower
// half, so that a GPU compares two at a time.
template <class T, class S>
__device__ __forceinline__ uint32_t hits_of(const uint4& v, S cut) {
  constexpr int W = kWide<T>;
  uint32_t hits = 0;
#ifdef __CUDA_ARCH__
  if constexpr (kComparesPairs<T>) {
    T narrow;  // exact: the cut is one of the scores
    round_to(cut, &narrow);
    const uint32_t cuts = narrow.bits * 0x10001u, pairs[4] = {v.x, v.y, v.z, v.w};
    for (int j = 0; j < 4; ++j) hits |= above(T{}, pairs[j], cuts) & 0x10001u << j;
    return hits;
  }
#endif
  T x[W];
  memcpy(x, &v, 16);
  for (int i = 0; i < W; ++i) {
    const int bit = sizeof(T) == 2 ? i / 2 + i % 2 * 16 : i;
    hits |= !(widen(x[i]) <= cut) ? 1u << bit : 0u;
  }
  return hits;
}

// The place in a tile of a bit of a thread's mask.
template <int TEAM, class T>
__device__ __forceinline__ int place_of_bit(int bit) {
  constexpr int W = kWide<T>;
  const int load = sizeof(T) == 2 ? bit % 16 / 4 : bit / W;
  const int within = sizeof(T) == 2 ? bit % 4 * 2 + bit / 16 : bit % W;
  return (load * TEAM + Team<TEAM>::rank()) * W + within;
}

// A pass over every step-th tile of a row by a team. Lists are the same in every run: a scan over the threads gives
// each of them its places.
template <int TEAM, class T>
struct Pass {
  using S = ArithmeticOf<T>;
  using Threads = Team<TEAM>;
  static constexpr int W = kWide<T>, kTile = TEAM * W * kUnroll;

  const Row<T>& row;
  Mask<T>* bits;
  int32_t lead;  // places of the first tile that lie before the row

  __device__ Pass(const Row<T>& row_, Mask<T>* bits_) : row(row_), bits(bits_) {
    lead = row.scores.stride == 1 ? (int32_t)((uintptr_t)row.scores.at % 16 / sizeof(T)) : 0;
  }

  __device__ __forceinline__ Progress start(int first, int step) const {
    return {first, step, (int32_t)((row.scores.n + lead + kTile - 1) / kTile), 0, 0, 0};
  }

  // The class at the first place of a tile, or less.
  __device__ __forceinline__ int64_t first_class(int32_t tile) const { return (int64_t)tile * kTile - lead; }

  // The mask of this thread's scores of a tile.
  __device__ __forceinline__ uint32_t mask_of(int32_t tile) const {
    constexpr int kShift = sizeof(T) == 2 ? 4 : W;
    const Scores<T>& scores = row.scores;
    const S cut = row.cut;
    const int64_t start = first_class(tile);
    const int begin = start < 0 ? (int)-start : 0;  // places [begin, end) of the tile are in the row
    const int end = scores.n - start < kTile ? (int)(scores.n - start) : kTile;
    uint32_t mask = 0;
    if (scores.stride == 1) {
      const T* at = scores.at + start + Threads::rank() * W;
      uint4 v[kUnroll];
      if (begin == 0 && end == kTile) {
        for (int u = 0; u < kUnroll; ++u) v[u] = *(const uint4*)(at + u * TEAM * W);
        for (int u = 0; u < kUnroll; ++u) mask |= hits_of<T>(v[u], cut) << u * kShift;
        return mask;
      }
      bool whole[kUnroll];
      for (int u = 0; u < kUnroll; ++u) {
        const int place = (u * TEAM + Threads::rank()) * W;
        whole[u] = place >= begin && place + W <= end;
        v[u] = whole[u] ? *(const uint4*)(at + u * TEAM * W) : uint4{0, 0, 0, 0};
      }
      for (int u = 0; u < kUnroll; ++u) mask |= whole[u] ? hits_of<T>(v[u], cut) << u * kShift : 0u;
      if (begin == 0 && end % W == 0) return mask;
    }
#pragma unroll 1
    for (int bit = 0; bit < W * kUnroll; bit += 4) {  // of 16 bytes that are not all in the row, or that lie apart
      S x[4];
      for (int j = 0; j < 4; ++j) {
        const int place = place_of_bit<TEAM, T>(bit + j), first = place / W * W;
        const bool is_whole = scores.stride == 1 && first >= begin && first + W <= end;
        x[j] = place >= begin && place < end && !is_whole ? scores[start + place] : -infinity<S>();
      }
      for (int j = 0; j < 4; ++j) mask |= !(x[j] <= cut) ? 1u << (bit + j) : 0u;
    }
    return mask;
  }

  // Reads the masks of the next segment. Each thread reads later only those that it wrote.
  __device__ __forceinline__ void read_segment(Progress& at) const {
    at.segment = at.tile;
    // Short segments of a long row are still in L1 when the list reads their scores again.
    const int slots = TEAM > 32 && at.tiles > kSlots<TEAM> ? kSlots<TEAM> / 4 : kSlots<TEAM>;
#pragma unroll 1
    for (int slot = 0; slot < slots && at.tile < at.tiles; ++slot, at.tile += at.step)
      bits[slot * TEAM + Threads::rank()] = (Mask<T>)mask_of(at.tile);
  }

  // The hits of a segment in the threads before this one; all of them go to `hits`.
  __device__ __forceinline__ int hits_before(const Progress& at, int64_t* scratch, int32_t& hits) const {
    int count = 0;
    int32_t tile = at.segment;
#pragma unroll 1
    for (int slot = 0; slot < kSlots<TEAM> && tile < at.tile; ++slot, tile += at.step)
      count += __popc((uint32_t)bits[slot * TEAM + Threads::rank()]);
    const int up_to = sum_to_lane(count);
    int before = up_to - count;
    if (TEAM == 32) {
      hits = __shfl_sync(kFull, up_to, 31);
      return before;
    }
    Threads::sync();
    if (lane_of() == 31) scratch[Threads::warp()] = up_to;
    Threads::sync();
    hits = 0;
    for (int w = 0; w < Threads::kWarps; ++w) {
      before += w < Threads::warp() ? (int)scratch[w] : 0;
      hits += (int32_t)scratch[w];
    }
    return before;
  }

  // Lists the classes of a segment's hits, `wanted` of them, from the one that is `place` before this thread's first.
  __device__ __forceinline__ void list_hits(const Progress& at, int place, int wanted, Contender<S>* list) const {
    int32_t tile = at.segment;
#pragma unroll 1
    for (int slot = 0; slot < kSlots<TEAM> && tile < at.tile; ++slot, tile += at.step)
      for (uint32_t mask = bits[slot * TEAM + Threads::rank()]; mask; mask &= mask - 1, ++place)
        if (place >= 0 && place < wanted)
          list[place].class_id = (int32_t)(first_class(tile) + place_of_bit<TEAM, T>(first_lane(mask)));
  }
};

// Starts a pass over every step-th tile of a team's row; one thread calls it.
template <int TEAM, class T>
__device__ __forceinline__ void start_pass(const Args& a, State<T>& state, int first, int step) {
  state.progress = Pass<TEAM, T>(state.row, state.bits(a.layout)).start(first, step);
  state.listed.whole = false;
}

// A thread's account of a list: its length, and for the thread's share of it the sum of the distances from the cut and
// whether a score is NaN.
template <class S>
struct Found {
  int32_t n;
  S above_cut;
  bool nan;

  __device__ __forceinline__ void look_at(S score, S cut) { nan |= score != score, above_cut += score - cut; }
};

// Describes a team's list; a barrier of the team has to follow.
template <int TEAM, class S>
__device__ __forceinline__ void publish(const Found<S>& found, bool whole, Listed<S>& listed, int64_t* scratch) {
  const S above_cut = Team<TEAM>::sum(found.above_cut, scratch);
  const bool nan = Team<TEAM>::any(found.nan);
  if (Team<TEAM>::rank() != 0) return;
  listed.n = found.n, listed.above_cut = above_cut / (S)found.n, listed.nan = nan, listed.whole = whole;
}

// Goes on with a pass until the list is full or the row is over; a barrier, too. Scores are read again for the list:
// they are in a cache.
template <int TEAM, class T, class S>
__device__ void collect(const Row<T>& row, Mask<T>* bits, Progress& progress, Listed<S>& listed, int64_t* scratch) {
  using Threads = Team<TEAM>;
  const Pass<TEAM, T> pass(row, bits);
  Progress at = progress;
  const S cut = row.cut;
  Contender<S>* list = listed.at;
  Found<S> found{0, (S)0, false};
  while (found.n < listed.capacity && !at.over()) {
    if (at.taken == at.hits) {
      pass.read_segment(at);
      at.taken = 0;
    }
    const int before = pass.hits_before(at, scratch, at.hits);
    const int left = at.hits - at.taken, room = listed.capacity - found.n, wanted = left < room ? left : room;
    if (!wanted) continue;
    pass.list_hits(at, before - at.taken, wanted, list + found.n);
    at.taken += wanted;
    Threads::sync();
#pragma unroll 1
    for (int i = found.n + Threads::rank(); i < found.n + wanted; i += TEAM) {
      const S score = row.scores[list[i].class_id];
      list[i].score = score;
      found.look_at(score, cut);
    }
    found.n += wanted;
  }
  publish<TEAM>(found, progress.tile < at.step && at.over(), listed, scratch);
  if (Threads::rank() == 0) progress = at;
  Threads::sync();
}

// Whether fewer scores of the row than `wanted` are above -inf.
template <int TEAM, class T>
__device__ bool finite_are_fewer(const Scores<T>& scores, int64_t wanted, int64_t* scratch) {
  int64_t finite = 0;
  for (int64_t start = 0; start < scores.n && finite < wanted; start += 64 * TEAM) {
    int64_t here = 0;
    for (int64_t c = start + Team<TEAM>::rank(); c < scores.n && c < start + 64 * TEAM; c += TEAM)
      here += scores[c] > -infinity<ArithmeticOf<T>>();
    finite += Team<TEAM>::sum(here, scratch);
  }
  return finite < wanted;
}

}  // namespace
}  // namespace topk_fast
