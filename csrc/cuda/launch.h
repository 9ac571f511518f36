// The launches of the CUDA kernels as C functions, so that only binding.cpp includes torch's headers.
//
// A workspace is 16-byte aligned, a stream is a cudaStream_t, and an error a cudaError_t. Nothing waits for a device.
#pragma once

#include "../request.h"

extern "C" int topk_cuda_processors(int device);
extern "C" int64_t topk_cuda_workspace(const topk_fast::Search* search, int n_processors);  // bytes
extern "C" int topk_cuda_search(const topk_fast::Search* search, int n_processors, void* workspace, void* stream);
extern "C" int topk_cuda_gradient(const topk_fast::Gradient* gradient, void* stream);
extern "C" const char* topk_cuda_message(int error);
