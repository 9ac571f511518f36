"""Builds topk_fast._C, the C++ kernels, and topk_fast._C_cuda where torch has CUDA and nvcc is found.

Without a compiler the package installs with its PyTorch backend alone.
"""

import os
import sys
from glob import glob

from setuptools import setup

REQUIRED = os.environ.get("TOPK_FAST_BUILD") == "require"


def warn(reason):
    if REQUIRED:
        raise SystemExit(f"topk_fast: TOPK_FAST_BUILD=require, but {reason}")
    print(f"topk_fast: {reason}; installing without it, the PyTorch backend needs no kernels", file=sys.stderr)


def native():
    """The extension module and the command that builds it, or nothing where torch is missing."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        warn(f"torch cannot be imported here: {error}. Install torch first and pass --no-build-isolation")
        return {}

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:  # setuptools and ninja raise a dozen kinds
                warn(f"the build failed: {error}")

        def build_extension(self, ext):  # one that fails leaves the other
            try:
                super().build_extension(ext)
            except (Exception, SystemExit) as error:
                warn(f"the build of {ext.name} failed: {error}")

    common = dict(
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        depends=sorted(glob("csrc/*.h") + glob("csrc/cuda/*.h")),
        optional=not REQUIRED,
    )
    # One rounding an operation on every machine (csrc/noise.h): no contraction, no -march=native.
    flags = ["-O3", "-std=c++17", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
             "-fvisibility=hidden",
             # g++ 12 sees both in headers that are not ours (its own intrinsics, torch)
             "-Wno-maybe-uninitialized", "-Wno-unused-parameter"]  # fmt: skip
    cuda = ["csrc/topk_cuda.cu", "csrc/topk_cuda_binding.cpp"]
    cpp = sorted(set(glob("csrc/*.cpp")) - set(cuda))
    extensions = [CppExtension("topk_fast._C", cpp, extra_compile_args=flags, **common)]
    if torch.version.cuda and not CUDA_HOME:
        print("topk_fast: no nvcc, so no CUDA kernels; Triton's serve CUDA tensors", file=sys.stderr)
    if torch.version.cuda and CUDA_HOME:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        common["define_macros"] = [*common["define_macros"], ("USE_CUDA", None)]
        nvcc = ["-O3", "-std=c++17", "--fmad=false"]
        extensions.append(
            CUDAExtension("topk_fast._C_cuda", cuda, extra_compile_args={"cxx": flags, "nvcc": nvcc}, **common)
        )
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


setup(**native())
