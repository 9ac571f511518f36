// The choice of the instruction set: the one place that asks the processor for its features.
#include <atomic>
#include <cstring>

#include "kernel.h"

namespace topk_fast {

#define TOPK_FAST_DECLARE(isa)                                              \
  namespace isa {                                                           \
  void search(const Job& job, int64_t begin, int64_t end, void* workspace); \
  void finish(const Job& job);                                              \
  }
TOPK_FAST_DECLARE(baseline)
#if defined(__x86_64__)
TOPK_FAST_DECLARE(avx2)
TOPK_FAST_DECLARE(avx512)
#endif

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> list = [] {
    std::vector<Kernel> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back({"avx512", avx512::search, avx512::finish});
    if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", avx2::search, avx2::finish});
#endif
    found.push_back({"baseline", baseline::search, baseline::finish});
    return found;
  }();
  return list;
}

namespace {
std::atomic<const Kernel*> chosen{nullptr};  // any thread may choose
}

const Kernel& chosen_kernel() {
  const Kernel* kernel = chosen;
  return kernel ? *kernel : kernels().front();
}

bool choose_kernel(const char* name) {
  for (const Kernel& kernel : kernels())
    if (!std::strcmp(kernel.name, name)) {
      chosen = &kernel;
      return true;
    }
  return false;
}

}  // namespace topk_fast
