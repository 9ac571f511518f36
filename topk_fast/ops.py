"""The boundary to the backends: the ops' schemas, fake kernels and registration.

Each backend has its own op in the namespace ``torch.ops.topk_fast``: ``excess_cpp`` and ``excess_cuda`` are compiled
(``csrc``; `backends` imports their modules, which registers the kernels), ``excess_triton`` imports
``triton_kernels`` at its first call, and ``excess_torch`` is `reference`. An op's arguments are the fields of its
requests.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from . import backends, checks, reference
from .criterion import REDUCTIONS
from .request import LABELS, NOISE, PLACE, SLICE, Labels, Noise, Place, Slice

_LIBRARY = torch.library.Library("topk_fast", "DEF")
_OPS: dict[tuple[str, str], Callable] = {}  # by name and backend

_RESULT = "(Tensor, Tensor)"
_N = len(Noise._fields)  # arguments of the noise


def _fake_candidates(scores, *args):
    wanted = Noise(*args[:_N])
    values = scores.new_empty((scores.shape[0], wanted.n_sample, wanted.k), dtype=reference.arithmetic(scores.dtype))
    return values, torch.empty_like(values, dtype=torch.int64)


def fake_excess(scores, wanted: Noise, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Results for tensors without data: ``scores`` has N rows."""
    n_rows, n_ranks = scores.shape[0], len(wanted.ranks)
    excess = scores.new_empty((n_rows, n_ranks), dtype=reference.arithmetic(dtype))
    return excess, scores.new_empty((n_rows, wanted.n_sample, n_ranks), dtype=torch.int64)


def _fake_excess(scores, *args):
    return fake_excess(scores, Noise(*args[:_N]), scores.dtype)


def _fake_gradient(grad, classes, target, ignore_index, first_class, n_classes, dtype):
    return grad.new_empty((classes.shape[0], n_classes), dtype=dtype)


def _fake_link(excess, target, ignore_index, *arguments):
    shape = excess.shape[:1] if REDUCTIONS[arguments[-1]] == "none" else ()
    return excess.new_empty(shape), torch.empty_like(excess), excess.new_empty(())


def _fake_linked_gradient(grad, slope, divisor, *args):
    return _fake_gradient(grad, *args)


# In reference.py's words: what an op's flat arguments are.
_REFERENCE = {
    "candidates": lambda scores, *a: reference.candidates(scores, Noise(*a[:_N]), Place(*a[_N:])),
    "excess": lambda scores, *a: reference.excess(scores, Noise(*a[:_N]), Labels(*a[_N:])),
    "gradient": lambda grad, ids, *a: reference.gradient(grad, ids, Labels(*a[:2]), Slice(*a[2:])),
}


def define(name: str, schema: str, fake, kernel_of=None, names=backends.NAMES) -> None:
    """Defines the op ``name`` of every backend, or of those with these names, with its fake kernel.

    ``kernel_of(backend)``, where it is given, returns that backend's kernel for all devices.
    """
    for backend in names:
        own = f"{name}_{backend}"
        _LIBRARY.define(own + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"topk_fast::{own}", fake, lib=_LIBRARY)
        if kernel_of is not None:
            _LIBRARY.impl(own, kernel_of(backend), "CompositeExplicitAutograd")
        _OPS[name, backend] = getattr(torch.ops.topk_fast, own).default


def register_derivative(name: str, derivative_of) -> None:
    """Gives the op ``name`` of every backend its derivative, so that exported and compiled graphs train.

    ``derivative_of(backend)`` returns what the forward keeps, and the backward, as torch.library.register_autograd
    takes them.
    """
    for backend in backends.NAMES:
        keep, backward = derivative_of(backend)
        torch.library.register_autograd(f"topk_fast::{name}_{backend}", backward, setup_context=keep, lib=_LIBRARY)


def kernel(name: str, backend: str):
    """The op ``name`` of a backend."""
    return _OPS[name, backend]


def has_link(backend: str) -> bool:
    """Whether a kernel of the backend evaluates a criterion."""
    return ("link", backend) in _OPS


def _on_triton(name):
    def run(*args):
        return getattr(importlib.import_module("topk_fast.triton_kernels.launch"), name)(*args)

    return run


define("candidates", f"(Tensor scores, {NOISE}, {PLACE}) -> {_RESULT}", _fake_candidates)
define("excess", f"(Tensor scores, {NOISE}, {LABELS}) -> {_RESULT}", _fake_excess)
define(
    "gradient",
    f"(Tensor grad, Tensor classes, Tensor? target, int ignore_index, {SLICE}) -> Tensor",
    _fake_gradient,
)
define(
    "link",
    "(Tensor excess, Tensor target, int ignore_index, int link, float temperature, float margin, Tensor? margins, "
    "float scale, float[] rank_weights, Tensor? weight, int reduction) -> (Tensor, Tensor, Tensor)",
    _fake_link,
    names=["cpp", "cuda"],
)
define(
    "linked_gradient",
    f"(Tensor grad, Tensor slope, Tensor divisor, Tensor classes, Tensor? target, int ignore_index, {SLICE}) -> Tensor",
    _fake_linked_gradient,
    names=["cpp", "cuda"],
)
for _name, _kernel in _REFERENCE.items():
    _LIBRARY.impl(f"{_name}_torch", _kernel, "CompositeExplicitAutograd")
    if backends.HAS_TRITON:
        _LIBRARY.impl(f"{_name}_triton", _on_triton(_name), "CUDA")  # HIP's tensors have this key too
        if backends.INTERPRETED:
            _LIBRARY.impl(f"{_name}_triton", _on_triton(_name), "CPU")


def checked_labels(target: Tensor, n_classes: int, ignore_index: int) -> Tensor:
    """``target``, or an IndexError that names a wrong label.

    In compiled and exported code an op of its own raises it. A GPU, for which nothing waits, stops by itself, as in
    torch's own losses.
    """
    if torch.compiler.is_compiling():
        return torch.ops.topk_fast.checked_labels(target, n_classes, ignore_index)
    _check_labels(target, n_classes, ignore_index)
    return target


def _check_labels(target, n_classes, ignore_index):
    try:
        reference.assert_known(target, n_classes, ignore_index)
    except RuntimeError:  # at once on the CPU
        checks.check_labels(target, n_classes, ignore_index)
        raise


def _copy_checked_labels(target, n_classes, ignore_index):
    _check_labels(target, n_classes, ignore_index)
    return target.clone()  # an op returns no alias of its input


_LIBRARY.define("checked_labels(Tensor target, SymInt n_classes, int ignore_index) -> Tensor")
torch.library.register_fake("topk_fast::checked_labels", lambda target, *_: torch.empty_like(target), lib=_LIBRARY)
_LIBRARY.impl("checked_labels", _copy_checked_labels, "CompositeExplicitAutograd")
