// CUDA's execution model on the CPU, for tests: each thread of a block is a fiber that runs until it has to wait.
//
// Fibers switch at __syncthreads, __syncwarp and the *_sync intrinsics alone, in an order drawn from a seed; so a
// missing barrier shows as a wrong result for some seed, and these are reported: a barrier that not all threads reach,
// lanes of a mask that left or wait elsewhere, a mask without its caller. There is no memory model: a device decides on
// fences. Kernels are compiled as C++ with this header included first, launched by TOPK_FAST_LAUNCH; dynamic shared
// memory lies on the heap with its exact size, so that a sanitizer sees the end of it.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

namespace simt {

enum class Wait { kNone, kBlock, kSync, kBallot, kShuffle, kShuffleUp, kShuffleXor, kDone };

struct Context {
  ucontext_t start;
  jmp_buf here;
  bool started = false;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  unsigned thread;
  Wait wait = Wait::kNone;
  unsigned mask = 0;
  uint64_t posted = 0, seen[32] = {};
};

inline std::string& error() {
  static std::string text;
  return text;
}
inline std::mt19937_64& order() {
  static std::mt19937_64 generator(0);
  return generator;
}

struct Block {
  dim3 index, size, grid;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  Context scheduler;
  std::unique_ptr<char[]> shared;
  const std::function<void()>* body = nullptr;
};
inline Block*& block() {
  static Block* current = nullptr;
  return current;
}

inline void fail(const std::string& what) {
  if (error().empty()) error() = what + ", block " + std::to_string(block()->index.x);
}

// Leaves one context for another. swapcontext, which asks the kernel for the signal mask each time, is needed under a
// sanitizer, which follows it; a jump asks nobody.
__attribute__((noinline)) inline void switch_to(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&from.start, &to.start);
#else
  from.started = true;
  if (_setjmp(from.here)) return;
  if (to.started) _longjmp(to.here, 1);
  setcontext(&to.start);
#endif
}

// Waits for the others; returns early, and for good, once an error was found.
inline void yield(Wait wait, unsigned mask = 0, uint64_t posted = 0) {
  Fiber* self = block()->running;
  self->wait = wait, self->mask = mask, self->posted = posted;
  switch_to(self->context, block()->scheduler);
}

inline Fiber& collective(Wait wait, unsigned mask, uint64_t value) {
  Fiber* self = block()->running;
  if (!(mask >> (self->thread % 32) & 1)) fail("a lane calls with a mask that leaves it out");
  yield(wait, mask, value);
  return *self;
}

inline void enter() {
  (*block()->body)();
  Fiber* self = block()->running;
  self->wait = Wait::kDone;
  switch_to(self->context, block()->scheduler);
}

// Lets go whoever waited for the last to come.
inline void release(Block& b) {
  bool all = true;
  for (Fiber& f : b.fibers) all &= f.wait == Wait::kBlock;
  if (all)
    for (Fiber& f : b.fibers) f.wait = Wait::kNone;
  for (size_t start = 0; start < b.fibers.size(); start += 32) {
    const size_t lanes = std::min<size_t>(32, b.fibers.size() - start);
    Fiber* warp = &b.fibers[start];
    for (size_t i = 0; i < lanes; ++i) {
      if (warp[i].wait <= Wait::kBlock || warp[i].wait == Wait::kDone) continue;
      const unsigned mask = warp[i].mask;
      bool ready = true;
      for (size_t j = 0; j < 32; ++j)
        if (mask >> j & 1) ready &= j < lanes && warp[j].wait == warp[i].wait && warp[j].mask == mask;
      if (!ready) continue;
      const Wait wait = warp[i].wait;
      for (size_t j = 0; j < lanes; ++j)
        if (mask >> j & 1) {
          for (size_t l = 0; l < lanes; ++l) warp[j].seen[l] = warp[l].posted;
        }
      for (size_t j = 0; j < lanes; ++j)
        if (mask >> j & 1 && warp[j].wait == wait) warp[j].wait = Wait::kNone;
    }
  }
}

inline void run_block(dim3 index, dim3 grid, dim3 size, size_t shared, const std::function<void()>& body) {
  Block b;
  b.index = index, b.grid = grid, b.size = size, b.body = &body;
  b.shared.reset(new char[shared + 1]);
  memset(b.shared.get(), 0xA5, shared);  // nobody may count on zeros
  block() = &b;
  b.fibers.resize(size.x);
  constexpr size_t kStack = 64 << 10;  // which AddressSanitizer clears at each switch
  for (unsigned t = 0; t < size.x; ++t) {
    Fiber& f = b.fibers[t];
    f.thread = t, f.stack.reset(new char[kStack]);
    ucontext_t& start = f.context.start;
    getcontext(&start);
    start.uc_stack.ss_sp = f.stack.get(), start.uc_stack.ss_size = kStack, start.uc_link = nullptr;
    makecontext(&start, enter, 0);
  }
  for (;;) {
    std::vector<Fiber*> able;
    bool over = true;
    for (Fiber& f : b.fibers) {
      if (f.wait == Wait::kNone) able.push_back(&f);
      over &= f.wait == Wait::kDone;
    }
    if (over || !error().empty()) break;
    if (able.empty()) {
      fail("threads wait for others that will not come: a divergent barrier or a wrong mask");
      break;
    }
    // A round: some warps, drawn by lot, run on, their threads in any order; so a warp can be far ahead of another.
    const uint64_t lots = order()();
    std::vector<Fiber*> chosen;
    for (Fiber* f : able)
      if (lots >> (f->thread / 32) & 1) chosen.push_back(f);
    if (chosen.empty()) chosen = able;
    std::shuffle(chosen.begin(), chosen.end(), order());
    for (Fiber* next : chosen) {
      b.running = next;
      switch_to(b.scheduler, next->context);
      if (!error().empty()) break;
    }
    release(b);
  }
  block() = nullptr;
}

template <class F>
void launch(unsigned grid, unsigned size, size_t shared, const F& body) {
  const std::function<void()> call = body;
  for (unsigned i = 0; i < grid && error().empty(); ++i) run_block({i}, {grid}, {size}, shared, call);
}

template <class T>
uint64_t bits(T x) {
  uint64_t b = 0;
  memcpy(&b, &x, sizeof x);
  return b;
}
template <class T>
T from_bits(uint64_t b) {
  T x;
  memcpy(&x, &b, sizeof x);
  return x;
}

struct Index {
  unsigned x;
};
inline Index thread() { return {block()->running->thread}; }

}  // namespace simt

#define threadIdx simt::thread()
#define blockIdx simt::block()->index
#define blockDim simt::block()->size
#define gridDim simt::block()->grid
#define TOPK_FAST_SHARED(name) char* name = simt::block()->shared.get()
#ifndef TOPK_FAST_LAUNCH  // benchmarks/model has its own
#define TOPK_FAST_LAUNCH(kernel, grid, size, shared, stream, ...) \
  simt::launch(grid, size, shared, [=] { kernel(__VA_ARGS__); })
#endif
#define TOPK_FAST_STOP(message) simt::fail(message)

inline void __syncthreads() { simt::yield(simt::Wait::kBlock); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::collective(simt::Wait::kSync, mask, 0); }
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  simt::Fiber& f = simt::collective(simt::Wait::kBallot, mask, predicate);
  unsigned found = 0;
  for (int i = 0; i < 32; ++i) found |= (mask >> i & 1 && f.seen[i]) ? 1u << i : 0u;
  return found;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return simt::from_bits<T>(simt::collective(simt::Wait::kShuffle, mask, simt::bits(x)).seen[lane & 31]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by) {
  simt::Fiber& f = simt::collective(simt::Wait::kShuffleUp, mask, simt::bits(x));
  const unsigned lane = f.thread % 32;
  return lane < by ? x : simt::from_bits<T>(f.seen[lane - by]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int by) {
  simt::Fiber& f = simt::collective(simt::Wait::kShuffleXor, mask, simt::bits(x));
  return simt::from_bits<T>(f.seen[(f.thread % 32) ^ by]);
}
inline int atomicAdd(int* at, int x) {
  const int before = *at;
  *at += x;
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

extern "C" inline __attribute__((used)) const char* simt_error() { return simt::error().c_str(); }
extern "C" inline __attribute__((used)) void simt_start(uint64_t seed) {
  simt::order().seed(seed), simt::error().clear();
}
