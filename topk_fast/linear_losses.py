"""The door of all functions on a linear layer: a call's arguments become one request, and its excesses a loss."""

from torch import Tensor

from . import backends, checks, linear_op, loss_checks, ops, sharding
from .linear_gradient import unit_rows
from .losses import shape_result
from .request import Labels, Layer, Linear, LinearSearch, LossRequest


def evaluate(input: Tensor, target: Tensor, linear: Linear, loss: LossRequest) -> Tensor:
    """The loss of a linear layer's logits, or their excesses."""
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
        wanted, loss = loss_checks.check_loss(loss, n_classes, input.device, layer.dtype)
        if layer.sparse:
            checks.check_leaves(weight=linear.weight, bias=linear.bias)
            if wanted.learned_epsilon is not None and not (linear.bias is None and loss.offset is None):
                raise ValueError(
                    "sparse_grad=True with a bias or an offset cannot learn epsilon: pass neither, or sparse_grad=False"
                )
            sharding.check_unmanaged(linear.weight)
        labels = Labels(target.reshape(-1), loss.ignore_index, loss.exclude_target)
        backend = resolve(loss.options.backend, rows, layer, wanted.k)
        search = sharding.agree_on(
            meeting,
            LinearSearch(rows, linear.weight, linear.bias, wanted, labels, layer, backend),
            loss,
            tensors={"input": rows},
            facts=facts_of(layer, rows) | {"input_requires_grad": rows.requires_grad},
        )
    if search.shards is None:
        known = ops.checked_labels(labels.target, search.n_classes, labels.ignore_index)
        search = search._replace(labels=labels._replace(target=known))
    if loss.offset is not None:
        offset = sharding.own_classes(loss.offset, search)
        search = search._replace(bias=offset if search.bias is None else search.bias + offset)
    if layer.normalize:
        search = search._replace(rows=unit_rows(rows))
    excess = linear_op.linear_excess(search)
    result = excess if loss.criterion is None else loss.criterion.reduced(excess, search.labels)
    result = shape_result(result, target.shape, loss)
    return result if wrap is None else wrap(result)


def own_classes(linear: Linear, process_group):
    """A layer of this rank's classes, their group, and how to return a DTensor, where the weight is one."""
    weight, group, wrap = sharding.local_part("linear_weight", linear.weight, 0, process_group)
    bias = linear.bias if wrap is None else sharding.local_part("linear_bias", linear.bias, 0, None)[0]
    return linear._replace(weight=weight, bias=bias), group, wrap


def check_layer(input: Tensor, linear: Linear) -> tuple[Tensor, Layer]:
    """The features as rows [N, D], and the layer as the ops take it."""
    dtype = checks.check_layer(input, linear.weight, linear.bias)
    rows = input.reshape(-1, input.shape[-1])
    chunk = linear_op.count_chunk(linear.chunk_size, rows, linear.weight, dtype)
    return rows, Layer(bool(linear.normalize), chunk, dtype, bool(linear.sparse_grad))


def resolve(backend: str, rows: Tensor, layer: Layer, k: int) -> str:
    return backends.resolve(backend, rows.new_empty((0, layer.chunk), dtype=layer.dtype), k)


def facts_of(layer: Layer, rows: Tensor) -> dict:
    """What the ranks must have in common, besides the bits of ``rows``."""
    return {"normalize": layer.normalize, "dtype": layer.dtype, "width": rows.shape[1]}
