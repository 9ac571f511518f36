"""The door of all functions on a linear layer: a call's arguments become one request, and its excesses a loss."""

import torch
from torch import Tensor

from . import backends, checks, linear_op, loss_checks, ops, sharding
from .linear_gradient import unit_rows
from .losses import flatten, shape_ranks, shape_result
from .request import Labels, Layer, Linear, LinearSearch, LossRequest


def evaluate(input: Tensor, target: Tensor, linear: Linear, loss: LossRequest) -> Tensor:
    """The loss of a linear layer's logits, or their excesses."""
    return evaluate_with_hits(input, target, linear, loss)[0]


def evaluate_with_hits(
    input: Tensor, target: Tensor, linear: Linear, loss: LossRequest
) -> tuple[Tensor, Tensor | None]:
    """The loss or the excesses; and whether the true class has one of the K largest logits, where that is wanted."""
    linear, group, wrap = own_classes(linear, loss.options.process_group)
    if wrap is not None:
        input, target = sharding.replicated(input), sharding.replicated(target)
        if linear.sparse_grad:
            raise ValueError(
                "sparse_grad=True needs a plain weight, got a DTensor: pass its to_local() and a process_group"
            )
    function = "linear_noised_excess" if loss.criterion is None else "linear_noised_topk_loss"
    with sharding.Meeting(group, function, from_dtensor=wrap is not None) as meeting:
        rows, layer = check_layer(input, linear)
        checks.check_target(input, target, input.dim() - 1)
        n_classes = linear.weight.shape[0] if group is None else None
        hits = _check_hits(linear, loss, n_classes)
        layer = layer._replace(n_best=max(hits, default=0))
        wanted, loss = loss_checks.check_loss(loss, n_classes, input.device, layer.dtype)
        if layer.sparse:
            checks.check_leaves(weight=linear.weight, bias=linear.bias)
        if layer.sparse or group is not None and wrap is None:
            sharding.check_unmanaged(linear.weight, layer.sparse, group)
        labels = Labels(target.reshape(-1), loss.ignore_index, loss.exclude_target)
        backend = resolve(loss.options.backend, rows, layer, max(wanted.k, layer.n_best))
        search = sharding.agree_on(
            meeting,
            LinearSearch(rows, linear.weight, linear.bias, wanted, labels, layer, backend),
            loss,
            tensors={"input": rows},
            facts=facts_of(layer, rows)
            | {
                "input_requires_grad": rows.requires_grad and torch.is_grad_enabled(),
                "return_hits": hits,
                "n_classes": linear.n_classes,
            },
        )
        if search.shards is not None:
            _check_hits(linear, loss, search.shards.n_classes)
    if search.shards is None:
        known = ops.checked_labels(labels.target, search.n_classes, labels.ignore_index)
        search = search._replace(labels=labels._replace(target=known))
    if loss.offset is not None:
        offset = sharding.own_classes(loss.offset, search)
        search = search._replace(bias=offset if search.bias is None else search.bias + offset)
    if layer.normalize:
        search = search._replace(rows=unit_rows(rows))
    excess, best = linear_op.linear_excess(search)
    result = excess if loss.criterion is None else loss.criterion.reduced(excess, search.labels)
    result = shape_result(result, target.shape, loss)
    found = None
    if hits:
        is_target = (best == labels.target[:, None]) & (labels.target != labels.ignore_index)[:, None]  # [N, n_best]
        found = torch.stack([is_target[:, :k].any(1) for k in hits], dim=1)
        found = shape_ranks(found, target.shape, linear.return_hits)
    if wrap is not None:
        result, found = wrap(result), found if found is None else wrap(found)
    return result, found


def _check_hits(linear: Linear, loss: LossRequest, n_classes: int | None) -> tuple[int, ...]:
    """The Ks of the hits that are wanted; ``n_classes`` is None where L is not known yet."""
    if linear.return_hits is None:
        return ()
    if loss.offset is not None:
        raise ValueError(
            "return_hits does not go with an offset, with which the loss ranks the logits and without which classes "
            "are predicted: compare head.topk(features, k) with the target instead"
        )
    high, name = (2**31 - 1, None) if n_classes is None else (n_classes, "L")
    return checks.check_ranks(linear.return_hits, 1, high, name, "return_hits")


def own_classes(linear: Linear, process_group):
    """A layer of this rank's classes, their group, and how to return a DTensor, where the weight is one."""
    weight, group, wrap = sharding.local_part("linear_weight", linear.weight, 0, process_group)
    bias = linear.bias if wrap is None else sharding.local_part("linear_bias", linear.bias, 0, None)[0]
    return linear._replace(weight=weight, bias=bias), group, wrap


def check_layer(input: Tensor, linear: Linear) -> tuple[Tensor, Layer]:
    """The features as rows [N, D], and the layer as the ops take it."""
    dtype = checks.check_layer(input, linear.weight, linear.bias)
    rows = flatten(input)
    chunk = linear_op.count_chunk(linear.chunk_size, rows, linear.weight, dtype)
    return rows, Layer(bool(linear.normalize), chunk, dtype, bool(linear.sparse_grad))


def resolve(backend: str, rows: Tensor, layer: Layer, k: int) -> str:
    return backends.resolve(backend, rows.new_empty((0, layer.chunk), dtype=layer.dtype), k)


def facts_of(layer: Layer, rows: Tensor) -> dict:
    """What the ranks must have in common, besides the bits of ``rows``."""
    return {"normalize": layer.normalize, "dtype": layer.dtype, "width": rows.shape[1]}
