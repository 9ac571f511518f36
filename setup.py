"""Builds topk_fast._C, the CPU kernels, and topk_fast._C_cuda, the CUDA kernels, where torch is a CUDA build.

The two are built apart: when one cannot be built, the reason goes to stderr and the rest is installed. With
TOPK_FAST_BUILD=require it is an error; TOPK_FAST_BUILD=cpu requires the CPU kernels and leaves out the CUDA ones. Both
use the stable ABIs of LibTorch and of Python, so that one binary serves every torch from 2.11 on and every Python from
3.10 on.
"""

import os
import sys
import sysconfig
from glob import glob

from setuptools import setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # pip builds without it
import find_cuda  # noqa: E402

BUILD = os.environ.get("TOPK_FAST_BUILD")
# A free-threaded Python has no limited API of version 3.10: its binaries and wheels are for its own version.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
# Of g++ and clang++. One rounding an operation on every machine (csrc/noise.h): no contraction, no -march=native. The
# threads are torch's, so that no flag of OpenMP is needed, which Apple's clang++ lacks.
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-fno-fast-math",  # that CFLAGS may have
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-unused-parameter",  # in torch's headers
    # g++ 12 sees it in its own intrinsics. Both compilers ignore names that they do not know, once clang++ is told to.
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-warning-option",
]


def warn(reason):
    if BUILD in ("require", "cpu"):
        raise SystemExit(f"topk_fast: TOPK_FAST_BUILD={BUILD}, but {reason}")
    print(f"topk_fast: {reason}. The installation goes on without these kernels", file=sys.stderr)


def make_extensions(torch):
    """The extension modules to build, with the flags and folders of each."""
    if sys.platform == "win32":  # not tried: MSVC has neither the vector types of simd.h nor these flags
        warn("the C++ kernels need the vector types of g++ and clang++, which MSVC does not have")
        return []
    from torch.utils import cpp_extension

    common = dict(
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        depends=sorted(glob("csrc/*.h") + glob("csrc/*/*.h")),
        py_limited_api=LIMITED_API,
    )
    cuda = ["csrc/cuda/kernels.cu", "csrc/cuda/binding.cpp"]
    cpp = ["csrc/testing.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    here = os.path.abspath("csrc")
    extensions = [
        cpp_extension.CppExtension("topk_fast._C", cpp, include_dirs=[here], extra_compile_args=FLAGS, **common)
    ]
    if not torch.version.cuda or BUILD == "cpu":  # a CPU build, or ROCm's, which Triton serves
        return extensions
    try:
        nvcc = find_cuda.find_nvcc()
        root, version = find_cuda.find_toolkit(nvcc)
        find_cuda.check_versions(nvcc, version, torch)
        cudart = find_cuda.find_cudart(root, version, torch)
        architectures = find_cuda.choose_architectures(version, torch)
    except find_cuda.Unavailable as reason:
        warn(f"the CUDA kernels cannot be built: {reason}")
        return extensions
    cpp_extension.CUDA_HOME = str(root)
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    common["define_macros"] = [*common["define_macros"], ("USE_CUDA", None)]
    compile_args = {
        "cxx": [*FLAGS, f'-DTOPK_FAST_CUDA_ARCHITECTURES="{architectures}"'],
        "nvcc": ["-O3", "-std=c++17", "--fmad=false", "--threads=0"],  # architectures side by side
    }
    extension = cpp_extension.CUDAExtension(
        "topk_fast._C_cuda",
        cuda,
        include_dirs=[here],
        extra_compile_args=compile_args,
        extra_link_args=[cudart],
        **common,
    )
    extension.libraries.remove("cudart")  # found by its path instead
    return [*extensions, extension]


def configure():
    """What setuptools needs to build the extensions, or nothing where torch is missing."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        warn(f"torch cannot be imported here: {error}. Install torch first and pass --no-build-isolation")
        return {}

    class Build(BuildExtension):
        def run(self):
            """Each extension in a run of its own: torch checks nvcc before it compiles anything at all."""
            extensions, compiler, inplace, built = self.extensions, self.compiler, self.inplace, []
            for extension in extensions:
                self.extensions, self.compiler, self.inplace = [extension], compiler, inplace
                try:
                    super().run()
                    built.append(extension)
                    for other in (
                        glob(f"{extension.name.replace('.', '/')}.cpython-*.so") if inplace and LIMITED_API else ()
                    ):
                        os.remove(other)  # Python would prefer a binary of its own version to this one
                except (Exception, SystemExit) as error:  # setuptools and ninja raise a dozen kinds
                    warn(f"the build of {extension.name} failed: {error}")
            self.extensions = built

    return {
        "ext_modules": make_extensions(torch),
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
    }


if __name__ == "__main__":
    setup(**configure())
