r"""The functions and their checks: smoothed top-K values and the noised top-K losses.

Source of all: Garcin, Servajean, Joly, Salmon, "Stochastic smoothing of the top-K calibrated hinge loss for deep
imbalanced classification", ICML 2022, https://proceedings.mlr.press/v162/garcin22a.html.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, checks, ops, sharding
from .linear import linear_noised_topk_loss, linear_topk
from .reference import arithmetic

__all__ = [
    "bal_noised_topk_loss",
    "class_margins",
    "imbal_noised_topk_loss",
    "linear_noised_topk_loss",
    "linear_topk",
    "noised_topk",
    "noised_topk_candidates",
]


def noised_topk(
    input: Tensor,
    k: int,
    epsilon: float = 1.0,
    n_sample: int = 5,
    dim: int = -1,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    sampler: str = "auto",
    backend: str = "auto",
) -> Tensor:
    r"""Smoothed, differentiable k-th largest value along a dimension.

    .. math:: top = \frac1B \sum_{b=1}^{B} (s + \epsilon Z_b)_{[k]}, \qquad Z_b \sim N(0, I_L)

    Its gradient is, for each entry, the share of the samples in which that entry was the k-th largest.

    Args:
        input: scores, float32, float64, bfloat16 or float16; L entries along ``dim``. -inf masks an entry; a row
            with fewer than k finite scores has the value -inf, one with a NaN has NaN.
        k: rank, 1 to L; 1 is the maximum.
        epsilon: noise level, >= 0, in units of the scores; 0 gives the plain k-th largest value.
        n_sample: number B of noise vectors, >= 1.
        dim: the dimension that is searched.
        seed: fixes the noise: an int, -2**63 to 2**64 - 1 (negative ones by two's complement), or an int64 tensor
            without dimensions on input's device. None draws it from ``generator``.
        generator: source of the seed, on input's device; None is torch's default one.
        sampler: "thinned" draws noise only for entries that can matter, "dense" for all of them; both are exact and
            differ in their noise. "auto" is "thinned".
        backend: "auto", "cpp", "torch", "triton" or "cuda"; same seed, same bits in all.

    Returns:
        Tensor of input's shape without ``dim``; float64 for float64 scores, else float32.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import noised_topk
        >>> noised_topk(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), k=2, epsilon=0.0)
        tensor([3.])
    """
    checks.scores(input)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a tensor without dimensions")
    dim = checks.dimension(dim)
    if not -input.dim() <= dim < input.dim():
        raise IndexError(f"dim must be in [{-input.dim()}, {input.dim() - 1}], got {dim}")
    rows = input.movedim(dim, -1)
    n_classes = rows.shape[-1]
    k = checks.integer("k", k, 1, n_classes, "L")
    epsilon, n_sample = checks.noise(epsilon, n_sample)
    seed = checks.seed(seed, generator, input.device)
    flat = _flatten(rows)
    backend = backends.resolve(backend, flat, k)
    top = ops.smoothed(flat, seed, k, epsilon, n_sample, checks.dense(sampler), backend=backend)
    return top.view(rows.shape[:-1])


def bal_noised_topk_loss(
    input: Tensor,
    target: Tensor,
    k: int,
    epsilon: float = 1.0,
    n_sample: int = 5,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""Balanced noised top-K loss: a hinge of the smoothed (K+1)-th largest score against the true class's score.

    .. math:: \ell(s, y) = \max(0,\; 1 + top_{K+1}(s) - s_y)

    with :math:`top_{K+1}` the value of :func:`noised_topk` for rank K + 1 over all classes, the true one too. With
    ``epsilon=0`` it is the top-K calibrated hinge of Yang & Koyejo (ICML 2020).

    Args:
        input: logits [N, L], [L], or [N, L, d1, ...] as for :class:`torch.nn.CrossEntropyLoss`; float32, float64,
            bfloat16 or float16.
        target: true classes, int64 in [0, L - 1] or ``ignore_index``: [N], no dimension, or [N, d1, ...].
        k: the K of top-K accuracy, 1 to L - 1.
        epsilon: noise level, >= 0, in units of the logits. 1.0 suits logits of a plain linear layer.
        n_sample: number B of noise vectors, >= 1. The paper uses 5 and finds little gain beyond.
        reduction: "mean" over the rows that are not ignored, "sum" or "none".
        ignore_index: rows with this target have loss 0 and no gradient.
        generator, seed, sampler, backend: as in :func:`noised_topk`.
        process_group: ranks over which the classes are sharded: ``input`` holds this rank's, contiguous in the order of
            ranks, any number of them; target and all else are the same on all ranks, and the seed is rank 0's. Every
            rank returns the loss over all classes and has the gradient of its own. A DTensor sharded along its
            classes needs no process_group and gets a DTensor back.

    Returns:
        A tensor without dimensions, or with target's shape for ``reduction="none"``; float64 for float64 logits,
        else float32. NaN in a row of logits makes its loss and gradient NaN.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import bal_noised_topk_loss
        >>> logits = torch.tensor([[2.0, 1.5, -3.0], [7.5, 4.0, -1.5]])
        >>> bal_noised_topk_loss(logits, torch.tensor([0, 2]), k=1, epsilon=0.0, reduction="none")
        tensor([0.5000, 6.5000])
    """
    return _loss(
        input, target, None, 1.0, k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend,
        process_group,
    )  # fmt: skip


def imbal_noised_topk_loss(
    input: Tensor,
    target: Tensor,
    k: int,
    margins: Tensor,
    epsilon: float,
    scale: float = 50,
    n_sample: int = 5,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""Noised top-K loss with a margin for each class, larger for rarer ones; for long-tailed data.

    .. math:: \ell(s, y) = \max(0,\; scale \, (m_y + top_{K+1}(s) - s_y))

    Args:
        input, target, n_sample, reduction, ignore_index: as in :func:`bal_noised_topk_loss`. The default ``scale``
            assumes cosine logits, in [-1, 1], as :class:`topk_fast.NormedLinear` makes them.
        k: the K of top-K accuracy, 1 to L - 1.
        margins: margins m [L] on input's device, see :func:`class_margins`; constants, without gradient.
        epsilon: noise level, >= 0; for cosine logits some 0.01 to 0.1.
        scale: factor of the hinge, > 0. Use 1 for logits that are not normalised.
        generator, seed, sampler, backend: as in :func:`noised_topk`.
        process_group: as in :func:`bal_noised_topk_loss`; margins are those of all classes on every rank.

    Returns:
        As :func:`bal_noised_topk_loss`.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import class_margins, imbal_noised_topk_loss
        >>> margins = class_margins([16, 1, 81], max_m=0.3)
        >>> logits = torch.tensor([[0.5, 0.25, -0.5]])
        >>> imbal_noised_topk_loss(logits, torch.tensor([1]), 1, margins, epsilon=0.0, scale=10)
        tensor(3.)
    """
    if margins is None:
        raise TypeError("margins must be a tensor, got NoneType; see class_margins")
    return _loss(
        input, target, margins, scale, k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend,
        process_group,
    )  # fmt: skip


def class_margins(cls_num_list: Sequence[int] | Tensor, max_m: float) -> Tensor:
    r"""Margins that grow as a class gets rarer: the LDAM rule (Cao et al., NeurIPS 2019) that the paper uses.

    .. math:: m_j = max\_m \cdot n_j^{-1/4} / \max_i n_i^{-1/4}

    Args:
        cls_num_list: number of training examples n_j of each class, all positive; L of them.
        max_m: margin of the rarest class, >= 0; in units of the logits.

    Returns:
        float32 tensor [L], on the device of ``cls_num_list`` if that is a tensor, else on torch's default device.

    Raises:
        TypeError, ValueError: counts that are not a list of positive numbers, or a negative ``max_m``.

    Example:
        >>> from topk_fast.functional import class_margins
        >>> class_margins([16, 1, 81], max_m=0.3)
        tensor([0.1500, 0.3000, 0.1000])
    """
    max_m = checks.real("max_m", max_m)
    if not max_m >= 0:
        raise ValueError(f"max_m must be at least 0, got {max_m}")
    counts = checks.counts(cls_num_list)
    margins = [1.0 / n**0.25 for n in counts]
    factor = max_m / max(margins)
    device = cls_num_list.device if isinstance(cls_num_list, Tensor) else None
    return torch.tensor([m * factor for m in margins], dtype=torch.float32, device=device)


def noised_topk_candidates(
    scores: Tensor,
    k: int,
    epsilon: float = 1.0,
    n_sample: int = 5,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    first_class: int = 0,
    sampler: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k best noised scores of every row and sample, best first; no gradient.

    What losses over chunks or shards of classes merge: search each slice with its ``first_class`` and the same seed,
    then keep the k best of all. A slice may have fewer than k classes.

    Args:
        scores: [N, L], a slice of rows and classes; dtypes as in :func:`noised_topk`.
        k: length of each list, >= 1. Where fewer than k scores are finite it ends in (-inf, -1).
        epsilon, n_sample, seed, generator, backend: as in :func:`noised_topk`.
        first_row, first_class: global row and class of ``scores[0, 0]``: draws belong to global ones.
        sampler: as in :func:`noised_topk`; only with "dense" the merged lists do not depend on the slices, bit for
            bit (with "thinned" they do not in distribution).

    Returns:
        Values [N, n_sample, k], float64 for float64 scores, else float32, and global classes, int64. Rows with a NaN
        hold NaN and -1.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import noised_topk_candidates
        >>> values, classes = noised_topk_candidates(torch.tensor([[4.0, 1.0, 3.0]]), 2, epsilon=0.0, n_sample=1)
        >>> values, classes
        (tensor([[[4., 3.]]]), tensor([[[0, 2]]]))
    """
    checks.scores(scores, "scores")
    if scores.dim() != 2:
        raise ValueError(f"scores must be [N, L], got shape {list(scores.shape)}")
    n_classes = scores.shape[1]
    if n_classes == 0:
        raise ValueError("scores must have at least one class, got shape " + str(list(scores.shape)))
    k = checks.integer("k", k, 1, 2**31 - 1)
    epsilon, n_sample = checks.noise(epsilon, n_sample)
    first_row = checks.integer("first_row", first_row, 0, 2**32 - 1)
    first_class = checks.integer("first_class", first_class, 0, 2**31 - 1 - n_classes, "2**31 - 1 - L")
    seed = checks.seed(seed, generator, scores.device)
    dense, backend = checks.dense(sampler), backends.resolve(backend, scores, k)
    return ops.candidates(scores, seed, k, epsilon, n_sample, first_row, first_class, dense, backend=backend)


def _loss(
    input, target, margins, scale, k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend,
    process_group,
):  # fmt: skip
    class_dim = 0 if isinstance(input, Tensor) and input.dim() == 1 else 1
    input, process_group, wrap = sharding.local_part("input", input, class_dim, process_group)
    target = target if wrap is None else sharding.replicated(target)
    with sharding.Meeting(process_group, "noised_topk_loss") as meeting:
        checks.reduction(reduction)
        checks.scores(input)
        checks.target(input, target, class_dim)
        n_local = input.shape[class_dim]
        n_classes = n_local if process_group is None else None
        k = checks.rank(k, n_classes)
        epsilon, n_sample = checks.noise(epsilon, n_sample)
        scale, dense, ignore_index = checks.scale(scale), checks.dense(sampler), checks.ignored(ignore_index)
        margins = checks.margins(margins, n_classes, input.device, arithmetic(input.dtype))
        fixed_seed, seed = seed is not None, checks.seed(seed, generator, input.device)
        flat = input if input.dim() == 2 else _flatten(input.movedim(class_dim, -1))
        labels = target if target.dim() == 1 else target.reshape(-1)
        backend = backends.resolve(backend, flat, k + 1)
        shards = meeting.agree(
            n_local, labels, margins, k, seed, fixed_seed, ignore_index, epsilon=epsilon, n_sample=n_sample, scale=scale,
            dense=dense, dtype=input.dtype,
        )  # fmt: skip
    if shards is not None:
        losses = sharding.loss(
            flat, labels, margins, shards, k + 1, epsilon, n_sample, scale, ignore_index, dense, backend
        )
        losses = ops.reduce(losses, (labels != ignore_index).sum().to(losses.dtype), reduction)
    else:
        if torch.compiler.is_compiling():
            labels = ops.checked_labels(labels, n_classes, ignore_index)
        try:
            losses = ops.loss(
                flat, labels, margins, seed, k + 1, epsilon, n_sample, scale, ignore_index, dense,
                reduction=reduction, backend=backend,
            )  # fmt: skip
        except RuntimeError:
            checks.labels(labels, n_classes, ignore_index)  # the kernels stop at a bad label but cannot name it
            raise
    losses = losses.view(target.shape) if reduction == "none" else losses
    return losses if wrap is None else wrap(losses)


def _flatten(rows: Tensor) -> Tensor:
    """[..., L] as [N, L], also where a dimension is empty."""
    return rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
