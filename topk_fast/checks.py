"""Checks of users' arguments: each returns the argument as the ops take it, or says what was expected and what came."""

import math
import sys
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST_EPSILON = 1e36  # beyond it, epsilon times the largest levels of noise (about 40) would overflow float32


def scores(x, name="input"):
    """Scores or features, on which the functions compute; also refuses the tracers that would record wrong programs."""
    if not isinstance(x, Tensor):
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(
                "torch.fx.symbolic_trace cannot trace topk_fast, whose steps depend on shapes and dtypes: use torch.export "
                "or torch.compile, or a Tracer whose is_leaf_module is true for the loss"
            )
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace would record one noise for all calls: use torch.export or torch.compile")
    if torch._C._are_functorch_transforms_active():
        unbatched(x, name)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def unbatched(x, name):
    if torch._C._functorch.is_batchedtensor(x):
        raise RuntimeError(
            f"torch.vmap does not batch topk_fast, whose functions take a batch of rows already: put the mapped dimension "
            f'of {name} among the rows and pass reduction="none"'
        )


def target(input, target, class_dim):
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
        unbatched(target, "target")
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


def layer(input, weight, bias):
    """A linear layer's tensors; returns the dtype of its logits, autocast's where that is on."""
    scores(input)
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
    if kind != "meta" and torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != input.dtype:
            raise TypeError(
                f"{name} must have input's dtype {input.dtype}, got {x.dtype}; convert one, or use autocast"
            )
    return input.dtype


def leaves(**tensors):
    """Refuses row-sparse gradients of what something else computed, whose own derivative could not take them."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and not x.is_leaf:
            raise ValueError(
                f"sparse_grad=True needs a {name} that is a leaf of the graph, as a Parameter is; this one was computed by "
                f"{x.grad_fn.name()} (weight_norm and other parametrizations do so): pass sparse_grad=False"
            )


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
        raise ValueError(f"margins must be on input's device {device}, got {margins.device}")
    return margins.to(dtype)


def counts(cls_num_list):
    """Numbers of examples as a list; read from it alone, so that it can stand under torch.device("meta") as well."""
    if isinstance(cls_num_list, Tensor) and cls_num_list.is_meta:
        raise ValueError("cls_num_list must hold numbers, got a tensor on the meta device, which holds none")
    listed = cls_num_list.tolist() if hasattr(cls_num_list, "tolist") else cls_num_list
    if isinstance(listed, Real):
        raise ValueError("cls_num_list must be a list of counts, got a single number")
    if isinstance(listed, (str, Mapping)) or not isinstance(listed, Iterable):
        raise TypeError(f"cls_num_list must be a list of numbers, got {type(cls_num_list).__name__}")
    listed = list(listed)
    if not listed:
        raise ValueError("cls_num_list must be a list of counts, got an empty one")
    for j, n in enumerate(listed):
        if isinstance(n, (list, tuple)):
            raise ValueError("cls_num_list must be a list of counts, got a list of lists")
        if not isinstance(n, (Real, Tensor)):
            raise TypeError(f"cls_num_list must be a list of numbers, got a {type(n).__name__} for class {j}")
        if not 0 < n < math.inf:
            raise ValueError(f"cls_num_list must hold positive counts, got {float(n):g} for class {j}")
    return [float(n) for n in listed]


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
    """Reads the labels, and so waits for their device; the steps of a GPU stop by themselves, as in torch's own losses."""
    bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= n_classes))]
    if bad.numel():
        raise IndexError(
            f"target must be in [0, L - 1] = [0, {n_classes - 1}] or ignore_index = {ignore_index}, got {int(bad[0])}"
        )


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


def dimension(dim):
    if isinstance(dim, bool) or not isinstance(dim, (int, Integral)):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    return int(dim)


def noise(epsilon, n_sample):
    epsilon = real("epsilon", epsilon)
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    if epsilon > LARGEST_EPSILON:
        raise ValueError(f"epsilon must be at most {LARGEST_EPSILON:g}, got {epsilon}: noise would overflow float32")
    return epsilon, integer("n_sample", n_sample, 1, 2**31 - 1)


def dense(sampler):
    if sampler not in ("auto", "thinned", "dense"):
        raise ValueError(f"sampler must be 'auto', 'thinned' or 'dense', got {sampler!r}")
    return sampler == "dense"


def source(seed, generator):
    """Where seeds come from, without their device."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if seed is None:
        return
    if generator is not None:
        raise ValueError("seed and generator exclude each other, got both")
    if not isinstance(seed, Tensor):
        integer("seed", seed, -(2**63), 2**64 - 1)
    elif seed.dtype != torch.int64 or seed.dim() != 0:
        raise TypeError(f"a seed tensor must be int64 without dimensions, got {seed.dtype} {list(seed.shape)}")


def seed(seed, generator, device):
    """The key of the noise as an int64 tensor on ``device``, so that no step waits for the device."""
    source(seed, generator)
    if seed is None:
        if generator is not None:
            not_recomputed(generator, device)
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    if isinstance(seed, Tensor):
        if seed.device != device:
            raise ValueError(f"seed must be on input's device {device}, got {seed.device}")
        return seed
    seed = seed if isinstance(seed, torch.SymInt) else int(seed)
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def not_recomputed(generator, device):
    """Refuses a generator on another device, and inside of torch.utils.checkpoint.

    A checkpoint runs the forward again for the backward. It restores the state of torch's default generators for that,
    and of no other one: the gradient would belong to another noise than the loss that was returned.
    """
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on input's device {device}, got {generator.device}")
    frame = None if torch.compiler.is_compiling() else sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise RuntimeError(
                "a generator inside of torch.utils.checkpoint would draw other noise for the backward than for the loss: "
                "pass a seed drawn outside of the checkpoint, or generator=None, for torch restores its default generator"
            )
        frame = frame.f_back
