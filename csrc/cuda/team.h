// Teams of threads that work on a row, their reductions, and what the emulation in tests/kernels/simt.h replaces.
#pragma once

#include "../order.h"
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
constexpr int kBlock = 128;  // threads of a block where nothing asks for more

template <class T>
using ArithmeticOf = typename Arithmetic<T>::type;

__device__ __forceinline__ int lane_of() { return (int)(threadIdx.x % 32); }

// The lanes before this one, as a mask.
__device__ __forceinline__ unsigned lanes_before() { return (1u << lane_of()) - 1; }

__device__ __forceinline__ int first_lane(unsigned mask) { return __ffs(mask) - 1; }

// Reductions over a warp; all lanes get the result.

__device__ __forceinline__ int sum_of_lanes(int v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFull, v);
#else
  for (int by = 16; by > 0; by /= 2) v += __shfl_xor_sync(kFull, v, by);
  return v;
#endif
}

template <class V>
__device__ __forceinline__ V most_of_lanes(V v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(V) == 4)
    return __reduce_max_sync(kFull, v);
  else
#endif
    for (int by = 16; by > 0; by /= 2) {
      const V other = __shfl_xor_sync(kFull, v, by);
      v = other > v ? other : v;
    }
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

// A team of threads is a warp or a block.

struct Warp {
  static constexpr int kSize = 32, kWarps = 1;
  static __device__ __forceinline__ int warp() { return 0; }
  static __device__ __forceinline__ int rank() { return lane_of(); }
  static __device__ __forceinline__ void sync() { __syncwarp(); }
  // The sum of a value of each thread, the same in all.
  template <class V>
  static __device__ __forceinline__ V sum(V v, int64_t* = nullptr) {
    for (int by = 16; by > 0; by /= 2) v += __shfl_xor_sync(kFull, v, by);
    return v;
  }
};

template <int SIZE>
struct Block {
  static constexpr int kSize = SIZE, kWarps = SIZE / 32;
  static __device__ __forceinline__ int warp() { return (int)threadIdx.x / 32; }
  static __device__ __forceinline__ int rank() { return (int)threadIdx.x; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  // The sum of a value of each thread, the same in all. `scratch` holds a value for each warp.
  template <class V>
  static __device__ __forceinline__ V sum(V v, int64_t* scratch) {
    v = Warp::sum(v);
    V* of_warps = (V*)scratch;
    sync();
    if (lane_of() == 0) of_warps[warp()] = v;
    sync();
    v = of_warps[0];
    for (int w = 1; w < kWarps; ++w) v += of_warps[w];
    return v;
  }
};

}  // namespace
}  // namespace topk_fast
