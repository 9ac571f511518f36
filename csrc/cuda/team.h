// Teams of threads that work on a row, their reductions, and what the emulation in tests/kernels/simt.h replaces.
#pragma once

#include "../scalar.h"
#include "launch.h"

#ifndef TOPK_FAST_LAUNCH  // tests/kernels/simt.h has its own
#include <cuda_runtime.h>
#define TOPK_FAST_LAUNCH(kernel, grid, size, shared, stream, ...) kernel<<<grid, size, shared, stream>>>(__VA_ARGS__)
#define TOPK_FAST_SHARED(name)                    \
  extern __shared__ __align__(16) char name##_[]; \
  char* name = name##_
// Prints the message and stops the device, whatever NDEBUG is.
#define TOPK_FAST_STOP(message) __assert_fail(message, __FILE__, __LINE__, __func__)
#endif

namespace topk_fast {
namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kBlock = 128;  // threads of a block: one team, or four of a warp

template <class T>
using ArithmeticOf = typename Arithmetic<T>::type;

template <int TEAM>
struct Team {
  static __device__ __forceinline__ int rank() { return (int)(threadIdx.x % TEAM); }
  static __device__ __forceinline__ int lane() { return (int)(threadIdx.x % 32); }
  static __device__ __forceinline__ int warp() { return (int)(threadIdx.x % TEAM / 32); }
  static __device__ __forceinline__ void sync() {
    if (TEAM == 32)
      __syncwarp();
    else
      __syncthreads();
  }
  // Combines one value of each thread; all threads get the result. `scratch` holds a value for each warp.
  template <class V, class F>
  static __device__ __forceinline__ V reduce(V v, int64_t* scratch, F combine) {
    for (int by = 16; by > 0; by /= 2) v = combine(v, __shfl_xor_sync(kFull, v, by));
    if (TEAM == 32) return v;
    sync();
    if (lane() == 0) scratch[warp()] = (int64_t)v;
    sync();
    v = (V)scratch[0];
    for (int w = 1; w < TEAM / 32; ++w) v = combine(v, (V)scratch[w]);
    return v;
  }
};

template <class V>
struct Sum {
  __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};
template <class V>
struct Most {
  __device__ __forceinline__ V operator()(V a, V b) const { return a > b ? a : b; }
};
template <class V>
struct Least {
  __device__ __forceinline__ V operator()(V a, V b) const { return a < b ? a : b; }
};

// The most of a warp's numbers.
template <class V>
__device__ __forceinline__ V most_of_lanes(V v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(V) == 4) return __reduce_max_sync(kFull, v);
#endif
  for (int by = 16; by > 0; by /= 2) v = Most<V>()(v, __shfl_xor_sync(kFull, v, by));
  return v;
}

// The sum of v over the lanes up to this one.
template <class V>
__device__ __forceinline__ V sum_to_lane(V v) {
  for (unsigned by = 1; by < 32; by *= 2) {
    const V below = __shfl_up_sync(kFull, v, by);
    if (threadIdx.x % 32 >= by) v += below;
  }
  return v;
}

// The lanes before this one, as a mask.
__device__ __forceinline__ unsigned lanes_before() { return (1u << threadIdx.x % 32) - 1; }

}  // namespace
}  // namespace topk_fast
