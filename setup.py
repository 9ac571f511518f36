"""Builds topk_fast._C, the C++ kernels; without a compiler the package installs with its PyTorch backend alone."""

import os
import sys
from glob import glob

from setuptools import setup

REQUIRED = os.environ.get("TOPK_FAST_BUILD") == "require"


def warn(reason):
    if REQUIRED:
        raise SystemExit(f"topk_fast: TOPK_FAST_BUILD=require, but {reason}")
    print(f"topk_fast: no C++ kernels ({reason}); installing the PyTorch backend alone", file=sys.stderr)


def native():
    """The extension module and the command that builds it, or nothing where torch is missing."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        warn(f"torch cannot be imported here: {error}. Install torch first and pass --no-build-isolation")
        return {}

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:  # setuptools and ninja raise a dozen kinds
                warn(f"the build failed: {error}")

    extension = CppExtension(
        "topk_fast._C",
        sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.h")),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        # One rounding an operation on every machine (csrc/noise.h): no contraction, no -march=native.
        extra_compile_args=["-O3", "-std=c++17", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno",
                            "-fno-trapping-math", "-fvisibility=hidden",
                            # g++ 12 sees both in headers that are not ours (its own intrinsics, torch)
                            "-Wno-maybe-uninitialized", "-Wno-unused-parameter"],
    )  # fmt: skip
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**native())
