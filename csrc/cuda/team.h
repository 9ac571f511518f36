// What all CUDA kernels share: dtypes and their rounding, integer keys of floats, teams of threads and their
// reductions.
#pragma once

#include "../topk_cuda.h"

#ifndef TOPK_FAST_LAUNCH  // tests/kernels/simt.h has its own
#include <cuda_runtime.h>
#define TOPK_FAST_LAUNCH(kernel, grid, size, shared, stream, ...) kernel<<<grid, size, shared, stream>>>(__VA_ARGS__)
#define TOPK_FAST_SHARED(name)                    \
  extern __shared__ __align__(16) char name##_[]; \
  char* name = name##_
#endif

namespace topk_fast {
namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kBlock = 128;  // threads of a block: one team, or four of a warp

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return Scalar::as_float((int32_t)((uint32_t)x.bits << 16)); }
__device__ __forceinline__ float widen(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  _Float16 h;
  memcpy(&h, &x, 2);
  return (float)h;
#endif
}

__device__ __forceinline__ void round_to(float x, float* out) { *out = x; }
__device__ __forceinline__ void round_to(double x, double* out) { *out = x; }
__device__ __forceinline__ void round_to(float x, BFloat16* out) {
  const uint32_t b = (uint32_t)Scalar::as_int(x);
  out->bits = (uint16_t)((x == x ? b + 0x7FFF + (b >> 16 & 1) : 0x7FC00000u) >> 16);
}
__device__ __forceinline__ void round_to(float x, Half* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const _Float16 h = (_Float16)x;
  memcpy(out, &h, 2);
#endif
}

template <class S>
__device__ __forceinline__ S infinity() {
  return (S)__builtin_inf();
}

// Integers in the order of floats; -0 equals +0. Nothing but NaN lies below that of -inf.
__device__ __forceinline__ int32_t ordered(float x) {
  const int32_t b = Scalar::as_int(x + 0.0f);
  return b ^ ((b >> 31) & 0x7FFFFFFF);
}
__device__ __forceinline__ int64_t ordered(double x) {
  int64_t b;
  x += 0.0;
  memcpy(&b, &x, 8);
  return b ^ ((b >> 63) & 0x7FFFFFFFFFFFFFFF);
}
__device__ __forceinline__ float unordered(int32_t o) { return Scalar::as_float(o ^ ((o >> 31) & 0x7FFFFFFF)); }
__device__ __forceinline__ double unordered(int64_t o) {
  o ^= (o >> 63) & 0x7FFFFFFFFFFFFFFF;
  double x;
  memcpy(&x, &o, 8);
  return x;
}

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
  // Combines one value of each thread; all get the result. `scratch` holds a value a warp.
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

}  // namespace
}  // namespace topk_fast
