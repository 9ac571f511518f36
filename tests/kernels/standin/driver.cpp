// What torch takes from the driver, libcuda.so.1, whose name this library has.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <utility>

#include "standin.h"

namespace standin {

constexpr int kNotSupported = 801;  // CUDA_ERROR_NOT_SUPPORTED

// For functions that torch looks up, and that nothing here is meant to call.
static int say_absent(const char* name) {
  fprintf(stderr, "stand-in: %s of the driver was called; driver.cpp lacks it\n", name);
  return kNotSupported;
}

constexpr size_t kSlots = 128;
static const char* absent_names[kSlots];

template <size_t I>
static int absent() {
  return say_absent(absent_names[I]);
}

template <size_t... I>
static void* absent_at(size_t slot, std::index_sequence<I...>) {
  static int (*const all[])() = {absent<I>...};
  return (void*)all[slot];
}

// A function that says its name when it is called.
static void* absent_function(const char* name) {
  static size_t used = 0;
  if (used == kSlots) return nullptr;
  absent_names[used] = strdup(name);
  return absent_at(used++, std::make_index_sequence<kSlots>());
}

}  // namespace standin

using namespace standin;

#define ABSENT(name) \
  EXPORTED int name() { return say_absent(#name); }
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
EXPORTED int cuLogsRegisterCallback(void*, void*, void*) { return 0; }  // there is nothing to say
EXPORTED int cuLogsUnregisterCallback(void*) { return 0; }
EXPORTED int cuGetErrorString(int, const char** text) { return answer(text, "an error of the stand-in's driver"); }

EXPORTED cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                      cudaDriverEntryPointQueryResult* result) {
  void* found = dlsym(RTLD_DEFAULT, name);
  if (!found) found = absent_function(name);
  if (result) *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return answer(function, found);
}
