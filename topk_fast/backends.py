"""The backends: which of them are there, why one is not, and which one runs a call.

"cpp" and "cuda" are compiled (``csrc``); importing their modules registers their kernels. "triton" is imported at its
first call, and "torch" is ``reference.py``.
"""

import functools
import importlib
import importlib.util
import os
import re
import sys
import warnings
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import noise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: its kernels run in Python, on the CPU

NAMES = ("cpp", "cuda", "triton", "torch")
_FASTEST_FIRST = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}  # HIP's tensors have the device type "cuda" too
_BUILD = "`pip install --no-build-isolation .` (or `python setup.py build_ext --inplace` in a checkout)"
_BINARIES = {  # the module, its language, and what its build needs
    "cpp": ("_C", "C++", "install a C++ compiler, then run"),
    "cuda": ("_C_cuda", "CUDA", "install a CUDA build of torch and nvcc, then run"),
}

# What the Triton kernels search at most: lists of the k best live in registers, and starts of blocks in int32.
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_LARGEST_K = 128
_TRITON_LARGEST_L = 2**31 - 2**17


def _why_not_loaded(backend: str, error: Exception) -> str:
    """Why the import of a backend's module raised ``error``, and the remedy."""
    module, language, needs = _BINARIES[backend]
    if not isinstance(error, ModuleNotFoundError) or error.name != f"{__package__}.{module}":
        return (
            f"the {language} kernels do not load ({error}): they were built for another torch or Python, or a library "
            f"that they need is gone; to build them again, {needs} {_BUILD}"
        )
    if others := sorted(path.name for path in Path(__file__).parent.glob(f"{module}.*")):
        return (
            f"the {language} kernels were built for another Python than {sys.implementation.cache_tag} "
            f"({', '.join(others)}); to build them for this one, {needs} {_BUILD}"
        )
    return f"the {language} kernels are not built; {needs} {_BUILD}"


_MODULES, _ABSENT = {}, {}  # by backend: the compiled module, or why there is none
for _backend, (_module, _, _) in _BINARIES.items():
    try:
        _MODULES[_backend] = importlib.import_module(f"{__package__}.{_module}")
    except Exception as _error:  # whatever a broken binary raises: the other backends still work
        _ABSENT[_backend] = _why_not_loaded(_backend, _error)
HAS_TRITON = importlib.util.find_spec("triton") is not None
if not HAS_TRITON:
    _ABSENT["triton"] = "Triton is not installed; run `pip install triton`"


def _called_while_tracing(function):
    """torch.compile calls the function while it traces, and takes its result as a constant.

    As `torch.compiler.assume_constant_result`, which would import torch._dynamo, and Triton with it, at every import.
    """
    function._dynamo_marked_constant = True
    return function


def available_backends(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that can run on such a ``device`` here, the one that "auto" takes first.

    On a CPU where the C++ kernels are built they are ``["cpp", "torch"]``. "cuda" is listed for the GPUs for which its
    kernels were built. Whether there is such a device is not asked.

    Args:
        device: a device or its name, such as ``"cuda:1"``.

    Returns:
        List of "cpp", "cuda", "triton" and "torch", or of some of them.

    Example:
        >>> from topk_fast import available_backends
        >>> "torch" in available_backends("cpu")
        True
    """
    device = torch.device(device)
    names = [name for name in _FASTEST_FIRST.get(device.type, ()) if _why_absent(name, device) is None]
    return names + ["torch"] + ["triton"] * (HAS_TRITON and INTERPRETED and device.type == "cpu")


def build_info() -> dict:
    """Facts for a bug report: versions, and for each backend "available" or why it is not, with the remedy.

    * ``torch``, ``triton``, ``contract``: the versions of torch, of Triton (None where it is not installed), and of the
      noise contract.
    * ``backends``: for each name "available", or why the backend is not available and what to do; "cuda" is reported
      for the current GPU, where there is one.
    * ``compiler``, ``instruction_sets``: those of the C++ kernels; None and an empty list without them.
    * ``cuda_architectures``: the TORCH_CUDA_ARCH_LIST for which the CUDA kernels were built, or None.

    Returns:
        A dict with these keys.

    Example:
        >>> from topk_fast import build_info
        >>> sorted(build_info())
        ['backends', 'compiler', 'contract', 'cuda_architectures', 'instruction_sets', 'torch', 'triton']
        >>> build_info()["backends"]["torch"]
        'available'
    """
    cpp, cuda = _MODULES.get("cpp"), _MODULES.get("cuda")
    packages = packages_distributions().get("triton") if HAS_TRITON else None  # ROCm's has another name
    return {
        "torch": torch.__version__,
        "triton": version(packages[0]) if packages else None,
        "contract": noise.VERSION,
        "backends": {name: _why_absent(name, torch.device("cuda")) or "available" for name in NAMES},
        "compiler": cpp.compiler() if cpp else None,
        "instruction_sets": cpp.isas() if cpp else [],
        "cuda_architectures": cuda.architectures() if cuda else None,
    }


def check_name(backend: str) -> None:
    if backend not in ("auto", "torch", "cpp", "cuda", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch', 'cpp', 'cuda' or 'triton', got {backend!r}")


def resolve(backend: str, input: Tensor, k: int) -> str:
    """The name of the backend that runs: ``backend`` itself, or for "auto" the fastest one that can search this input.

    Where "auto" is left with the slow reference, a warning says why, once for each reason in a process. There is none
    for tensors without data (meta and fake ones).

    Raises:
        ValueError: there is no such backend, or it does not take this input.
        RuntimeError: the backend is not available.
    """
    if backend == "torch":
        return backend
    device = input.device
    if backend != "auto":
        check_name(backend)
        if absent := _why_absent(backend, device):
            raise RuntimeError(f"backend {backend!r} is not available: {absent}")
        if unfit := _why_unfit(backend, input, k):
            raise ValueError(f"backend {backend!r} {unfit[0]}, got {unfit[1]}")
        return backend
    reasons = []
    for name in _FASTEST_FIRST.get(device.type, ()):
        if absent := _why_absent(name, device):
            reasons.append(f"Backend {name!r} is not available: {absent}.")
        elif unfit := _why_unfit(name, input, k):
            reasons.append(f"Backend {name!r} {unfit[0]}.")
        else:
            return name
    if device.type != "meta" and not isinstance(input, FakeTensor):
        said = " ".join(reasons) or (
            "There are kernels for CPU, CUDA and HIP tensors only: pass input.cpu() and target.cpu() to run those of "
            "the CPU, through which gradients come back to the input's device."
        )
        _warn_once(
            f"backend='auto' runs the PyTorch reference on this {device.type} input, which is many times slower than "
            f"the compiled kernels. {said} Pass backend='torch' to choose the reference without this warning."
        )
    return "torch"


@_called_while_tracing  # for it cannot trace the cache
def _why_absent(backend: str, device: torch.device) -> str | None:
    """Why a backend is not available here, with the remedy, or None; for "cuda" also why not on this device."""
    if backend != "cuda" or device.type != "cuda" or backend in _ABSENT:
        return _ABSENT.get(backend)
    index = torch.cuda.current_device() if device.index is None and torch.cuda.is_available() else device.index
    return _why_uncovered(index or 0)


@functools.cache
def _why_uncovered(index: int) -> str | None:
    """Why the CUDA kernels do not run on a GPU that is there, or None."""
    if index >= torch.cuda.device_count():  # the device of fake tensors: nothing runs there
        return None
    capability, built = torch.cuda.get_device_capability(index), _MODULES["cuda"].architectures()
    if is_covered(capability, built):
        return None
    wanted = "{}.{}".format(*capability)
    return (
        f"the CUDA kernels are built for {built}, and cuda:{index} has compute capability {wanted}; to build them for "
        f'it, set TORCH_CUDA_ARCH_LIST="{wanted};{built}" and run {_BUILD}'
    )


def is_covered(capability: tuple[int, int], architectures: str) -> bool:
    """Whether kernels built for ``architectures``, a TORCH_CUDA_ARCH_LIST, run on a GPU of this compute capability.

    Machine code for X.Y runs on X.Z with Z >= Y, and the PTX of X.Y+PTX on every capability from X.Y on. What is built
    for a suffix, such as 9.0a, runs on that capability only. A name, such as "native", counts as covering every GPU,
    since only the build knew its meaning; CUDA itself raises where it does not.
    """
    for entry in architectures.replace(";", " ").split():
        found = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", entry)
        if found is None:
            return True
        built = int(found[1]), int(found[2])
        if capability == built or not found[3] and capability > built and (found[4] or capability[0] == built[0]):
            return True
    return False


def _why_unfit(backend: str, input: Tensor, k: int) -> tuple[str, object] | None:
    """What a backend takes and what came, where it cannot search this input, or None."""
    kind = input.device.type
    if backend != "triton":
        takes = "cpu" if backend == "cpp" else "cuda"
        return None if kind == takes else (f"runs on {takes.upper()} tensors", f"input on {input.device}")
    if kind != "cuda" and not (INTERPRETED and kind == "cpu"):
        return (
            "runs on CUDA and HIP tensors (with TRITON_INTERPRET=1 in the environment on CPU tensors too, for "
            "debugging)",
            f"input on {input.device}",
        )
    if input.dtype not in _TRITON_DTYPES:
        return "takes float32, bfloat16 or float16 input", input.dtype
    if k > _TRITON_LARGEST_K:
        return f"searches for up to {_TRITON_LARGEST_K} scores (K + 1 for the losses)", k
    if input.shape[1] > _TRITON_LARGEST_L:
        return f"takes up to {_TRITON_LARGEST_L} classes", input.shape[1]
    return None


_WARNINGS: set[str] = set()  # those given in this process


@_called_while_tracing
def _warn_once(text: str) -> None:
    """Warns at the caller's line: the nearest one outside this package and torch."""
    if text in _WARNINGS:
        return
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in (__package__, "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
    _WARNINGS.add(text)  # at last: where a filter makes it an error, every call raises
