// The CUDA ops on the LibTorch stable ABI, and the Python module _C_cuda, whose import registers them.
//
// Kernels and launchers: topk_cuda.cu, which knows nothing of torch. Launches go to the current stream of the scores'
// device and wait for nothing. What is checked here keeps memory safe; users' errors: topk_fast/functional.py.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <tuple>

#include "stable_tensor.h"
#include "topk_cuda.h"

namespace topk_fast {
namespace {

ScoreType score_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, "scores must be float32, float64, bfloat16 or float16");
  }
}

// The device of a tensor, made current while this lives.
struct On {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  explicit On(const Tensor& x) : index(x.get_device_index()), guard(x.get_device_index()) {
    STD_TORCH_CHECK(x.is_cuda(), "scores must be on a CUDA device");
  }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return topk_fast::empty(sizes, dtype, aoti_torch_device_type_cuda(), index);
  }
  void* stream() const {
    void* out;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &out));
    return out;
  }
};

void check_launch(int error) { STD_TORCH_CHECK(error == 0, "topk_fast: CUDA error ", error, " at a launch"); }

CudaSearch request(const On& on, const Tensor& scores, const Tensor& seed, int64_t k, double epsilon, int64_t n_sample,
                   bool dense, Mode mode) {
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0 && scores.size(1) < (int64_t(1) << 31),
                  "scores must be [N, L]");
  STD_TORCH_CHECK(seed.dim() == 0 && seed.scalar_type() == ScalarType::Long && seed.is_cuda() &&
                      seed.get_device_index() == on.index,
                  "seed must be int64 on the scores' device");
  STD_TORCH_CHECK(k >= 1 && k < (int64_t(1) << 31) && n_sample >= 1, "k and n_sample must be positive");
  CudaSearch p{};
  p.scores = scores.const_data_ptr(), p.dtype = score_type(scores.scalar_type()), p.mode = mode;
  p.n_rows = scores.size(0), p.n_classes = scores.size(1);
  p.row_stride = scores.stride(0), p.class_stride = scores.stride(1);
  p.seed = (const int64_t*)seed.const_data_ptr();
  p.k = k, p.n_sample = n_sample, p.epsilon = epsilon, p.dense = dense, p.scale = 1.0;
  p.n_processors = topk_cuda_processors(on.index);
  return p;
}

void run(const On& on, CudaSearch& p, const Tensor& values, const Tensor& classes) {
  p.values = values.mutable_data_ptr(), p.classes = (int64_t*)classes.mutable_data_ptr();
  const Tensor workspace = on.empty({topk_cuda_workspace(&p)}, ScalarType::Char);
  p.workspace = workspace.mutable_data_ptr();
  check_launch(topk_cuda_search(&p, on.stream()));
}

std::tuple<Tensor, Tensor> candidates(const Tensor& scores, const Tensor& seed, int64_t k, double epsilon,
                                      int64_t n_sample, int64_t first_row, int64_t first_class, bool dense) {
  const On on(scores);
  CudaSearch p = request(on, scores, seed, k, epsilon, n_sample, dense, kCandidates);
  p.first_row = first_row, p.first_class = first_class;
  Tensor values = on.empty({p.n_rows, n_sample, k}, arithmetic(scores.scalar_type()));
  Tensor classes = on.empty({p.n_rows, n_sample, k}, ScalarType::Long);
  run(on, p, values, classes);
  return {values, classes};
}

std::tuple<Tensor, Tensor> smoothed(const Tensor& scores, const Tensor& seed, int64_t k, double epsilon,
                                    int64_t n_sample, bool dense) {
  const On on(scores);
  CudaSearch p = request(on, scores, seed, k, epsilon, n_sample, dense, kSmoothed);
  Tensor top = on.empty({p.n_rows}, arithmetic(scores.scalar_type()));
  Tensor classes = on.empty({p.n_rows, n_sample}, ScalarType::Long);
  run(on, p, top, classes);
  return {top, classes};
}

std::tuple<Tensor, Tensor, Tensor> loss(const Tensor& scores, const Tensor& target_,
                                        const std::optional<Tensor>& margins_, const Tensor& seed, int64_t k,
                                        double epsilon, int64_t n_sample, double scale, int64_t ignore_index,
                                        bool dense) {
  const On on(scores);
  CudaSearch p = request(on, scores, seed, k, epsilon, n_sample, dense, kLoss);
  const ScalarType type = arithmetic(scores.scalar_type());
  const Tensor target = packed(target_);
  STD_TORCH_CHECK(
      target.dim() == 1 && target.size(0) == p.n_rows && target.scalar_type() == ScalarType::Long && target.is_cuda(),
      "target must be int64 [N] on the scores' device");
  std::optional<Tensor> margins;
  if (margins_) {
    margins = packed(*margins_);
    STD_TORCH_CHECK(
        margins->dim() == 1 && margins->size(0) == p.n_classes && margins->scalar_type() == type && margins->is_cuda(),
        "margins must be [L] of the arithmetic's dtype on the scores' device");
    p.margins = margins->const_data_ptr();
  }
  Tensor losses = on.empty({p.n_rows}, type), n_valid = on.empty({}, type);
  Tensor classes = on.empty({p.n_rows, n_sample}, ScalarType::Long);
  p.target = (const int64_t*)target.const_data_ptr(), p.ignore_index = ignore_index, p.scale = scale;
  p.n_valid = n_valid.mutable_data_ptr();
  run(on, p, losses, classes);
  return {losses, classes, n_valid};
}

Tensor gradient(const Tensor& grad, const Tensor& result_, const Tensor& classes_, const std::optional<Tensor>& target_,
                double scale, int64_t first_class, int64_t n_classes, ScalarType dtype) {
  const On on(grad);
  const Tensor result = packed(result_), classes = packed(classes_);
  const ScalarType type = arithmetic(dtype);
  CudaGradient g{};
  g.n_rows = classes.size(0), g.n_sample = classes.size(1), g.n_classes = n_classes, g.first_class = first_class;
  STD_TORCH_CHECK(classes.dim() == 2 && classes.scalar_type() == ScalarType::Long && grad.dim() == 1 &&
                      grad.size(0) == g.n_rows && grad.scalar_type() == type && result.dim() == 1 &&
                      result.size(0) == g.n_rows && result.scalar_type() == type && classes.is_cuda() &&
                      result.is_cuda(),
                  "grad and result must be [N] of the arithmetic's dtype, classes int64 [N, n_sample], all on CUDA");
  STD_TORCH_CHECK(first_class >= 0 && n_classes >= 0, "first_class and n_classes must not be negative");
  std::optional<Tensor> target;
  if (target_) {
    target = packed(*target_);
    STD_TORCH_CHECK(target->dim() == 1 && target->size(0) == g.n_rows && target->scalar_type() == ScalarType::Long &&
                        target->is_cuda(),
                    "target must be int64 [N]");
    g.target = (const int64_t*)target->const_data_ptr();
  }
  Tensor out = on.empty({g.n_rows, n_classes}, dtype);
  g.grad = grad.const_data_ptr(), g.grad_stride = grad.stride(0), g.result = result.const_data_ptr();
  g.classes = (const int64_t*)classes.const_data_ptr(), g.scale = scale, g.dtype = score_type(dtype);
  g.out = out.mutable_data_ptr();
  if (g.n_rows && n_classes) check_launch(topk_cuda_gradient(&g, on.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(topk_fast, CUDA, m) {
  m.impl("candidates", TORCH_BOX(&candidates));
  m.impl("smoothed", TORCH_BOX(&smoothed));
  m.impl("loss", TORCH_BOX(&loss));
  m.impl("gradient", TORCH_BOX(&gradient));
}

}  // namespace topk_fast

namespace {

PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(TOPK_FAST_CUDA_ARCHITECTURES); }

PyMethodDef methods[] = {
    {"architectures", architectures, METH_NOARGS, "The GPU architectures that the kernels are compiled for."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C_cuda",
                          "The CUDA kernels; importing it registers them.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&definition); }
