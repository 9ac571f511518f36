"""Checks of the arguments of losses, which make the requests for them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

from torch import Tensor

from . import checks, noise_checks
from .criterion import LINKS, REDUCTIONS, Criterion
from .reference import arithmetic
from .request import LossRequest, Noise


def check_loss(loss: LossRequest, n_classes: int | None, device, dtype) -> tuple[Noise, LossRequest]:
    """The request for the noise, and the loss with its numbers checked; ``n_classes`` is None where it is not known."""
    least = int(bool(loss.exclude_target))
    ranks = tuple(one + 1 for one in checks.check_top(loss.k, n_classes, least=least, several=loss.several))
    wanted = noise_checks.check_noise(loss.options, ranks, device)
    loss = loss._replace(ignore_index=check_ignore_index(loss.ignore_index), exclude_target=bool(least))
    if loss.offset is not None:
        checks.check_class_vector("offset", loss.offset, n_classes, device)
    if loss.criterion is not None:
        criterion = check_criterion(loss.criterion, len(ranks), n_classes, device, arithmetic(dtype))
        loss = loss._replace(criterion=criterion)
    return wanted, loss


def check_criterion(criterion: Criterion, n_ranks: int, n_classes: int | None, device, dtype) -> Criterion:
    """The criterion with its tensors in ``dtype``; ``n_classes`` is None where it is not known yet."""
    criterion = check_link(criterion, n_ranks)
    if isinstance(criterion.margin, Tensor):
        checks.check_class_vector("margins", criterion.margin, n_classes, device)
        criterion = criterion._replace(margin=criterion.margin.to(dtype))
    if criterion.weight is not None:
        checks.check_class_vector("weight", criterion.weight, n_classes, device)
        criterion = criterion._replace(weight=criterion.weight.to(dtype))
    return criterion


def check_link(criterion: Criterion, n_ranks: int) -> Criterion:
    """A criterion's numbers; its tensors are left to `check_criterion`."""
    check_reduction(criterion.reduction)
    if criterion.link not in LINKS:
        raise ValueError(f"link must be {', '.join(map(repr, LINKS[:-1]))} or {LINKS[-1]!r}, got {criterion.link!r}")
    temperature = checks.check_positive("temperature", criterion.temperature)
    if temperature != 1.0 and criterion.link != "softplus":
        raise ValueError(f"temperature belongs to link='softplus', got {temperature} with link={criterion.link!r}")
    margin, weights = criterion.margin, criterion.rank_weights
    return criterion._replace(
        temperature=temperature,
        margin=margin if isinstance(margin, Tensor) else _check_margin(margin),
        scale=checks.check_positive("scale", criterion.scale),
        rank_weights=None if weights is None else _check_rank_weights(weights, n_ranks),
    )


def _check_margin(margin):
    if isinstance(margin, bool) or not isinstance(margin, (float, int, Real)):
        raise TypeError(f"margin must be a number or a tensor [L], got {type(margin).__name__}; see class_margins")
    return checks.check_real("margin", margin)


def _check_rank_weights(weights, n_ranks):
    if not isinstance(weights, Sequence) or isinstance(weights, (str, bytes)):
        raise TypeError(f"rank_weights must be a sequence of numbers, got {type(weights).__name__}")
    if len(weights) != n_ranks:
        raise ValueError(f"rank_weights must have a number for each of the {n_ranks} ranks of k, got {len(weights)}")
    weights = tuple(checks.check_real("rank_weights", one) for one in weights)
    if min(weights) < 0:
        raise ValueError(f"rank_weights must be at least 0, got {min(weights)}")
    return weights


def check_reduction(reduction):
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_ignore_index(ignore_index) -> int:
    return checks.check_integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)


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
