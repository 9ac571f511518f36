// The contenders of a row: the classes above its cut, which get draws of their own, from one pass over its scores.
//
// A team reads a row in tiles, some loads of 16 bytes in flight in each thread. A thread turns its scores of a tile
// into one mask, and a warp asks for the places of all its hits in the list at a time: no warp waits for another one.
// The order of a list depends on the order of the warps, and no result does. A list that is full is drawn for before
// the pass goes on (search.h), so any number of contenders is right. With few long rows several blocks collect a row,
// each every parts-th tile (kernels.cu).
#pragma once

#include "cut.h"

namespace topk_fast {
namespace {

template <class T>
constexpr int kWide = 16 / sizeof(T);  // scores of a load
template <class T>
constexpr int kLoads = sizeof(T) == 8 ? 4 : 8;  // in flight in each thread, as many as its registers allow

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

// The hits among a thread's scores of a tile, a bit each.
template <class T>
using Mask = std::conditional_t<sizeof(T) == 2, uint64_t, uint32_t>;

__device__ __forceinline__ int count_of(uint32_t mask) { return __popc(mask); }
__device__ __forceinline__ int count_of(uint64_t mask) { return __popcll(mask); }
__device__ __forceinline__ unsigned first_of(uint32_t mask) { return (unsigned)__ffs((int)mask) - 1; }
__device__ __forceinline__ unsigned first_of(uint64_t mask) { return (unsigned)__ffsll((int64_t)mask) - 1; }

// The hits of one of a thread's loads, at their bits of its mask.
template <class T>
__device__ __forceinline__ Mask<T> mask_of_load(uint32_t hits, int load) {
  return (Mask<T>)hits << (sizeof(T) == 2 ? load / 4 * 32 + load % 4 * 4 : load * kWide<T>);
}

// The place of a bit of a thread's mask in its tile, after the thread's first one.
template <class Threads, class T>
__device__ __forceinline__ int place_of_bit(unsigned bit) {
  constexpr unsigned W = kWide<T>;
  const unsigned load = sizeof(T) == 2 ? bit / 32 * 4 + bit % 16 / 4 : bit / W;
  const unsigned within = sizeof(T) == 2 ? bit % 4 * 2 + bit / 16 % 2 : bit % W;
  return (int)(load * Threads::kSize * W + within);
}

// The tiles of a row, as a thread of a team reads them.
template <class Threads, class T>
struct Tiles {
  using S = ArithmeticOf<T>;
  static constexpr int W = kWide<T>, kTile = Threads::kSize * W * kLoads<T>;

  const Scores<T>& scores;
  S cut;
  int32_t lead;    // places of the first tile that lie before the row
  int32_t n;       // tiles
  int32_t n_full;  // without a last one that is not all in the row; 0 where scores lie apart
  int32_t first;   // this thread's first class of the first tile, or less

  __device__ explicit Tiles(const Row<T>& row) : scores(row.scores), cut(row.cut) {
    const bool is_dense = scores.stride == 1;
    lead = is_dense ? (int32_t)((uintptr_t)scores.start() % 16 / sizeof(T)) : 0;
    n = (int32_t)((scores.n + lead + kTile - 1) / kTile);
    n_full = is_dense ? (int32_t)((scores.n + lead) / kTile) : 0;
    first = Threads::rank() * W - lead;
  }

  // The class of a bit of this thread's mask of a tile.
  __device__ __forceinline__ int32_t class_of(int32_t tile, unsigned bit) const {
    return tile * kTile + first + place_of_bit<Threads, T>(bit);
  }

  // The mask of this thread's scores of a tile.
  __device__ __forceinline__ Mask<T> mask_of(int32_t tile) const {
    if (tile >= n_full || (tile == 0 && lead)) return mask_of_part(tile);
    const T* at = scores.start() + (first + (int64_t)tile * kTile);
    uint4 v[kLoads<T>];
    for (int u = 0; u < kLoads<T>; ++u) v[u] = *(const uint4*)(at + u * Threads::kSize * W);
    Mask<T> mask = 0;
    for (int u = 0; u < kLoads<T>; ++u) mask |= mask_of_load<T>(hits_of<T>(v[u], cut), u);
    return mask;
  }

 private:
  // The same for a tile that is not all in the row, or whose scores lie apart.
  __device__ Mask<T> mask_of_part(int32_t tile) const {
    const int64_t start = (int64_t)tile * kTile - lead;
    const int begin = start < 0 ? (int)-start : 0;  // places [begin, end) of the tile are in the row
    const int end = scores.n - start < kTile ? (int)(scores.n - start) : kTile;
    Mask<T> mask = 0;
    if (scores.stride == 1) {
      uint4 v[kLoads<T>];
      bool whole[kLoads<T>];
      for (int u = 0; u < kLoads<T>; ++u) {
        const int place = (u * Threads::kSize + Threads::rank()) * W;
        whole[u] = place >= begin && place + W <= end;
        v[u] = whole[u] ? *(const uint4*)(scores.start() + start + place) : uint4{0, 0, 0, 0};
      }
      for (int u = 0; u < kLoads<T>; ++u) mask |= mask_of_load<T>(whole[u] ? hits_of<T>(v[u], cut) : 0, u);
      if (begin == 0 && end % W == 0) return mask;
    }
#pragma unroll 1
    for (int bit = 0; bit < W * kLoads<T>; bit += 4) {  // of 16 bytes that are not all in the row, or that lie apart
      S x[4];
      for (int j = 0; j < 4; ++j) {
        const int place = Threads::rank() * W + place_of_bit<Threads, T>((unsigned)(bit + j)), vector = place / W * W;
        const bool is_whole = scores.stride == 1 && vector >= begin && vector + W <= end;
        x[j] = place >= begin && place < end && !is_whole ? scores[start + place] : -infinity<S>();
      }
      for (int j = 0; j < 4; ++j) mask |= (Mask<T>)!(x[j] <= cut) << (bit + j);
    }
    return mask;
  }
};

// Starts a pass over every step-th tile of a team's row; one thread calls it, and a barrier has to follow.
template <class T>
__device__ __forceinline__ void start_pass(State<T>& state, int first, int step) {
  for (Progress& warp : state.progress) warp = {first, 0};
  state.step = step;
  state.listed.found = 0, state.listed.whole = false;
}

// A thread's share of what a team knows of its list.
template <class S>
struct Found {
  S above_cut;
  bool nan;

  __device__ __forceinline__ void look_at(S score, S cut) { nan |= score != score, above_cut += score - cut; }
};

// Ends a list with what each thread found; a barrier, too.
template <class Threads, class S>
__device__ __forceinline__ void end_list(const Found<S>& found, Listed<S>& listed) {
  const S above_cut = Warp::sum(found.above_cut);
  if (lane_of() == 0) listed.above_cut[Threads::warp()] = above_cut;
  if (found.nan) listed.nan = true;
  Threads::sync();
}

// Adds the next contenders of a pass to the list, until it is full or the row is over; a barrier, too.
template <class Threads, class T>
__device__ void collect(State<T>& state) {
  using S = ArithmeticOf<T>;
  const Tiles<Threads, T> tiles(state.row);
  auto& listed = state.listed;
  Found<S> found{(S)0, false};
  Progress at = state.progress[Threads::warp()];
#pragma unroll 1
  for (bool full = false; at.tile < tiles.n && !full;) {
    Mask<T> mask = tiles.mask_of(at.tile);
    const int hits = sum_of_lanes(count_of(mask)) - at.taken;
    int start = 0;
    if (hits && lane_of() == 0) start = atomicAdd(&listed.found, hits);
    start = __shfl_sync(kFull, start, 0);
    const int room = listed.capacity > start ? listed.capacity - start : 0, wanted = hits < room ? hits : room;
    Contender<S>* list = listed.at + start;
#pragma unroll 1
    for (int before = -at.taken; before < wanted;) {  // a hit of each lane that has any left
      const unsigned lanes = __ballot_sync(kFull, mask != 0);
      const int place = before + __popc(lanes & lanes_before());
      if (mask && place >= 0 && place < wanted) list[place].class_id = tiles.class_of(at.tile, first_of(mask));
      mask &= mask - 1;
      before += __popc(lanes);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane_of(); i < wanted; i += 32) {
      const S score = tiles.scores[list[i].class_id];  // it is in a cache
      list[i].score = score;
      found.look_at(score, tiles.cut);
    }
    full = wanted < hits;
    at = full ? Progress{at.tile, at.taken + wanted} : Progress{at.tile + state.step, 0};
  }
  if (lane_of() == 0) state.progress[Threads::warp()] = at;
  end_list<Threads>(found, listed);
}

// Whether fewer scores of the row than `wanted` are above -inf.
template <class Threads, class T>
__device__ bool finite_are_fewer(const Scores<T>& scores, int64_t wanted, int64_t* scratch) {
  int64_t finite = 0;
  for (int64_t start = 0; start < scores.n && finite < wanted; start += 64 * Threads::kSize) {
    int64_t here = 0;
    for (int64_t c = start + Threads::rank(); c < scores.n && c < start + 64 * Threads::kSize; c += Threads::kSize)
      here += scores[c] > -infinity<ArithmeticOf<T>>();
    finite += Threads::sum(here, scratch);
  }
  return finite < wanted;
}

}  // namespace
}  // namespace topk_fast
