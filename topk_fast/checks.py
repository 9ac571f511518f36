"""Checks of users' arguments: each returns the argument as the ops take it, or says what was expected and what came."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from . import noise
from .criterion import LINKS, Criterion
from .request import LossRequest, Noise, Options

MOST_RANKS = 32  # of one search: a kernel's arguments hold them
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST_EPSILON = 1e36  # beyond it, epsilon times the largest levels of noise (about 40) would overflow float32


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
        raise RuntimeError("torch.jit.trace would record one noise for all calls: use torch.export or torch.compile")
    if torch._C._are_functorch_transforms_active():
        check_unbatched(x, name)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def check_unbatched(x, name):
    if torch._C._functorch.is_batchedtensor(x):
        raise RuntimeError(
            f"torch.vmap does not batch topk_fast, whose functions take a batch of rows already: put the mapped "
            f'dimension of {name} among the rows and pass reduction="none"'
        )


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


def check_counts(cls_num_list):
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


def check_reduction(reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_ranks(k, low: int, high: int, high_name: str | None = None) -> tuple[int, ...]:
    """An int, or a sequence of ints, each ``low`` to ``high``, which the errors call ``high_name``."""
    if not isinstance(k, Sequence) or isinstance(k, (str, bytes)):
        return (check_integer("k", k, low, high, high_name),)
    if not 1 <= len(k) <= MOST_RANKS:
        raise ValueError(f"k must be an int or a sequence of 1 to {MOST_RANKS} ints, got {len(k)} of them")
    return tuple(check_integer("k", one, low, high, high_name) for one in k)


def check_top(k, n_classes: int | None, *, least: int = 0, several: bool = True) -> tuple[int, ...]:
    """The K, or several, of top-K losses, each ``least`` to L - 1; ``n_classes`` is None where L is not known yet."""
    if not several and isinstance(k, Sequence):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if n_classes is None:
        return check_ranks(k, least, 2**31 - 2)
    if n_classes <= least:
        raise ValueError(f"input must have at least {least + 1} class{'es' * least}, got {n_classes}")
    return check_ranks(k, least, n_classes - 1, "L - 1")


def check_link(criterion: Criterion, n_ranks: int) -> Criterion:
    """A criterion's numbers; its tensors are left to `check_criterion`."""
    check_reduction(criterion.reduction)
    if criterion.link not in LINKS:
        raise ValueError(f"link must be {', '.join(map(repr, LINKS[:-1]))} or {LINKS[-1]!r}, got {criterion.link!r}")
    temperature = check_positive("temperature", criterion.temperature)
    if temperature != 1.0 and criterion.link != "softplus":
        raise ValueError(f"temperature belongs to link='softplus', got {temperature} with link={criterion.link!r}")
    margin, weights = criterion.margin, criterion.rank_weights
    return criterion._replace(
        temperature=temperature,
        margin=margin if isinstance(margin, Tensor) else _check_margin(margin),
        scale=check_positive("scale", criterion.scale),
        rank_weights=None if weights is None else _check_rank_weights(weights, n_ranks),
    )


def _check_margin(margin):
    if isinstance(margin, bool) or not isinstance(margin, (float, int, Real)):
        raise TypeError(f"margin must be a number or a tensor [L], got {type(margin).__name__}; see class_margins")
    return check_real("margin", margin)


def _check_rank_weights(weights, n_ranks):
    if not isinstance(weights, Sequence) or isinstance(weights, (str, bytes)):
        raise TypeError(f"rank_weights must be a sequence of numbers, got {type(weights).__name__}")
    if len(weights) != n_ranks:
        raise ValueError(f"rank_weights must have a number for each of the {n_ranks} ranks of k, got {len(weights)}")
    weights = tuple(check_real("rank_weights", one) for one in weights)
    if min(weights) < 0:
        raise ValueError(f"rank_weights must be at least 0, got {min(weights)}")
    return weights


def check_criterion(criterion: Criterion, n_ranks: int, n_classes: int | None, device, dtype) -> Criterion:
    """The criterion with its tensors in ``dtype``; ``n_classes`` is None where it is not known yet."""
    criterion = check_link(criterion, n_ranks)
    if isinstance(criterion.margin, Tensor):
        check_class_vector("margins", criterion.margin, n_classes, device)
        criterion = criterion._replace(margin=criterion.margin.to(dtype))
    if criterion.weight is not None:
        check_class_vector("weight", criterion.weight, n_classes, device)
        criterion = criterion._replace(weight=criterion.weight.to(dtype))
    return criterion


def check_ignore_index(ignore_index) -> int:
    return check_integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)


def check_loss(loss: LossRequest, n_classes: int | None, device, dtype) -> tuple[Noise, LossRequest]:
    """The request for the noise, and the loss with its numbers checked; ``n_classes`` is None where it is not known."""
    least = int(bool(loss.exclude_target))
    ranks = tuple(one + 1 for one in check_top(loss.k, n_classes, least=least, several=loss.several))
    wanted = check_noise(loss.options, ranks, device)
    loss = loss._replace(ignore_index=check_ignore_index(loss.ignore_index), exclude_target=bool(least))
    if loss.offset is not None:
        check_class_vector("offset", loss.offset, n_classes, device)
    if loss.criterion is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        loss = loss._replace(criterion=check_criterion(loss.criterion, len(ranks), n_classes, device, wide))
    return wanted, loss


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


def check_epsilon(epsilon, device: torch.device | None) -> tuple[float, Tensor | None]:
    """A number and None, or 0 and the tensor that replaces it; ``device`` is None where it is not known yet."""
    if isinstance(epsilon, Tensor):
        return 0.0, _check_schedule(epsilon, device)
    epsilon = check_real("epsilon", epsilon)
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    if epsilon > LARGEST_EPSILON:
        raise ValueError(f"epsilon must be at most {LARGEST_EPSILON:g}, got {epsilon}: noise would overflow float32")
    return epsilon, None


def _check_schedule(epsilon, device):
    if epsilon.dim() != 0 or not epsilon.dtype.is_floating_point:
        raise TypeError(
            "epsilon must be a number or a floating-point tensor without dimensions, got "
            f"{epsilon.dtype} {list(epsilon.shape)}"
        )
    if device is None:
        return epsilon
    if epsilon.device != device:
        raise ValueError(f"epsilon must be on input's device {device}, got {epsilon.device}")
    # A learned one divides the scores, and so must not be 0.
    known = (epsilon > 0 if epsilon.requires_grad else epsilon >= 0) & (epsilon <= LARGEST_EPSILON)
    span = f"{'(' if epsilon.requires_grad else '['}0, {LARGEST_EPSILON:g}]"
    try:
        if not epsilon.is_meta:
            torch._assert_async(known, f"epsilon must be in {span}")
    except RuntimeError:  # at once on the CPU; a GPU, for which nothing waits, stops by itself
        raise ValueError(f"epsilon must be in {span}, got {epsilon.item()}") from None
    return epsilon.to(torch.float64)


def check_n_sample(n_sample):
    return check_integer("n_sample", n_sample, 1, 2**31 - 1)


def check_law(noise_: str) -> int:
    """The number of a law of the noise."""
    for number, law in enumerate(noise.LAWS):
        if noise_ == law.name:
            return number
    raise ValueError(f"noise must be {' or '.join(repr(law.name) for law in noise.LAWS)}, got {noise_!r}")


def check_noise(options: Options, ranks: tuple[int, ...], device: torch.device) -> Noise:
    """The request for the noise, with a seed on ``device``."""
    epsilon, schedule = check_epsilon(options.epsilon, device)
    n_sample, law = check_n_sample(options.n_sample), check_law(options.noise)
    dense = check_sampler(options.sampler)
    return Noise(make_seed(options, device), ranks, epsilon, schedule, n_sample, law, dense)


def check_sampler(sampler):
    if sampler not in ("auto", "thinned", "dense"):
        raise ValueError(f"sampler must be 'auto', 'thinned' or 'dense', got {sampler!r}")
    return sampler == "dense"


def check_source(seed, generator):
    """Where seeds come from, without their device."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if seed is None:
        return
    if generator is not None:
        raise ValueError("seed and generator exclude each other, got both")
    if not isinstance(seed, Tensor):
        check_integer("seed", seed, -(2**63), 2**64 - 1)
    elif seed.dtype != torch.int64 or seed.dim() != 0:
        raise TypeError(f"a seed tensor must be int64 without dimensions, got {seed.dtype} {list(seed.shape)}")


def make_seed(options: Options, device: torch.device) -> Tensor:
    """The key of the noise as an int64 tensor on ``device``, so that no step waits for the device."""
    seed, generator = options.seed, options.generator
    check_source(seed, generator)
    if seed is None:
        if generator is not None:
            check_recomputable(generator, device)
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    if isinstance(seed, Tensor):
        if seed.device != device:
            raise ValueError(f"seed must be on input's device {device}, got {seed.device}")
        return seed
    number: Any = seed if isinstance(seed, torch.SymInt) else int(seed)
    return torch.full((), number - 2**64 if number >= 2**63 else number, dtype=torch.int64, device=device)


def check_recomputable(generator, device):
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
                "a generator inside of torch.utils.checkpoint would draw other noise for the backward than for the "
                "loss: pass a seed drawn outside of the checkpoint, or generator=None, for torch restores its default "
                "generator"
            )
        frame = frame.f_back
