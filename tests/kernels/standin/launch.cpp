// Registration and launches of kernels, and the limits of a launch.
#include <cxxabi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <unordered_map>

#include "emulation.h"
#include "standin.h"

namespace standin {

struct Kernel {
  const char* mangled;
  size_t most_shared = kSharedPerBlock;
};

// By the address of the host's stub. torch has tens of thousands.
static std::unordered_map<const void*, Kernel>& kernels() {
  static std::unordered_map<const void*, Kernel> all;
  return all;
}

static bool is_ours(const Kernel& kernel) { return strstr(kernel.mangled, "topk_fast"); }

static std::string name_of(const Kernel& kernel) {
  char* text = abi::__cxa_demangle(kernel.mangled, nullptr, nullptr, nullptr);
  const std::string name = text ? text : kernel.mangled;
  free(text);
  return is_ours(kernel) ? readable(name) : name.substr(0, 300);
}

static cudaError_t check(const Kernel& kernel, const cudaLaunchConfig_t& launch) {
  const dim3 grid = launch.gridDim, block = launch.blockDim;
  const bool some = grid.x && grid.y && grid.z && block.x && block.y && block.z;
  if (!some || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || (uint64_t)block.x * block.y * block.z > 1024)
    return cudaErrorInvalidConfiguration;
  if (launch.dynamicSmemBytes > kernel.most_shared) return cudaErrorInvalidValue;
  return check_stream(launch.stream);
}

static void execute(const std::string& name, const Emulation& emulation) {
  const std::string error = emulation.run();
  if (error.empty()) return;
  fprintf(stderr, "stand-in: %s: %s\n", name.c_str(), error.c_str());
  set_fault(cudaErrorAssert);
}

static cudaError_t launch(const void* stub, const cudaLaunchConfig_t& shape, void** arguments) {
  const auto found = kernels().find(stub);
  if (found == kernels().end()) return remember(cudaErrorInvalidDeviceFunction);
  const Kernel& kernel = found->second;
  const std::string name = name_of(kernel);
  const cudaError_t error = check(kernel, shape);
  const dim3 grid = shape.gridDim, block = shape.blockDim;
  log("what=launch\tdevice=%d\tstream=%d\tcaptured=%d\tgrid=%u,%u,%u\tblock=%u,%u,%u\tshared=%zu\terror=%d\tours=%d\t"
      "kernel=%s",
      current_device(), number_of(shape.stream), is_capturing(shape.stream), grid.x, grid.y, grid.z, block.x, block.y,
      block.z, shape.dynamicSmemBytes, (int)error, is_ours(kernel), name.c_str());
  if (error) return remember(error);
  Emulation emulation;
  if (is_ours(kernel) && executes()) {
    const bool flat = grid.y * grid.z * block.y * block.z == 1;
    if (flat) emulation = emulation_of(name, grid.x, block.x, shape.dynamicSmemBytes, arguments[0]);
    if (!emulation.run) {
      fprintf(stderr, "stand-in: %s has no emulation; add it to standin/kernels.cpp\n", name.c_str());
      return remember(cudaErrorInvalidDeviceFunction);
    }
  }
  submit(shape.stream, [=] {
    if (emulation.run) execute(name, emulation);
  });
  return cudaSuccess;
}

static cudaLaunchConfig_t shape_of(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  cudaLaunchConfig_t shape{};
  shape.gridDim = grid, shape.blockDim = block, shape.dynamicSmemBytes = shared, shape.stream = stream;
  return shape;
}

static thread_local cudaLaunchConfig_t pushed;  // by <<<>>>, for the stub

}  // namespace standin

using namespace standin;

// What nvcc's code calls before main, and in <<<>>>

EXPORTED void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
EXPORTED void __cudaRegisterFatBinaryEnd(void**) {}
EXPORTED void __cudaUnregisterFatBinary(void**) {}
EXPORTED void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORTED void __cudaRegisterFunction(void**, const char* stub, char*, const char* mangled, int, void*, void*, void*,
                                     void*, int*) {
  std::lock_guard<std::mutex> lock(mutex());
  kernels()[stub] = {mangled};
}
EXPORTED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = shape_of(grid, block, shared, stream);
  return 0;
}
EXPORTED cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.gridDim, *block = pushed.blockDim, *shared = pushed.dynamicSmemBytes;
  return answer((cudaStream_t*)stream, pushed.stream);
}
EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  return answer(kernel, (cudaKernel_t)stub);
}
EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t stream) {
  return launch(kernel, shape_of(grid, block, shared, stream), arguments);
}

EXPORTED cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared,
                                      cudaStream_t stream) {
  return launch(stub, shape_of(grid, block, shared, stream), arguments);
}
EXPORTED cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* shape, const void* stub, void** arguments) {
  return launch(stub, *shape, arguments);
}

EXPORTED cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024, out->numRegs = 64, out->maxDynamicSharedSizeBytes = kSharedPerBlock;
  out->binaryVersion = out->ptxVersion = 10 * kCapability;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  const auto found = kernels().find(stub);
  if (found == kernels().end()) return remember(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // a hint
  if (value < 0 || (size_t)value > kSharedOptIn) return remember(cudaErrorInvalidValue);
  return answer(&found->second.most_shared, (size_t)value);
}
EXPORTED cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int size,
                                                                            size_t shared, unsigned) {
  const int by_threads = std::min(kThreadsPerProcessor / size, kBlocksPerProcessor);
  return answer(blocks, std::min(by_threads, (int)(kSharedPerProcessor / (shared + kSharedReserved))));
}
EXPORTED cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub, int size,
                                                                   size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, size, shared, 0);
}
