// What the CUDA kernels are asked: plain structs and C functions, so that only the binding knows torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "noise.h"

namespace topk_fast {

enum ScoreType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum Mode : int32_t { kCandidates, kSmoothed, kLoss };

struct CudaSearch {
  const void* scores;  // [n_rows, n_classes] of `dtype`
  int64_t n_rows, n_classes, row_stride, class_stride;
  const int64_t* target;  // kLoss: [n_rows]
  const void* margins;    // kLoss: [n_classes] of the arithmetic's type, or null
  const int64_t* seed;    // one number, on the device
  int64_t ignore_index, first_row, first_class, k, n_sample;
  double epsilon, scale;
  ScoreType dtype;
  Mode mode;
  int32_t dense;
  int32_t n_processors;  // multiprocessors of the device
  void* values;          // kCandidates: [n_rows, n_sample, k]; else [n_rows]; of the arithmetic's type
  int64_t* classes;      // kCandidates: [n_rows, n_sample, k]; else [n_rows, n_sample]
  void* n_valid;         // kLoss: how many rows are not ignored
  void* workspace;       // topk_cuda_workspace bytes, 16-byte aligned
};

struct CudaGradient {
  const void* grad;    // [n_rows] with a stride, of the arithmetic's type
  const void* result;  // [n_rows]: the losses, or smoothed values
  const int64_t* classes;
  const int64_t* target;  // or null
  int64_t grad_stride, n_rows, n_sample, first_class, n_classes;
  double scale;
  ScoreType dtype;
  void* out;  // [n_rows, n_classes] of `dtype`, 16-byte aligned
};

}  // namespace topk_fast

// Multiprocessors of a device; bytes of workspace; launches on a stream (a cudaStream_t), which return a cudaError_t.
extern "C" int topk_cuda_processors(int device);
extern "C" int64_t topk_cuda_workspace(const topk_fast::CudaSearch* search);
extern "C" int topk_cuda_search(const topk_fast::CudaSearch* search, void* stream);
extern "C" int topk_cuda_gradient(const topk_fast::CudaGradient* gradient, void* stream);
