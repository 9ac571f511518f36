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
