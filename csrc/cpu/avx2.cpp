#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>  // its functions name their own targets

#include "kernel.h"
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define TOPK_FAST_AVX2  // g++ reads all of a file before the pragma defines __AVX2__
#define TOPK_FAST_ISA avx2
#include "search.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
