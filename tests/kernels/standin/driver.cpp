// What torch takes from the driver, libcuda.so.1, whose name this library has.
#include <dlfcn.h>
#include <stdio.h>

#include "standin.h"

namespace standin {

constexpr int kNotSupported = 801;  // CUDA_ERROR_NOT_SUPPORTED

// Stands for functions that torch looks up, and that nothing here is meant to call.
static int absent() {
  fprintf(stderr, "stand-in: a function of the driver was called that driver.cpp lacks\n");
  return kNotSupported;
}

}  // namespace standin

using namespace standin;

#define ABSENT(name) \
  EXPORTED int name() { return absent(); }
ABSENT(cuCtxSetCurrent)
ABSENT(cuDeviceGetAttribute)
ABSENT(cuDevicePrimaryCtxRetain)
ABSENT(cuFuncGetAttribute)
ABSENT(cuFuncSetAttribute)
ABSENT(cuFuncSetCacheConfig)
ABSENT(cuLaunchCooperativeKernel)
ABSENT(cuLaunchKernel)
ABSENT(cuLinkAddData_v2)
ABSENT(cuLinkComplete)
ABSENT(cuLinkCreate_v2)
ABSENT(cuModuleGetFunction)
ABSENT(cuModuleLoad)
ABSENT(cuModuleLoadData)
ABSENT(cuModuleLoadDataEx)
ABSENT(cuModuleUnload)
ABSENT(cuOccupancyMaxActiveBlocksPerMultiprocessor)
ABSENT(cuPointerGetAttribute)
ABSENT(cuTensorMapEncodeTiled)

EXPORTED int cuDeviceGet(int* device, int index) { return answer(device, index); }
EXPORTED int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  return answer(active, 1);
}
EXPORTED int cuCtxGetCurrent(void** context) {
  static int one;
  return answer(context, (void*)&one);
}
EXPORTED int cuGetErrorString(int, const char** text) { return answer(text, "an error of the stand-in's driver"); }

EXPORTED cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                      cudaDriverEntryPointQueryResult* result) {
  void* found = dlsym(RTLD_DEFAULT, name);
  if (result) *result = cudaDriverEntryPointSuccess;
  return answer(function, found ? found : (void*)absent);
}
