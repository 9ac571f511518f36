"""The boundary to the backends: schemas, fake kernels, autograd and the choice of a backend.

Every op stands three times in the namespace ``torch.ops.topk_fast``: under its plain name with the compiled kernels
(``csrc``; CPU's are registered when ``_C`` is imported, CUDA's with ``_C_cuda``), with the suffix ``_torch`` with ``reference.py``'s, and with
``_triton`` with ``triton_kernels``', which is imported at its first call.
"""

import importlib
import importlib.util
import os
from contextlib import nullcontext
from importlib.metadata import version

import torch
from torch import Tensor
from torch.autograd import Function

from . import checks, noise, reference

_SCHEMAS = {
    "candidates": "(Tensor scores, Tensor seed, int k, float epsilon, int n_sample, int first_row, int first_class, "
    "bool dense) -> (Tensor, Tensor)",
    "smoothed": "(Tensor scores, Tensor seed, int k, float epsilon, int n_sample, bool dense) -> (Tensor, Tensor)",
    "loss": "(Tensor scores, Tensor target, Tensor? margins, Tensor seed, int k, float epsilon, int n_sample, "
    "float scale, int ignore_index, bool dense) -> (Tensor, Tensor, Tensor)",
    "gradient": "(Tensor grad, Tensor result, Tensor classes, Tensor? target, float scale, int first_class, "
    "SymInt n_classes, ScalarType dtype) -> Tensor",
}


def _fake_candidates(scores, seed, k, epsilon, n_sample, first_row, first_class, dense):
    shape = (scores.shape[0], n_sample, k)
    values = scores.new_empty(shape, dtype=reference.arithmetic(scores.dtype))
    return values, scores.new_empty(shape, dtype=torch.int64)


def _fake_smoothed(scores, seed, k, epsilon, n_sample, dense):
    n = scores.shape[0]
    top = scores.new_empty((n,), dtype=reference.arithmetic(scores.dtype))
    return top, scores.new_empty((n, n_sample), dtype=torch.int64)


def _fake_loss(scores, target, margins, seed, k, epsilon, n_sample, scale, ignore_index, dense):
    losses, classes = _fake_smoothed(scores, seed, k, epsilon, n_sample, dense)
    return losses, classes, losses.new_empty(())


def _fake_gradient(grad, result, classes, target, scale, first_class, n_classes, dtype):
    return grad.new_empty((classes.shape[0], n_classes), dtype=dtype)


HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: its kernels run in Python, on the CPU


def _on_triton(name):
    def run(*args):
        return getattr(importlib.import_module("topk_fast.triton_kernels.launch"), name)(*args)

    return run


SUFFIXES = ("", "_torch", "_triton")
_LIBRARY = torch.library.Library("topk_fast", "DEF")


_OPS = {suffix: {} for suffix in SUFFIXES}


def define(name: str, suffix: str, schema: str, fake, everywhere=None, derivative=None):
    """A new op in the namespace for the backend of a suffix.

    It has a fake kernel and, if given, one kernel for all devices, and (what to keep, backward) for its derivative.
    """
    _LIBRARY.define(name + suffix + schema, tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"topk_fast::{name}{suffix}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if everywhere is not None:
        _LIBRARY.impl(name + suffix, everywhere, "CompositeExplicitAutograd")
    if derivative is not None:
        keep, backward = derivative
        torch.library.register_autograd(qualified, backward, setup_context=keep, lib=_LIBRARY)
    _OPS[suffix][name] = getattr(torch.ops.topk_fast, name + suffix).default


HAS_CPP = importlib.util.find_spec("topk_fast._C") is not None
if HAS_CPP:
    from . import _C  # noqa: F401  registers the CPU kernels

HAS_CUDA = importlib.util.find_spec("topk_fast._C_cuda") is not None
if HAS_CUDA:
    from . import _C_cuda  # noqa: F401  registers the CUDA kernels

_REMEDY = {
    "cpp": "the C++ kernels are not built: install a C++ compiler, then `pip install --no-build-isolation .` "
    "(or `python setup.py build_ext --inplace` in a checkout)",
    "cuda": "the CUDA kernels are not built: with a CUDA build of torch and nvcc, `pip install --no-build-isolation .` "
    "(or `python setup.py build_ext --inplace` in a checkout)",
    "triton": "Triton is not installed: `pip install triton`",
}

# What the Triton kernels search at most: bags live in registers, and starts of blocks in int32.
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_LARGEST_K = 1024
_TRITON_LARGEST_L = 2**31 - 2**17


def available_backends(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that can run on ``device`` here, the one that "auto" takes first.

    >>> "torch" in available_backends("cpu")
    True
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return ["cpp"] * HAS_CPP + ["torch"] + ["triton"] * (HAS_TRITON and INTERPRETED)
    return ["cuda"] * (HAS_CUDA and kind == "cuda") + ["triton"] * (HAS_TRITON and kind == "cuda") + ["torch"]


def build_info() -> dict:
    """Facts for a bug report: versions, which kernels are built and, for the C++ ones, compiler and instruction sets.

    >>> sorted(build_info())
    ['compiler', 'contract', 'cpp', 'cuda', 'instruction_sets', 'torch', 'triton']
    """
    return {
        "torch": torch.__version__,
        "triton": version("triton") if HAS_TRITON else None,
        "contract": noise.VERSION,
        "cpp": HAS_CPP,
        "cuda": HAS_CUDA,
        "compiler": _C.compiler() if HAS_CPP else None,
        "instruction_sets": _C.isas() if HAS_CPP else [],
    }


def _unfit_for_triton(scores: Tensor, k: int) -> str | None:
    """Why the Triton kernels cannot search these scores, or None."""
    if scores.device.type != "cuda" and not (INTERPRETED and scores.device.type == "cpu"):
        return (
            f"runs on CUDA and HIP tensors, got scores on {scores.device} (with TRITON_INTERPRET=1 in the environment "
            "it runs on the CPU too, for debugging)"
        )
    if scores.dtype not in _TRITON_DTYPES:
        return f"takes float32, bfloat16 or float16 scores, got {scores.dtype}"
    if k > _TRITON_LARGEST_K:
        return f"searches for up to {_TRITON_LARGEST_K} scores (K + 1 for the losses), got {k}"
    if scores.shape[1] > _TRITON_LARGEST_L:
        return f"takes up to {_TRITON_LARGEST_L} classes, got {scores.shape[1]}"
    return None


def suffix(backend: str, scores: Tensor, k: int) -> str:
    """The op suffix of a named backend, or of the best one for "auto"; raises where it cannot run."""
    on_cpu = scores.device.type == "cpu"
    if backend == "torch":
        return "_torch"
    if backend == "auto":
        if (HAS_CPP and on_cpu) or (HAS_CUDA and scores.is_cuda):
            return ""
        return "_triton" if HAS_TRITON and not on_cpu and not _unfit_for_triton(scores, k) else "_torch"
    if backend not in _REMEDY:
        raise ValueError(f"backend must be 'auto', 'torch', 'cpp', 'cuda' or 'triton', got {backend!r}")
    if backend == "cpp" and HAS_CPP:
        if on_cpu:
            return ""
        raise ValueError(f"backend 'cpp' runs on CPU tensors, got scores on {scores.device}")
    if backend == "cuda" and HAS_CUDA:
        if scores.is_cuda:
            return ""
        raise ValueError(f"backend 'cuda' runs on CUDA tensors, got scores on {scores.device}")
    if backend == "triton" and HAS_TRITON:
        if unfit := _unfit_for_triton(scores, k):
            raise ValueError(f"backend 'triton' {unfit}")
        return "_triton"
    raise RuntimeError(f"backend {backend!r} is not available: {_REMEDY[backend]}")


def checked_labels(labels: Tensor, n_classes: int, ignore_index: int) -> Tensor:
    """``labels``, or an IndexError that names a wrong one; in compiled and exported code the error of a step of its own.

    A GPU, for which nothing waits, stops by itself, as in torch's own losses.
    """
    if torch.compiler.is_compiling():
        return _OPS[""]["checked_labels"](labels, n_classes, ignore_index)
    _check_labels(labels, n_classes, ignore_index)
    return labels


def _check_labels(labels, n_classes, ignore_index):
    known = ((labels == ignore_index) | ((labels >= 0) & (labels < n_classes))).all()
    if labels.device.type != "cpu":
        torch._assert_async(known, "target out of bounds")
    elif not known:
        checks.labels(labels, n_classes, ignore_index)


def _copy_of_checked_labels(labels, n_classes, ignore_index):
    _check_labels(labels, n_classes, ignore_index)
    return labels.clone()  # an op returns no alias of its input


define(
    "checked_labels",
    "",
    "(Tensor target, SymInt n_classes, int ignore_index) -> Tensor",
    lambda labels, n_classes, ignore_index: torch.empty_like(labels),
    _copy_of_checked_labels,
)


class _Gradient(Function):
    """The gradient of a result, itself differentiable in ``grad``: it is linear there and constant in the scores."""

    @staticmethod
    def forward(grad, result, classes, target, scale, n_classes, dtype, suffix):
        return _OPS[suffix]["gradient"](grad, result, classes, target, scale, 0, n_classes, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, result, classes, target, ctx.scale, _, _, _ = inputs
        ctx.save_for_backward(result, classes, target)
        ctx.dtype = grad.dtype

    @staticmethod
    def backward(ctx, grad_out):
        result, classes, target = ctx.saved_tensors
        wide = grad_out.to(ctx.dtype)
        picked = wide.gather(1, classes.clamp(min=0)) * (classes >= 0)
        total = picked.mean(1)
        if target is not None:
            gate = result > 0
            total = (total - wide.gather(1, target.masked_fill(~gate, 0)[:, None])[:, 0]) * gate
        total = torch.where(result.isnan(), result, total * ctx.scale)
        return total, None, None, None, None, None, None, None


def reduce(losses: Tensor, n_valid: Tensor, reduction: str) -> Tensor:
    """ "none", "sum" or the "mean" over valid rows."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / n_valid


def _backward(ctx, grad):
    """The gradient of the scores from that of the results [N]; `ctx` as `_Search._keep` filled it."""
    result, classes, target, n_valid = ctx.saved_tensors
    if n_valid is not None:
        grad = grad / n_valid
    grad = grad.expand(result.shape).to(result.dtype)
    args = (grad, result, classes, target, ctx.scale)
    if torch.is_grad_enabled():
        return _Gradient.apply(*args, ctx.n_classes, ctx.dtype, ctx.suffix)
    return _OPS[ctx.suffix]["gradient"](*args, 0, ctx.n_classes, ctx.dtype)


class _Search(Function):
    """Scores to smoothed values or, with a target, to losses and their reduction; keeps the class ids alone.

    The reduction is inside, which saves the graph two nodes.
    """

    @staticmethod
    def _run(op_args, reduction, suffix):
        if reduction is None:
            result, classes = _OPS[suffix]["smoothed"](*op_args)
            return result, result, classes, None
        result, classes, n_valid = _OPS[suffix]["loss"](*op_args)
        return reduce(result, n_valid, reduction), result, classes, n_valid

    @staticmethod
    def _keep(ctx, inputs, result, classes, n_valid):
        scores, target, scale, reduction, suffix, _ = inputs
        ctx.save_for_backward(result, classes, target, n_valid if reduction == "mean" else None)
        ctx.scale, ctx.suffix = scale, suffix
        ctx.n_classes, ctx.dtype = scores.shape[1], scores.dtype

    @staticmethod
    def forward(ctx, scores, target, scale, reduction, suffix, op_args):
        # The ops have derivatives of their own, whose Python would cost some 6 us a call here, where this one's counts.
        below = nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()
        with below:
            out, *kept = _Search._run((scores, *op_args), reduction, suffix)
        _Search._keep(ctx, (scores, target, scale, reduction, suffix, None), *kept)
        return out

    @staticmethod
    def backward(ctx, grad, *_):
        return _backward(ctx, grad), None, None, None, None, None


class _TransformedSearch(_Search):
    """For torch.func, which wants what the backward needs among the outputs: a dearer call."""

    @staticmethod
    def forward(scores, target, scale, reduction, suffix, op_args):
        return _Search._run((scores, *op_args), reduction, suffix)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        _Search._keep(ctx, inputs, *output[1:])


def kernel(name: str, suffix: str):
    """The op ``name`` of a backend."""
    return _OPS[suffix][name]


def candidates(scores: Tensor, seed, k, *args, backend: str) -> tuple[Tensor, Tensor]:
    """The op ``candidates``, without gradient; arguments as in its schema."""
    return _OPS[suffix(backend, scores, k)]["candidates"](scores.detach(), seed, k, *args)


def smoothed(scores: Tensor, seed, k, *args, backend: str) -> Tensor:
    """Differentiable smoothed k-th largest value [N]; arguments as in the op's schema."""
    return _search(scores, None, 1.0, None, suffix(backend, scores, k), (seed, k, *args))


def loss(
    scores: Tensor, target: Tensor, margins, seed, k, epsilon, n_sample, scale, ignore_index, dense, *,
    reduction: str, suffix: str,
) -> Tensor:  # fmt: skip
    """Differentiable loss, [N] or reduced; arguments as in the op's schema."""
    args = (target, margins, seed, k, epsilon, n_sample, scale, ignore_index, dense)
    return _search(scores, target, scale, reduction, suffix, args)


def _search(scores, target, scale, reduction, suffix, op_args):
    if torch.compiler.is_exporting():  # the graph shall hold the op, which has a derivative of its own
        return _Search._run((scores, *op_args), reduction, suffix)[0]
    args = (scores, target, scale, reduction, suffix, op_args)
    if torch._C._are_functorch_transforms_active():
        return _TransformedSearch.apply(*args)[0]
    return _Search.apply(*args)


def _derivative(name: str, suffix: str):
    """The derivative that `_Search` has, for an op of scores itself, so that an exported graph trains."""

    def keep(ctx, inputs, output):
        target, scale = (inputs[1], inputs[7]) if name == "loss" else (None, 1.0)
        _Search._keep(ctx, (inputs[0], target, scale, None, suffix, None), output[0], output[1], None)
        ctx.n_inputs = len(inputs)

    def backward(ctx, grad, *_):
        return _backward(ctx, grad), *[None] * (ctx.n_inputs - 1)

    return keep, backward


for _suffix in SUFFIXES:
    for _name, _schema in _SCHEMAS.items():
        _everywhere = getattr(reference, _name) if _suffix == "_torch" else None
        _of = _derivative(_name, _suffix) if _name in ("smoothed", "loss") else None
        define(_name, _suffix, _schema, globals()[f"_fake_{_name}"], _everywhere, _of)
        if _suffix == "_triton" and HAS_TRITON:
            _LIBRARY.impl(f"{_name}_triton", _on_triton(_name), "CUDA")  # HIP's tensors have this key too
            if INTERPRETED:
                _LIBRARY.impl(f"{_name}_triton", _on_triton(_name), "CPU")
