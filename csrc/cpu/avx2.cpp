#if defined(__x86_64__)
#pragma GCC target("avx2,f16c")
#define TOPK_FAST_AVX2  // g++ reads all of a file before the pragma defines __AVX2__
#define TOPK_FAST_ISA avx2
#include "search.h"
#endif
