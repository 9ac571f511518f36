#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>  // its functions name their own targets

#include "kernel.h"
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,prefer-vector-width=512")
#endif
#define TOPK_FAST_AVX512  // g++ reads all of a file before the pragma defines __AVX512F__
#define TOPK_FAST_ISA avx512
#include "search.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
