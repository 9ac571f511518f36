// The launches of the CUDA kernels as C functions, so that only binding.cpp includes torch's headers.
//
// A workspace is 16-byte aligned, a stream is a cudaStream_t, and an error a cudaError_t. Nothing waits for a device.
#pragma once

#include "../request.h"

namespace topk_fast {

// What a layout depends on.
struct Gpu {
  int32_t processors;     // multiprocessors
  int32_t shared_memory;  // bytes of each of them
  int64_t cache;          // bytes of L2; 0: unknown
  bool has_slow_memory;   // so that the rows at work had better stay in L2
};

}  // namespace topk_fast

extern "C" topk_fast::Gpu topk_cuda_gpu(int device);
extern "C" int64_t topk_cuda_workspace(const topk_fast::Search* search, const topk_fast::Gpu* gpu);  // bytes
extern "C" int topk_cuda_search(const topk_fast::Search* search, const topk_fast::Gpu* gpu, void* workspace,
                                void* stream);
extern "C" int topk_cuda_link(const topk_fast::Link* link, void* stream);
extern "C" int topk_cuda_gradient(const topk_fast::Gradient* gradient, void* stream);
extern "C" const char* topk_cuda_message(int error);
