// A kernel of which test_model.py knows how often each line is executed; it finds the lines by their last words.
struct Args {
  const float* in;
  float* out;
  int n;
};

__device__ __forceinline__ float halved(float x) {
  return __shfl_xor_sync(0xffffffffu, x, 1);  // in a function that is inlined twice
}

__global__ void counted(const Args a) {
  __shared__ float kept[128];
  const int lane = threadIdx.x % 32;
  float x = a.in[threadIdx.x * 8];  // strided load
#pragma unroll 1
  for (int i = 0; i < a.n; ++i) x = __shfl_xor_sync(0xffffffffu, x, 1) + 1.0f;  // loop
#pragma unroll
  for (int i = 1; i < 32; i *= 2) x += __shfl_xor_sync(0xffffffffu, x, i);  // unrolled
  kept[threadIdx.x * 2] = x;                                                // shared store
  __syncthreads();                                                          // barrier
  volatile float* out = a.out;
  if (lane < 8)
    out[threadIdx.x] = kept[threadIdx.x * 2 ^ 64];  // taken
  else
    out[threadIdx.x] = x / a.in[1];  // not taken
#pragma unroll 1
  for (int i = 0; i < lane % 7; ++i) out[64 + threadIdx.x] = (float)i;  // lanes' own loop
  x = halved(x);                                                        // first
  out[128 + threadIdx.x] = halved(x + 1.0f);                            // second
}

// Quotients and roots, whose slow ways are functions that are called.
__global__ void divided(const Args a) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= a.n) return;
  a.out[i] = a.in[i] / a.in[a.n + i];
  a.out[a.n + i] = __fsqrt_rn(a.in[i]);
}

// Pairs of halves: masks of those that are larger or unordered, and the larger ones of two types.
__global__ void packed(const Args a) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned x = __float_as_uint(a.in[i]), y = __float_as_uint(a.in[a.n + i]);
  unsigned mask, half, bfloat16;
  asm("set.gtu.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(x), "r"(y));
  asm("max.f16x2 %0, %1, %2;" : "=r"(half) : "r"(x), "r"(y));
  asm("max.bf16x2 %0, %1, %2;" : "=r"(bfloat16) : "r"(x), "r"(y));
  a.out[i] = __uint_as_float(mask);
  a.out[a.n + i] = __uint_as_float(half);
  a.out[2 * a.n + i] = __uint_as_float(bfloat16);
}
