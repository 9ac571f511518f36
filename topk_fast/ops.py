"""The boundary to the backends: schemas, fake kernels, registration and autograd.

Every op stands three times in the namespace ``torch.ops.topk_fast``: under its plain name with the compiled kernels
(``csrc``, registered when ``backends.py`` imports their modules), with the suffix ``_torch`` with ``reference.py``'s, and
with ``_triton`` with ``triton_kernels``', which is imported at its first call.
"""

import importlib
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import Function

from . import backends, checks, reference

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


def _on_triton(name):
    def run(*args):
        return getattr(importlib.import_module("topk_fast.triton_kernels.launch"), name)(*args)

    return run


_LIBRARY = torch.library.Library("topk_fast", "DEF")
_SUFFIX = {"cpp": "", "triton": "_triton", "torch": "_torch"}  # of a backend's ops


_OPS = {}  # by name, then by backend


def define(name: str, schema: str, fake, kernel_of=None, derivative_of=None) -> None:
    """A new op in the namespace for each backend, with its fake kernel.

    ``kernel_of(backend)``, if given, is that backend's kernel for all devices, and ``derivative_of(backend)`` what to keep
    for the backward, and the backward, as `torch.library.register_autograd` takes them. "cuda" has the op of "cpp": the
    device of a call's tensors tells their kernels apart.
    """
    _OPS[name] = {}
    for backend, suffix in _SUFFIX.items():
        _LIBRARY.define(name + suffix + schema, tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"topk_fast::{name}{suffix}"
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
        if kernel_of is not None:
            _LIBRARY.impl(name + suffix, kernel_of(backend), "CompositeExplicitAutograd")
        if derivative_of is not None:
            keep, backward = derivative_of(backend)
            torch.library.register_autograd(qualified, backward, setup_context=keep, lib=_LIBRARY)
        _OPS[name][backend] = getattr(torch.ops.topk_fast, name + suffix).default
    _OPS[name]["cuda"] = _OPS[name]["cpp"]


def kernel(name: str, backend: str):
    """The op ``name`` of a backend."""
    return _OPS[name][backend]


def checked_labels(labels: Tensor, n_classes: int, ignore_index: int) -> Tensor:
    """``labels``, or an IndexError that names a wrong one; in compiled and exported code the error of a step of its own.

    A GPU, for which nothing waits, stops by itself, as in torch's own losses.
    """
    if torch.compiler.is_compiling():
        return torch.ops.topk_fast.checked_labels(labels, n_classes, ignore_index)
    _check_labels(labels, n_classes, ignore_index)
    return labels


def _check_labels(labels, n_classes, ignore_index):
    known = ((labels == ignore_index) | ((labels >= 0) & (labels < n_classes))).all()
    try:
        torch._assert_async(known, "target out of bounds")
    except RuntimeError:  # at once on the CPU
        checks.labels(labels, n_classes, ignore_index)
        raise


def _copy_of_checked_labels(labels, n_classes, ignore_index):
    _check_labels(labels, n_classes, ignore_index)
    return labels.clone()  # an op returns no alias of its input


_LIBRARY.define("checked_labels(Tensor target, SymInt n_classes, int ignore_index) -> Tensor")
torch.library.register_fake("topk_fast::checked_labels", lambda target, *_: torch.empty_like(target), lib=_LIBRARY)
_LIBRARY.impl("checked_labels", _copy_of_checked_labels, "CompositeExplicitAutograd")


class _Gradient(Function):
    """The gradient of a result, itself differentiable in ``grad``: it is linear there and constant in the scores."""

    @staticmethod
    def forward(grad, result, classes, target, scale, n_classes, dtype, backend):
        return kernel("gradient", backend)(grad, result, classes, target, scale, 0, n_classes, dtype)

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
        return _Gradient.apply(*args, ctx.n_classes, ctx.dtype, ctx.backend)
    return kernel("gradient", ctx.backend)(*args, 0, ctx.n_classes, ctx.dtype)


class _Search(Function):
    """Scores to smoothed values or, with a target, to losses and their reduction; keeps the class ids alone.

    The reduction is inside, which saves the graph two nodes.
    """

    @staticmethod
    def _run(op_args, reduction, backend):
        if reduction is None:
            result, classes = kernel("smoothed", backend)(*op_args)
            return result, result, classes, None
        result, classes, n_valid = kernel("loss", backend)(*op_args)
        return reduce(result, n_valid, reduction), result, classes, n_valid

    @staticmethod
    def _keep(ctx, inputs, result, classes, n_valid):
        scores, target, scale, reduction, backend, _ = inputs
        ctx.save_for_backward(result, classes, target, n_valid if reduction == "mean" else None)
        ctx.scale, ctx.backend = scale, backend
        ctx.n_classes, ctx.dtype = scores.shape[1], scores.dtype

    @staticmethod
    def forward(ctx, scores, target, scale, reduction, backend, op_args):
        # The ops have derivatives of their own, whose Python would cost some 6 us a call here, where this one's counts.
        below = nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()
        with below:
            out, *kept = _Search._run((scores, *op_args), reduction, backend)
        _Search._keep(ctx, (scores, target, scale, reduction, backend, None), *kept)
        return out

    @staticmethod
    def backward(ctx, grad, *_):
        return _backward(ctx, grad), None, None, None, None, None


class _TransformedSearch(_Search):
    """For torch.func, which wants what the backward needs among the outputs: a dearer call."""

    @staticmethod
    def forward(scores, target, scale, reduction, backend, op_args):
        return _Search._run((scores, *op_args), reduction, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        _Search._keep(ctx, inputs, *output[1:])


def candidates(scores: Tensor, seed, k, *args, backend: str) -> tuple[Tensor, Tensor]:
    """The op ``candidates``, without gradient; arguments as in its schema."""
    return kernel("candidates", backend)(scores.detach(), seed, k, *args)


def smoothed(scores: Tensor, seed, k, *args, backend: str) -> Tensor:
    """Differentiable smoothed k-th largest value [N]; arguments as in the op's schema."""
    return _search(scores, None, 1.0, None, backend, (seed, k, *args))


def loss(
    scores: Tensor, target: Tensor, margins, seed, k, epsilon, n_sample, scale, ignore_index, dense, *,
    reduction: str, backend: str,
) -> Tensor:  # fmt: skip
    """Differentiable loss, [N] or reduced; arguments as in the op's schema."""
    args = (target, margins, seed, k, epsilon, n_sample, scale, ignore_index, dense)
    return _search(scores, target, scale, reduction, backend, args)


def _search(scores, target, scale, reduction, backend, op_args):
    if torch.compiler.is_exporting():  # the graph shall hold the op, which has a derivative of its own
        return _Search._run((scores, *op_args), reduction, backend)[0]
    args = (scores, target, scale, reduction, backend, op_args)
    if torch._C._are_functorch_transforms_active():
        return _TransformedSearch.apply(*args)[0]
    return _Search.apply(*args)


def _derivative(name: str):
    """For the op ``name`` of each backend the derivative that `_Search` has, so that an exported graph trains."""

    def of(backend):
        def keep(ctx, inputs, output):
            target, scale = (inputs[1], inputs[7]) if name == "loss" else (None, 1.0)
            _Search._keep(ctx, (inputs[0], target, scale, None, backend, None), output[0], output[1], None)
            ctx.n_inputs = len(inputs)

        def backward(ctx, grad, *_):
            return _backward(ctx, grad), *[None] * (ctx.n_inputs - 1)

        return keep, backward

    return of


for _name, _schema in _SCHEMAS.items():
    _of = _derivative(_name) if _name in ("smoothed", "loss") else None
    define(_name, _schema, globals()[f"_fake_{_name}"], derivative_of=_of)
    _LIBRARY.impl(f"{_name}_torch", getattr(reference, _name), "CompositeExplicitAutograd")
    if backends.HAS_TRITON:
        _LIBRARY.impl(f"{_name}_triton", _on_triton(_name), "CUDA")  # HIP's tensors have this key too
        if backends.INTERPRETED:
            _LIBRARY.impl(f"{_name}_triton", _on_triton(_name), "CPU")
