// The CUDA ops on the LibTorch stable ABI, ops.h over a CUDA device, and the Python module _C_cuda, which registers
// them.
//
// Launches go to the current stream of the scores' device, and nothing waits for them.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../ops.h"
#include "launch.h"

namespace topk_fast {
namespace {

void check_launch(int error) { STD_TORCH_CHECK(error == 0, "topk_fast: a launch failed: ", topk_cuda_message(error)); }

// The device of a tensor, current while this lives.
struct Cuda {
  static constexpr bool kReduces = true;  // the launch of the link adds the rows' losses up

  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;

  explicit Cuda(const Tensor& x) : index(index_of(x)), guard(index) {}
  static int32_t index_of(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "scores, or a gradient's classes, must be on a CUDA device");
    return x.get_device_index();
  }
  bool holds(const Tensor& x) const { return x.is_cuda() && x.get_device_index() == index; }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return topk_fast::empty(sizes, dtype, aoti_torch_device_type_cuda(), index);
  }
  Tensor readable(const Tensor& x) const { return x; }  // whatever its strides are
  void* stream() const {
    void* out;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &out));
    return out;
  }

  void search(const Search& p) const {
    const Gpu gpu = topk_cuda_gpu(index);
    const Tensor workspace = empty({topk_cuda_workspace(&p, &gpu)}, ScalarType::Char);
    check_launch(topk_cuda_search(&p, &gpu, workspace.mutable_data_ptr(), stream()));
  }
  void link(const Link& p) const { check_launch(topk_cuda_link(&p, stream())); }
  void gradient(const Gradient& g) const { check_launch(topk_cuda_gradient(&g, stream())); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(topk_fast, CUDA, m) {
  m.impl("candidates_cuda", TORCH_BOX(&Ops<Cuda>::candidates));
  m.impl("excess_cuda", TORCH_BOX(&Ops<Cuda>::excess));
  m.impl("gradient_cuda", TORCH_BOX(&Ops<Cuda>::gradient));
  m.impl("link_cuda", TORCH_BOX(&Ops<Cuda>::link));
  m.impl("linked_gradient_cuda", TORCH_BOX(&Ops<Cuda>::linked_gradient));
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

PyMODINIT_FUNC PyInit__C_cuda() {
  PyObject* module = PyModule_Create(&definition);
#if defined(Py_GIL_DISABLED)  // a free-threaded Python
  if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  return module;
}
