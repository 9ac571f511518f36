#define TOPK_FAST_ISA baseline
#include "search.h"
