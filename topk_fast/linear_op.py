r"""The ops of a linear layer and search in one, and their derivatives.

.. math:: s = x W^T + b, \qquad
          \partial\ell / \partial x = \sum_{j} g_j w_j, \quad \partial\ell / \partial w_j = \sum_n g_{nj} x_n

The gradient g of the scores has at most B * M + 1 entries a row (`reference.entries`), so one matmul is enough: the
forward takes it in tiles of rows and classes and keeps the k best of each (row, sample), and the backward gathers as
many rows of the weight per row of the input, and adds as many rows into the weight's gradient, class by class in a
fixed order. Second derivatives are those of the same sums with g held constant, as it is between the points where a
rank changes hands.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, checks, ops, reference
from .linear_gradient import Spread, prepare
from .request import LABELS, LAYER, NOISE, Labels, Layer, LinearSearch, Noise, Place, without_noise

_ROWS = 1024  # of a tile: enough for a matmul at full speed
_BYTES = {"cpu": 16 << 20}  # of a tile of logits; elsewhere _BYTES_ON_DEVICE
_BYTES_ON_DEVICE = 256 << 20
_N = len(Noise._fields)  # arguments of the noise


def count_chunk(chunk_size: int | None, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> int:
    """Classes of a tile, at least 1."""
    if chunk_size is not None:
        return min(checks.check_integer("chunk_size", chunk_size, 1, 2**31 - 1), max(1, weight.shape[0]))
    size = _BYTES.get(rows.device.type, _BYTES_ON_DEVICE) // (max(1, min(rows.shape[0], _ROWS)) * dtype.itemsize)
    return max(1, min(size, weight.shape[0]))


def _candidates_of(backend):
    def linear_candidates(input, weight, bias, target, *args):
        """The k best noised logits of this slice of classes [N, n_sample, k], their classes, the true class's logit
        [N], and the ``n_best`` largest logits [N, 1, n_best] with their classes.
        """
        wanted, layer, first_class = Noise(*args[:_N]), Layer(*args[_N:-1]), args[-1]
        n_rows, n_classes = input.shape[0], weight.shape[0]
        searches = (wanted, without_noise(wanted.seed, layer.n_best))
        nothing = input.new_empty((n_rows, 0), dtype=layer.dtype)
        lists = [reference.empty_lists(nothing, one.k, one.n_sample) for one in searches]
        true_score = lists[0][0].new_zeros(n_rows)
        tile = input.new_empty(min(n_rows, _ROWS) * min(layer.chunk, n_classes), dtype=layer.dtype)
        search = ops.kernel("candidates", backend)
        for row in range(0, n_rows, _ROWS):
            at = slice(row, row + _ROWS)
            x = input[at].to(layer.dtype)
            for start in range(0, n_classes, layer.chunk):
                part = slice(start, min(start + layer.chunk, n_classes))
                w = prepare(weight[part], layer)
                logits = tile[: len(x) * len(w)].view(len(x), len(w))
                if bias is None:
                    torch.mm(x, w.t(), out=logits)
                else:
                    torch.addmm(bias[part].to(layer.dtype), x, w.t(), out=logits)
                place = Place(row, first_class + start)
                for one, (values, classes) in zip(searches, lists):
                    if one.k == 0:
                        continue
                    found = search(logits, *one, *place)
                    if start:
                        found = (torch.cat(pair, dim=2) for pair in zip((values[at], classes[at]), found))
                        found = reference.merge(*found, one.k)
                    values[at], classes[at] = found
                if target is not None:
                    true_score[at] += reference.own_scores(logits, target[at], place.first_class)
        return *lists[0], true_score, *lists[1]

    return linear_candidates


def _fake_candidates(input, weight, bias, target, *args):
    wanted, layer = Noise(*args[:_N]), Layer(*args[_N:-1])
    n_rows, dtype = input.shape[0], reference.arithmetic(layer.dtype)
    values, best = (
        input.new_empty(shape, dtype=dtype)
        for shape in ((n_rows, wanted.n_sample, wanted.k), (n_rows, 1, layer.n_best))
    )
    classes, best_classes = (torch.empty_like(x, dtype=torch.int64) for x in (values, best))
    return values, classes, values.new_empty(n_rows), best, best_classes


def _excess(search: LinearSearch) -> tuple[Tensor, Tensor, Tensor]:
    """Excesses [N, M], class ids [N, B, M] and the classes of the largest logits [N, n_best].

    Where classes lie on several ranks these are over the classes of all of them.
    """
    rows, weight, bias, wanted, labels, layer, backend, shards = search
    values, classes, true_score, best, best_classes = ops.kernel("linear_candidates", backend)(
        rows, weight, bias, labels.target, *wanted, *layer, search.first_class
    )
    if shards is not None:
        if layer.n_best:
            _, best_classes, _ = shards.merge_lists(best, best_classes, true_score, labels.target)
        values, classes, true_score = shards.merge_lists(values, classes, true_score, labels.target)
    excess, classes = reference.excess_of(values, classes, true_score, wanted.ranks, labels)
    return excess, classes, best_classes[:, 0].contiguous()


def _excess_of(backend):
    def linear_excess(input, weight, bias, *args):
        return _excess(LinearSearch(input, weight, bias, *_requests(args), backend))

    return linear_excess


def _requests(args):
    labels = _N + len(Labels._fields)
    return Noise(*args[:_N]), Labels(*args[_N:labels]), Layer(*args[labels:])


def _fake_excess(input, weight, bias, *args):
    wanted, _, layer = _requests(args)
    best = input.new_empty((input.shape[0], layer.n_best), dtype=torch.int64)
    return *ops.fake_excess(input, wanted, layer.dtype), best


class _LinearExcess(autograd.Derivative):
    """Rows [N, D], already normalised where asked, and this rank's classes to what `_excess` returns."""

    @staticmethod
    def forward(rows, weight, bias, schedule, search):
        noise = search.noise._replace(schedule=schedule)
        return _excess(search._replace(rows=rows, weight=weight, bias=bias, noise=noise))

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, weight, bias, _, search = inputs
        _keep(ctx, search._replace(rows=rows, weight=weight, bias=bias), *output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        return *_differentiate(ctx, grad), None, None


def _keep(ctx, search: LinearSearch, classes: Tensor, best: Tensor) -> None:
    rows, weight, bias, _, labels, ctx.layer, _, ctx.shards = search
    ctx.mark_non_differentiable(classes, best)
    ctx.bias_dtype, ctx.ignore_index = None if bias is None else bias.dtype, labels.ignore_index
    ctx.save_for_backward(rows, weight, labels.target, classes)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of rows, weight and bias from that of the excesses [N, M]; ``ctx`` as `_keep` filled it."""
    again = torch.is_grad_enabled()
    if again and ctx.shards is not None:
        raise RuntimeError(
            "a linear loss whose classes are sharded has no second derivative: call backward without create_graph"
        )
    if again and ctx.layer.sparse:
        raise RuntimeError(
            "a loss with sparse_grad=True has neither a second derivative nor one of torch.func: pass sparse_grad=False"
        )
    autograd.refuse_batched(grad)
    rows, weight, target, ids = ctx.saved_tensors
    first = 0 if ctx.shards is None else ctx.shards.first_class
    grad = grad.to(reference.arithmetic(ctx.layer.dtype))
    classes, values, present = reference.entries(grad, ids, Labels(target, ctx.ignore_index))
    values = values.masked_fill(reference.marks_nan(ids)[:, None] & (classes == target[:, None]), math.nan)
    classes, order = classes.sort(dim=1)
    values, present, place = values.gather(1, order), present.gather(1, order), classes - first
    repeated = F.pad(classes[:, 1:] == classes[:, :-1], (1, 0))  # equal classes have equal values: one is enough
    active = present & ~repeated & (place >= 0) & (place < weight.shape[0])
    if not again:  # an entry of 0 has derivatives, too
        active = active & (values != 0)
    values, place = values.masked_fill(~active, 0), place.masked_fill(~active, 0)
    spread = Spread.apply if again else Spread.forward
    of_rows, of_weight, of_bias = spread(
        values, place, active, rows, weight, ctx.bias_dtype, ctx.layer, ctx.needs_input_grad[:3]
    )
    if of_rows is not None:
        of_rows = (of_rows if ctx.shards is None else ctx.shards.sum(of_rows)).to(rows.dtype)
    return of_rows, of_weight, of_bias


def linear_excess(search: LinearSearch) -> tuple[Tensor, Tensor]:
    """The excesses [N, M] of a linear layer's logits, differentiable in rows, weight and bias, and the classes of the
    largest logits [N, n_best].

    The excesses are also differentiable in an epsilon that is learned.
    """
    rows, weight, bias, wanted, labels, layer, backend, shards = search
    epsilon, wanted = wanted.learned_epsilon, wanted.without_derivative
    if layer.sparse and torch.compiler.is_dynamo_compiling():
        excess, classes, best = _apply_outside_of_graphs(rows, weight, bias, wanted.schedule, search)
    elif shards is None and torch.compiler.is_compiling():  # the op has a derivative of its own, for graphs
        excess, classes, best = ops.kernel("linear_excess", backend)(rows, weight, bias, *wanted, *labels, *layer)
    else:
        excess, classes, best = _LinearExcess.apply(rows, weight, bias, wanted.schedule, search)
    if epsilon is None:
        return excess, best
    return autograd.depending_on(epsilon, excess, _clean_excess(search, classes)), best


@torch.no_grad()
def _clean_excess(search: LinearSearch, classes: Tensor) -> Tensor:
    """The excesses [N, M] of these classes [N, B, M] without noise."""
    layer, bias, dtype = search.layer, search.bias, reference.arithmetic(search.layer.dtype)
    rows = search.rows.to(layer.dtype).to(dtype)

    def logits(place):
        product = (rows * prepare(search.weight[place], layer).to(dtype)).sum(1)
        return (product if bias is None else product + bias[place].to(dtype)).to(layer.dtype).to(dtype)

    columns = classes.clamp(min=0).flatten(1).unbind(1)
    picked = torch.stack([logits(place) for place in columns], dim=1).view(classes.shape)
    return reference.clean_excess(picked, logits(search.labels.known), classes, search.labels)


def _apply_outside_of_graphs(*args):
    """Runs `_LinearExcess` where torch.compile traces: the graph breaks before it, and a full graph says why."""
    return torch.compiler.disable(_apply)(*args)


def _apply(*args):
    return _LinearExcess.apply(*args)


# As the decorator torch.compiler.disable, which would import torch._dynamo, and Triton with it, at every import.
_apply_outside_of_graphs._torchdynamo_disable = True  # type: ignore[attr-defined]
_WHY = (
    "sparse_grad=True makes gradients whose number of rows depends on data, which no full graph can hold: use "
    "sparse_grad=False, or compile only the layers before the loss"
)
_apply_outside_of_graphs._torchdynamo_disable_msg = _WHY  # type: ignore[attr-defined]


def _derivative_of(backend: str):
    """`_LinearExcess`'s derivative, for the op itself."""

    def keep(ctx, inputs, output):
        _keep(ctx, LinearSearch(*inputs[:3], *_requests(inputs[3:]), backend), *output[1:])
        ctx.n_others = len(inputs) - 3

    def backward(ctx, grad, *_):
        return *_differentiate(ctx, grad), *[None] * ctx.n_others

    return keep, backward


_INPUTS = "Tensor input, Tensor weight, Tensor? bias"
ops.define(
    "linear_candidates",
    f"({_INPUTS}, Tensor? target, {NOISE}, {LAYER}, int first_class) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_candidates,
    _candidates_of,
)
ops.define(
    "linear_excess",
    f"({_INPUTS}, {NOISE}, {LABELS}, {LAYER}) -> (Tensor, Tensor, Tensor)",
    _fake_excess,
    _excess_of,
)
ops.register_derivative("linear_excess", _derivative_of)
