"""Checks of users' arguments: each returns the argument as the ops take it, or says what was expected and what came."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def scores(x, name="scores"):
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def target(input, target, class_dim):
    """Labels of every row of ``input``, whose dimension ``class_dim`` holds the scores or features of a row."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}; pass target.long()")
    if input.dim() == 0:
        raise ValueError("input must be [N, L], [L] or [N, L, d1, ...], got a tensor without dimensions")
    expected = torch.Size(n for i, n in enumerate(input.shape) if i != class_dim)
    if target.shape != expected:
        raise ValueError(
            f"target must have shape {list(expected)} for input of shape {list(input.shape)}, got {list(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"target must be on the scores' device {input.device}, got {target.device}")


def layer(input, weight, bias):
    """A linear layer's tensors; returns the dtype of its logits, autocast's where that is on."""
    scores(input, "input")
    scores(weight, "weight")
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input must be [..., D] and weight [L, D], got shapes {list(input.shape)} and {list(weight.shape)}"
        )
    if weight.device != input.device:
        raise ValueError(f"weight must be on input's device {input.device}, got {weight.device}")
    if bias is not None:
        scores(bias, "bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape [L] = {list(weight.shape[:1])}, got {list(bias.shape)}")
        if bias.device != input.device:
            raise ValueError(f"bias must be on input's device {input.device}, got {bias.device}")
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != input.dtype:
            raise TypeError(
                f"{name} must have input's dtype {input.dtype}, got {x.dtype}; convert one, or use autocast"
            )
    return input.dtype


def margins(margins, n_classes, device, dtype):
    """None, or margins in ``dtype``; ``n_classes`` is None where it is not known yet."""
    if margins is None:
        return None
    if not isinstance(margins, Tensor):
        raise TypeError(f"margins must be a tensor, got {type(margins).__name__}; see class_margins")
    if margins.requires_grad:
        raise ValueError("margins must be constants, got a tensor that requires grad; pass margins.detach()")
    if not margins.dtype.is_floating_point:
        raise TypeError(f"margins must be floating point, got {margins.dtype}")
    if margins.dim() != 1 or n_classes is not None and len(margins) != n_classes:
        wanted = "[L]" if n_classes is None else f"[L] = [{n_classes}]"
        raise ValueError(f"margins must have shape {wanted}, got {list(margins.shape)}")
    if margins.device != device:
        raise ValueError(f"margins must be on the scores' device {device}, got {margins.device}")
    return margins.to(dtype)


def scale(scale):
    scale = real("scale", scale)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return scale


def reduction(reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def rank(k, n_classes, spare=1):
    """k of at most L - ``spare``: a loss leaves one class; ``n_classes`` is None where L is not known yet."""
    if n_classes is None:
        return integer("k", k, 1, 2**31 - 2)
    return integer("k", k, 1, n_classes - spare, f"L - {spare}" if spare else "L")


def ignored(ignore_index):
    return integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)


def labels(labels, n_classes, ignore_index):
    bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= n_classes))]
    if bad.numel():
        raise IndexError(
            f"target must be in [0, L - 1] = [0, {n_classes - 1}] or ignore_index = {ignore_index}, got {int(bad[0])}"
        )


def labels_on_device(target, n_classes, ignore_index):
    """As `labels`, at once on the CPU; a GPU, for which nothing waits, stops by itself, as in torch's own losses."""
    known = (target == ignore_index) | ((target >= 0) & (target < n_classes))
    try:
        torch._assert_async(known.all(), "target out of bounds")
    except RuntimeError:
        labels(target, n_classes, ignore_index)
        raise


def integer(name, value, low, high, high_name=None):
    if isinstance(value, bool) or not isinstance(value, (int, Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        span = f"[{low}, {high_name}] = [{low}, {high}]" if high_name else f"[{low}, {high}]"
        raise ValueError(f"{name} must be in {span}, got {value}")
    return value if isinstance(value, torch.SymInt) else int(value)


def real(name, value):
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    value = float(value)
    if not -math.inf < value < math.inf:  # math.isfinite would not compile for symbolic floats
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def noise(epsilon, n_sample):
    epsilon = real("epsilon", epsilon)
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    return epsilon, integer("n_sample", n_sample, 1, 2**31 - 1)


def dense(sampler):
    if sampler not in ("auto", "thinned", "dense"):
        raise ValueError(f"sampler must be 'auto', 'thinned' or 'dense', got {sampler!r}")
    return sampler == "dense"


def seed(seed, generator, device):
    """The key of the noise as an int64 tensor on ``device``, so that no step waits for the device."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if seed is None:
        if generator is not None and generator.device.type != device.type:
            raise ValueError(f"generator must be on the scores' device {device}, got {generator.device}")
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    if generator is not None:
        raise ValueError("seed and generator exclude each other, got both")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"a seed tensor must be int64 without dimensions, got {seed.dtype} {list(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed must be on the scores' device {device}, got {seed.device}")
        return seed
    seed = integer("seed", seed, -(2**63), 2**64 - 1)
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
