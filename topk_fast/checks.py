"""Checks of users' arguments: each returns the argument as the ops take it, or says what was expected and what came."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

MOST_RANKS = 32  # of one search: a kernel's arguments hold them
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_scores(x, name="input"):
    """Scores or features, on which the functions compute; also refuses the tracers that would record wrong programs."""
    if not isinstance(x, Tensor):
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(
                "torch.fx.symbolic_trace cannot trace topk_fast, whose steps depend on shapes and dtypes: use "
                "torch.export or torch.compile, or a Tracer whose is_leaf_module is true for the loss"
            )
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace would record one noise and one shape for all calls: use torch.export or torch.compile"
        )
    if torch._C._are_functorch_transforms_active():
        check_unbatched(x, name)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def check_unbatched(x, name):
    while torch._C._functorch.is_functorch_wrapped_tensor(x):  # by one transform after the other
        if torch._C._functorch.is_batchedtensor(x):
            raise RuntimeError(
                f"torch.vmap does not batch topk_fast, whose functions take a batch of rows already: put the mapped "
                f'dimension of {name} among the rows and pass reduction="none"'
            )
        x = torch._C._functorch.get_unwrapped(x)


def check_target(input, target, class_dim):
    """Labels of every row of ``input``, whose dimension ``class_dim`` holds the scores or features of a row."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.dtype.is_floating_point or target.dtype.is_complex:
        raise TypeError(
            f"target must hold class indices in int64, got {target.dtype} of shape {list(target.shape)}: soft targets "
            "(probabilities of classes) are not supported; mix losses of several index targets instead"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}; pass target.long()")
    if torch._C._are_functorch_transforms_active():
        check_unbatched(target, "target")
    if input.dim() == 0:
        raise ValueError("input must be [N, L], [L] or [N, L, d1, ...], got a tensor without dimensions")
    expected = torch.Size(n for i, n in enumerate(input.shape) if i != class_dim)
    if target.shape != expected:
        last = class_dim == 1 and input.dim() > 2 and target.shape == input.shape[:-1]
        raise ValueError(
            f"target must have shape {list(expected)} for input of shape {list(input.shape)}, got {list(target.shape)}"
            + ("; classes are dimension 1 of input: pass input.movedim(-1, 1)" if last else "")
        )
    if target.device != input.device:
        raise ValueError(f"target must be on input's device {input.device}, got {target.device}")


def check_layer(input, weight, bias):
    """A linear layer's tensors; returns the dtype of its logits, autocast's where that is on."""
    check_scores(input)
    check_scores(weight, "linear_weight")
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input must be [..., D] and linear_weight [L, D], got shapes {list(input.shape)} and {list(weight.shape)}"
        )
    if weight.device != input.device:
        raise ValueError(f"linear_weight must be on input's device {input.device}, got {weight.device}")
    if bias is not None:
        check_scores(bias, "linear_bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"linear_bias must have shape [L] = {list(weight.shape[:1])}, got {list(bias.shape)}")
        if bias.device != input.device:
            raise ValueError(f"linear_bias must be on input's device {input.device}, got {bias.device}")
    kind = input.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    for name, x in (("linear_weight", weight), ("linear_bias", bias)):
        if x is not None and x.dtype != input.dtype:
            raise TypeError(
                f"{name} must have input's dtype {input.dtype}, got {x.dtype}; convert one, or use autocast"
            )
    return input.dtype


def check_leaves(**tensors):
    """Refuses row-sparse gradients of what something else computed, whose own derivative could not take them."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and not x.is_leaf:
            raise ValueError(
                f"sparse_grad=True needs a {name} that is a leaf of the graph, as a Parameter is; this one was "
                f"computed by {x.grad_fn.name()} (weight_norm and other parametrizations do so): "
                "pass sparse_grad=False"
            )


def check_class_vector(name, x, n_classes: int | None, device):
    """A constant number for each class; ``n_classes`` is None where it is not known yet."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.requires_grad:
        raise ValueError(f"{name} must hold constants, got a tensor that requires grad; pass {name}.detach()")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dim() != 1 or n_classes is not None and len(x) != n_classes:
        wanted = "[L]" if n_classes is None else f"[L] = [{n_classes}]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on input's device {device}, got {x.device}")


def check_not_negative(name, value):
    value = check_real(name, value)
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


def check_positive(name, value):
    value = check_real(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def check_ranks(k, low: int, high: int, high_name: str | None = None, name: str = "k") -> tuple[int, ...]:
    """An int, or a sequence of ints, each ``low`` to ``high``, which the errors call ``high_name``."""
    if not isinstance(k, Sequence) or isinstance(k, (str, bytes)):
        return (check_integer(name, k, low, high, high_name),)
    if not 1 <= len(k) <= MOST_RANKS:
        raise ValueError(f"{name} must be an int or a sequence of 1 to {MOST_RANKS} ints, got {len(k)} of them")
    return tuple(check_integer(name, one, low, high, high_name) for one in k)


def check_top(k, n_classes: int | None, *, least: int = 0, several: bool = True) -> tuple[int, ...]:
    """The K, or several, of top-K losses, each ``least`` to L - 1; ``n_classes`` is None where L is not known yet."""
    if not several and isinstance(k, Sequence):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if n_classes is None:
        return check_ranks(k, least, 2**31 - 2)
    if n_classes <= least:
        raise ValueError(f"input must have at least {least + 1} class{'es' * least}, got {n_classes}")
    return check_ranks(k, least, check_length(n_classes) - 1, "L - 1")


def check_length(n_classes):
    """The number of classes of a search, whose ids are int32 in the kernels."""
    if isinstance(n_classes, int) and n_classes >= 2**31:  # a symbol would get a bound, which torch.export refuses
        raise ValueError(f"there must be fewer than 2**31 classes, got {n_classes}")
    return n_classes


def check_labels(labels, n_classes, ignore_index):
    """Names a wrong label. It reads the labels, and so waits for their device."""
    bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= n_classes))]
    if bad.numel():
        raise IndexError(
            f"target must be in [0, L - 1] = [0, {n_classes - 1}] or ignore_index = {ignore_index}, got {int(bad[0])}"
        )


def check_integer(name, value, low, high, high_name=None):
    if isinstance(value, bool) or not isinstance(value, (int, Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        span = f"[{low}, {high_name}] = [{low}, {high}]" if high_name else f"[{low}, {high}]"
        raise ValueError(f"{name} must be in {span}, got {value}")
    return value if isinstance(value, torch.SymInt) else int(value)


def check_real(name, value):
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    value = float(value)
    if not -math.inf < value < math.inf:  # math.isfinite would not compile for symbolic floats
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_dimension(dim, n_dims: int) -> int:
    if isinstance(dim, bool) or not isinstance(dim, (int, Integral)):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    dim = int(dim)
    if not -n_dims <= dim < n_dims:
        raise IndexError(f"dim must be in [{-n_dims}, {n_dims - 1}], got {dim}")
    return dim
