// The log, errors, and what the stand-in's devices are.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "standin.h"

namespace standin {

static thread_local int device = 0;
static thread_local cudaError_t last_error = cudaSuccess;
static std::atomic<cudaError_t> device_fault{cudaSuccess};

std::mutex& mutex() {
  static std::mutex one;
  return one;
}

int current_device() { return device; }

bool executes() {
  const char* value = getenv("STANDIN_EXECUTE");
  return !value || strcmp(value, "0") != 0;
}

void log(const char* format, ...) {
  static FILE* file = getenv("STANDIN_LOG") ? fopen(getenv("STANDIN_LOG"), "a") : nullptr;
  if (!file) return;
  std::lock_guard<std::mutex> lock(mutex());
  va_list values;
  va_start(values, format);
  vfprintf(file, format, values);
  va_end(values);
  fputc('\n', file);
  fflush(file);
}

cudaError_t remember(cudaError_t error) {
  if (error) last_error = error;
  return error;
}

void set_fault(cudaError_t error) { device_fault = error; }
cudaError_t fault() { return device_fault; }

}  // namespace standin

using namespace standin;

EXPORTED cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORTED cudaError_t cudaPeekAtLastError() { return last_error; }

EXPORTED cudaError_t cudaGetDeviceCount(int* count) { return answer(count, kDevices); }
EXPORTED cudaError_t cudaGetDevice(int* index) { return answer(index, device); }
EXPORTED cudaError_t cudaSetDevice(int index) {
  if (index < 0 || index >= kDevices) return remember(cudaErrorInvalidDevice);
  return answer(&device, index);
}
EXPORTED cudaError_t cudaDriverGetVersion(int* version) { return answer(version, CUDART_VERSION); }
EXPORTED cudaError_t cudaRuntimeGetVersion(int* version) { return answer(version, CUDART_VERSION); }
EXPORTED cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return answer(can, 1); }
EXPORTED cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

EXPORTED cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int index) {
  if (index < 0 || index >= kDevices) return remember(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "H100 (stand-in)");
  p->major = kCapability, p->minor = 0, p->multiProcessorCount = kProcessors, p->warpSize = 32;
  p->totalGlobalMem = kMemory, p->l2CacheSize = (int)kL2;
  p->sharedMemPerBlock = kSharedPerBlock, p->sharedMemPerBlockOptin = kSharedOptIn;
  p->sharedMemPerMultiprocessor = kSharedPerProcessor, p->reservedSharedMemPerBlock = kSharedReserved;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = kThreadsPerProcessor;
  p->maxBlocksPerMultiProcessor = kBlocksPerProcessor;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->memoryBusWidth = 5120, p->unifiedAddressing = 1, p->concurrentKernels = 1, p->pciBusID = 1 + index;
  return cudaSuccess;
}

EXPORTED cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, index)) return error;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = (int)p.reservedSharedMemPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrMemoryPoolsSupported: *value = 0; break;
    default:
      fprintf(stderr, "stand-in: attribute %d of a device has no value; add it to state.cpp\n", (int)attribute);
      return remember(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
