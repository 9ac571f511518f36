#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,prefer-vector-width=512")
#define TOPK_FAST_AVX512  // g++ reads all of a file before the pragma defines __AVX512F__
#define TOPK_FAST_ISA avx512
#include "search.h"
#endif
