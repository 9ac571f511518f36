#define TOPK_FAST_ISA baseline
#include "topk_cpu_kernel.h"
