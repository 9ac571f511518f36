// Memory of the devices, which the host's pages back once they are touched, and copies.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>

#include "standin.h"

namespace standin {

struct Region {
  size_t bytes;
  int device;  // -1: pinned memory of the host
};

static std::map<const char*, Region>& regions() {
  static std::map<const char*, Region> all;
  return all;
}

static size_t used_by(int device) {
  size_t bytes = 0;
  for (const auto& one : regions()) bytes += one.second.device == device ? one.second.bytes : 0;
  return bytes;
}

static cudaError_t allocate(void** to, size_t bytes, int owner) {
  log("what=malloc\tdevice=%d\tbytes=%zu", owner, bytes);
  std::lock_guard<std::mutex> lock(mutex());
  if (owner >= 0 && used_by(owner) + bytes > kMemory) return remember(cudaErrorMemoryAllocation);
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return remember(cudaErrorMemoryAllocation);
  if (bytes <= 64 << 20) memset(at, 0xAB, bytes);  // nobody may count on zeros
  regions()[(const char*)at] = {bytes, owner};
  return answer(to, at);
}

static cudaError_t release(void* at) {
  if (!at) return cudaSuccess;
  log("what=free");
  std::lock_guard<std::mutex> lock(mutex());
  const auto found = regions().find((const char*)at);
  if (found == regions().end()) return remember(cudaErrorInvalidValue);
  munmap(at, found->second.bytes);
  regions().erase(found);
  return cudaSuccess;
}

// The region that an address lies in, or null.
static const Region* region_of(const void* at) {
  auto next = regions().upper_bound((const char*)at);
  if (next == regions().begin()) return nullptr;
  --next;
  return (const char*)at < next->first + next->second.bytes ? &next->second : nullptr;
}

static const char* name_of(cudaMemcpyKind kind) {
  const char* names[] = {"host to host", "host to device", "device to host", "device to device", "default"};
  return names[(int)kind];
}

static cudaError_t copy(void* to, const void* from, size_t bytes, const char* kind, cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream)) return remember(error);
  log("what=copy\tdevice=%d\tstream=%d\tcaptured=%d\tkind=%s\tbytes=%zu", current_device(), number_of(stream),
      is_capturing(stream), kind, bytes);
  submit(stream, [=] {
    if (executes()) memmove(to, from, bytes);
  });
  return cudaSuccess;
}

static cudaError_t fill(void* at, int value, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream)) return remember(error);
  log("what=memset\tdevice=%d\tstream=%d\tcaptured=%d\tbytes=%zu", current_device(), number_of(stream),
      is_capturing(stream), bytes);
  submit(stream, [=] {
    if (executes()) memset(at, value, bytes);
  });
  return cudaSuccess;
}

}  // namespace standin

using namespace standin;

EXPORTED cudaError_t cudaMalloc(void** to, size_t bytes) {
  if (const cudaError_t error = check_not_capturing("cudaMalloc")) return error;
  return allocate(to, bytes, current_device());
}
EXPORTED cudaError_t cudaFree(void* at) {
  const cudaError_t error = at ? check_not_capturing("cudaFree") : cudaSuccess;
  return error ? error : release(at);
}
EXPORTED cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) {
  if (const cudaError_t error = check_not_capturing("cudaHostAlloc")) return error;
  return allocate(to, bytes, -1);
}
EXPORTED cudaError_t cudaFreeHost(void* at) { return release(at); }
EXPORTED cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  std::lock_guard<std::mutex> lock(mutex());
  *available = kMemory - used_by(current_device());
  return answer(total, kMemory);
}

EXPORTED cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, n, name_of(kind), stream);
}
EXPORTED cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t stream) {
  return copy(to, from, n, "device to device", stream);
}
EXPORTED cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (const cudaError_t error = check_not_capturing("cudaMemcpy")) return error;
  copy(to, from, bytes, name_of(kind), nullptr);
  return wait_for("copy");
}
EXPORTED cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
  return fill(at, value, bytes, stream);
}
EXPORTED cudaError_t cudaMemset(void* at, int value, size_t bytes) {
  const cudaError_t error = check_not_capturing("cudaMemset");
  return error ? error : fill(at, value, bytes, nullptr);
}

EXPORTED cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* at) {
  std::lock_guard<std::mutex> lock(mutex());
  const Region* region = region_of(at);
  memset(out, 0, sizeof *out);
  out->type = !region ? cudaMemoryTypeUnregistered : region->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  out->device = region ? region->device : cudaInvalidDeviceId;
  out->devicePointer = region ? (void*)at : nullptr;
  out->hostPointer = region && region->device < 0 ? (void*)at : nullptr;
  return cudaSuccess;
}
