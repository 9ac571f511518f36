#if defined(__x86_64__)
#pragma GCC target("avx2,f16c")
#define TOPK_FAST_ISA avx2
#include "topk_cpu_kernel.h"
#endif
