"""The boundary to the backends: schemas, fake kernels, autograd and the choice of a backend.

Every op stands twice in the namespace ``torch.ops.topk_fast``: under its plain name with the compiled kernels (CPU:
``csrc``, registered when ``_C`` is imported), and with the suffix ``_torch`` with ``reference.py``'s.
"""

import importlib.util

import torch
from torch import Tensor
from torch.autograd import Function

from . import noise, reference

_SCHEMAS = {
    "candidates": "(Tensor scores, Tensor seed, int k, float epsilon, int n_sample, int first_row, int first_class, "
    "bool dense) -> (Tensor, Tensor)",
    "smoothed": "(Tensor scores, Tensor seed, int k, float epsilon, int n_sample, bool dense) -> (Tensor, Tensor)",
    "loss": "(Tensor scores, Tensor target, Tensor? margins, Tensor seed, int k, float epsilon, int n_sample, "
    "float scale, int ignore_index, bool dense) -> (Tensor, Tensor, Tensor)",
    "gradient": "(Tensor grad, Tensor result, Tensor classes, Tensor? target, float scale, SymInt n_classes, "
    "ScalarType dtype) -> Tensor",
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


def _fake_gradient(grad, result, classes, target, scale, n_classes, dtype):
    return grad.new_empty((classes.shape[0], n_classes), dtype=dtype)


_LIBRARY = torch.library.Library("topk_fast", "DEF")
for _name, _schema in _SCHEMAS.items():
    for _suffix in ("", "_torch"):
        _LIBRARY.define(_name + _suffix + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"topk_fast::{_name}{_suffix}", globals()[f"_fake_{_name}"], lib=_LIBRARY)
    _LIBRARY.impl(f"{_name}_torch", getattr(reference, _name), "CompositeExplicitAutograd")

_OPS = {
    suffix: {name: getattr(torch.ops.topk_fast, name + suffix).default for name in _SCHEMAS}
    for suffix in ("", "_torch")
}

HAS_CPP = importlib.util.find_spec("topk_fast._C") is not None
if HAS_CPP:
    from . import _C  # noqa: F401  registers the CPU kernels

_REMEDY = {
    "cpp": "the C++ kernels are not built: install a C++ compiler, then `pip install --no-build-isolation .` "
    "(or `python setup.py build_ext --inplace` in a checkout)",
    "cuda": "this version has no CUDA kernels; use backend='torch' or 'auto'",
    "triton": "this version has no Triton kernels; use backend='torch' or 'auto'",
}


def available_backends(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that can run on ``device`` here, the one that "auto" takes first.

    >>> "torch" in available_backends("cpu")
    True
    """
    return ["cpp", "torch"] if HAS_CPP and torch.device(device).type == "cpu" else ["torch"]


def build_info() -> dict:
    """Facts for a bug report: torch's version and, where the C++ kernels are built, compiler and instruction sets.

    >>> sorted(build_info())
    ['compiler', 'contract', 'cpp', 'instruction_sets', 'torch']
    """
    return {
        "torch": torch.__version__,
        "contract": noise.VERSION,
        "cpp": HAS_CPP,
        "compiler": _C.compiler() if HAS_CPP else None,
        "instruction_sets": _C.isas() if HAS_CPP else [],
    }


def suffix(backend: str, device: torch.device) -> str:
    """The op suffix of a named backend, or of the best one for "auto"; raises where it cannot run."""
    on_cpu = device.type == "cpu"
    if backend == "torch":
        return "_torch"
    if backend == "auto":
        return "" if HAS_CPP and on_cpu else "_torch"
    if backend not in _REMEDY:
        raise ValueError(f"backend must be 'auto', 'torch', 'cpp', 'cuda' or 'triton', got {backend!r}")
    if backend == "cpp" and HAS_CPP:
        if on_cpu:
            return ""
        raise ValueError(f"backend 'cpp' runs on CPU tensors, got scores on {device}")
    raise RuntimeError(f"backend {backend!r} is not available: {_REMEDY[backend]}")


class _Gradient(Function):
    """The gradient of a result, itself differentiable in ``grad``: it is linear there and constant in the scores."""

    @staticmethod
    def forward(grad, result, classes, target, scale, n_classes, dtype, suffix):
        return _OPS[suffix]["gradient"](grad, result, classes, target, scale, n_classes, dtype)

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


def _reduce(losses, n_valid, reduction):
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / n_valid


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
        return _reduce(result, n_valid, reduction), result, classes, n_valid

    @staticmethod
    def _keep(ctx, inputs, result, classes, n_valid):
        scores, target, scale, reduction, suffix, _ = inputs
        ctx.save_for_backward(result, classes, target, n_valid if reduction == "mean" else None)
        ctx.scale, ctx.suffix = scale, suffix
        ctx.n_classes, ctx.dtype = scores.shape[1], scores.dtype

    @staticmethod
    def forward(ctx, scores, target, scale, reduction, suffix, op_args):
        out, *kept = _Search._run((scores, *op_args), reduction, suffix)
        _Search._keep(ctx, (scores, target, scale, reduction, suffix, None), *kept)
        return out

    @staticmethod
    def backward(ctx, grad, *_):
        result, classes, target, n_valid = ctx.saved_tensors
        if n_valid is not None:
            grad = grad / n_valid
        grad = grad.expand(result.shape).to(result.dtype)
        args = (grad, result, classes, target, ctx.scale, ctx.n_classes, ctx.dtype)
        if torch.is_grad_enabled():
            grad = _Gradient.apply(*args, ctx.suffix)
        else:
            grad = _OPS[ctx.suffix]["gradient"](*args)
        return grad, None, None, None, None, None


class _TransformedSearch(_Search):
    """For torch.func, which wants what the backward needs among the outputs: a dearer call."""

    @staticmethod
    def forward(scores, target, scale, reduction, suffix, op_args):
        return _Search._run((scores, *op_args), reduction, suffix)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        _Search._keep(ctx, inputs, *output[1:])


def candidates(scores: Tensor, *args, backend: str) -> tuple[Tensor, Tensor]:
    """The op ``candidates``, without gradient; arguments as in its schema."""
    return _OPS[suffix(backend, scores.device)]["candidates"](scores.detach(), *args)


def smoothed(scores: Tensor, *args, backend: str) -> Tensor:
    """Differentiable smoothed k-th largest value [N]; arguments as in the op's schema."""
    return _search(scores, None, 1.0, None, suffix(backend, scores.device), args)


def loss(
    scores: Tensor, target: Tensor, margins, seed, k, epsilon, n_sample, scale, ignore_index, dense, *,
    reduction: str, backend: str,
) -> Tensor:  # fmt: skip
    """Differentiable loss, [N] or reduced; arguments as in the op's schema."""
    args = (target, margins, seed, k, epsilon, n_sample, scale, ignore_index, dense)
    return _search(scores, target, scale, reduction, suffix(backend, scores.device), args)


def _search(*args):
    if torch._C._are_functorch_transforms_active():
        return _TransformedSearch.apply(*args)[0]
    return _Search.apply(*args)
