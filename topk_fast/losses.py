"""The door of all functions on logits: a call's arguments become one request, and its excesses a loss."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import autograd, backends, checks, loss_checks, ops, sharding
from .request import Labels, LossRequest, Search


def evaluate(input: Tensor, target: Tensor, loss: LossRequest) -> Tensor:
    """The loss of logits [N, L], [L] or [N, L, d1, ...], or their excesses."""
    class_dim = 0 if isinstance(input, Tensor) and input.dim() == 1 else 1
    input, group, wrap = sharding.local_part("input", input, class_dim, loss.options.process_group)
    target = target if wrap is None else sharding.replicated(target)
    with sharding.Meeting(group, "noised_excess" if loss.criterion is None else "noised_topk_loss") as meeting:
        checks.check_scores(input)
        checks.check_target(input, target, class_dim)
        n_classes = input.shape[class_dim] if group is None else None
        wanted, loss = loss_checks.check_loss(loss, n_classes, input.device, input.dtype)
        flat = input if input.dim() == 2 else flatten(input.movedim(class_dim, -1))
        labels = Labels(target if target.dim() == 1 else target.reshape(-1), loss.ignore_index, loss.exclude_target)
        backend = backends.resolve(loss.options.backend, flat, wanted.k)
        search = Search(flat, wanted, labels, backend)
        search = sharding.agree_on(meeting, search, loss, tensors={}, facts={"dtype": input.dtype})
    if loss.offset is not None:
        offset = sharding.own_classes(loss.offset, search).to(flat.dtype)
        search = search._replace(scores=flat + offset)
    if loss.criterion is None:
        result = _naming_wrong_labels(autograd.differentiable_excess, search)
    else:
        result = _naming_wrong_labels(autograd.loss, search, loss.criterion)
    result = shape_result(result, target.shape, loss)
    return result if wrap is None else wrap(result)


def _naming_wrong_labels(run, search: Search, *args) -> Tensor:
    """What ``run`` returns; the kernels stop at a wrong label but cannot name it.

    On a GPU a wrong label stops the device, whose memory cannot be read any more.
    """
    target, ignore_index, _ = search.labels
    if search.shards is not None:  # the ranks' meeting has checked the labels
        return run(search, *args)
    n_classes = search.scores.shape[1]
    if torch.compiler.is_compiling():
        target = ops.checked_labels(target, n_classes, ignore_index)
        return run(search._replace(labels=search.labels._replace(target=target)), *args)
    try:
        return run(search, *args)
    except RuntimeError:
        if target.is_cpu:
            checks.check_labels(target, n_classes, ignore_index)
        raise


def flatten(rows: Tensor) -> Tensor:
    """[..., L] as [N, L], also where a dimension is empty."""
    return rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])


def shape_result(result: Tensor, shape: torch.Size, loss: LossRequest) -> Tensor:
    """Losses [N] or excesses [N, M] in the shape of the rows; a reduced loss has no dimensions and keeps them."""
    if loss.criterion is None:
        return shape_ranks(result, shape, loss.k)
    return result.view(shape) if loss.criterion.reduction == "none" else result


def shape_ranks(excess: Tensor, shape: torch.Size, k) -> Tensor:
    """[N, M] in the shape of the rows, with the ranks last where ``k`` is a sequence of them."""
    return excess.view((*shape, *excess.shape[1:]) if isinstance(k, Sequence) else shape)
