// What both bindings need of LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <initializer_list>
#include <string>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.11 and 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// What torch said of its last error; torch has it from 2.13 on, and a weak symbol is null before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace topk_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "[2, 3]"
template <class Sizes>
std::string shape_string(const Sizes& sizes) {
  std::string shape;
  for (int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  return "[" + shape + "]";
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, int32_t device_type, int32_t device_index) {
  int64_t strides[3] = {}, step = 1;
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = step, step *= sizes.begin()[i];
  AtenTensorHandle handle;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  if (aoti_torch_empty_strided((int64_t)sizes.size(), sizes.begin(), strides, type, device_type, device_index,
                               &handle) != AOTI_TORCH_SUCCESS)
    STD_TORCH_CHECK(false, "topk_fast: a tensor of shape ", shape_string(sizes), " cannot be allocated: ",
                    torch_exception_get_what_without_backtrace
                        ? torch_exception_get_what_without_backtrace()
                        : "out of memory, or an earlier error of its device, of which torch writes to stderr");
  return Tensor(handle);
}

inline Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline ScalarType arithmetic(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

}  // namespace topk_fast
