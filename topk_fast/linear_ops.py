r"""The ops of a linear layer and loss in one, and their derivatives.

.. math:: s = x W^T + b, \qquad
          \partial\ell / \partial x = \sum_{j} g_j w_j, \quad \partial\ell / \partial w_j = \sum_n g_{nj} x_n

The gradient g of the scores has at most B + 1 entries a row (`reference.entries`), so one matmul is enough: the forward
walks it in tiles of rows and classes and keeps the k best of each (row, sample), and the backward gathers B + 1 rows of
the weight per row of the input, and adds as many rows into the weight's gradient, class by class in a fixed order.
Second derivatives are those of the same sums with g held constant, as it is between the points where a rank changes hands.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import checks, ops, reference, sharding

_ROWS = 1024  # of a tile: enough for a matmul at full speed
_BYTES = {"cpu": 16 << 20}  # of a tile of logits; elsewhere _BYTES_ON_DEVICE
_BYTES_ON_DEVICE = 256 << 20
_SHORTEST = 1e-8  # F.cosine_similarity's: a shorter row is divided by this, which bounds its gradient


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1 in x's dtype, :math:`x / \\max(|x|, 10^{-8})`, with lengths and quotients of half precision in float32.

    float16 takes its smallest normal number, 6.1e-5, in place of 1e-8, whose inverse it could not hold.
    """
    wide = x.to(reference.arithmetic(x.dtype))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / length.clamp(min=_shortest(x.dtype))).to(x.dtype)


def _shortest(dtype: torch.dtype) -> float:
    return max(_SHORTEST, torch.finfo(dtype).tiny)


def count_chunk(chunk_size: int | None, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> int:
    """Classes of a tile, at least 1."""
    if chunk_size is not None:
        return min(checks.integer("chunk_size", chunk_size, 1, 2**31 - 1), max(1, weight.shape[0]))
    size = _BYTES.get(rows.device.type, _BYTES_ON_DEVICE) // (max(1, min(len(rows), _ROWS)) * dtype.itemsize)
    return max(1, min(size, weight.shape[0]))


# The forward's walk, an op for each backend of its search, so that torch.compile sees one step.

_SCHEMA = (
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? target, Tensor seed, int k, float epsilon, int n_sample, "
    "int first_class, bool dense, bool normalize, SymInt chunk_size, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)


def _walk(backend):
    def linear_candidates(
        input, weight, bias, target, seed, k, epsilon, n_sample, first_class, dense, normalize, chunk_size, dtype
    ):
        """The k best noised logits of this slice of classes [N, n_sample, k], their classes, the true class's logit."""
        n_rows, n_classes = input.shape[0], weight.shape[0]
        values, classes = reference.empty_lists(input.new_empty((n_rows, 0), dtype=dtype), k, n_sample)
        true_score = values.new_zeros(n_rows)
        tile = input.new_empty(min(n_rows, _ROWS) * min(chunk_size, n_classes), dtype=dtype)
        search = ops.kernel("candidates", backend)
        for row in range(0, n_rows, _ROWS):
            at = slice(row, row + _ROWS)
            x = input[at].to(dtype)
            for start in range(0, n_classes, chunk_size):
                part = slice(start, min(start + chunk_size, n_classes))
                w = _prepared(weight[part], normalize, dtype)
                logits = tile[: len(x) * len(w)].view(len(x), len(w))
                if bias is None:
                    torch.mm(x, w.t(), out=logits)
                else:
                    torch.addmm(bias[part].to(dtype), x, w.t(), out=logits)
                first = first_class + start
                found = search(logits, seed, k, epsilon, n_sample, row, first, dense)
                if start:
                    found = (torch.cat(pair, dim=2) for pair in zip((values[at], classes[at]), found))
                    found = reference.merge(*found, k)
                values[at], classes[at] = found
                if target is not None:
                    true_score[at] += sharding.own_scores(logits, target[at], first)
        return values, classes, true_score

    return linear_candidates


def _fake(input, weight, bias, target, seed, k, epsilon, n_sample, first_class, dense, normalize, chunk_size, dtype):
    values = input.new_empty((input.shape[0], n_sample, k), dtype=reference.arithmetic(dtype))
    return values, torch.empty_like(values, dtype=torch.int64), values.new_empty(input.shape[0])


def _prepared(weight: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """Rows of the weight as the matmul takes them."""
    return (unit_rows(weight) if normalize else weight).to(dtype)


class Options(NamedTuple):
    k: int  # the rank searched
    epsilon: float
    n_sample: int
    scale: float
    ignore_index: int
    dense: bool
    normalize: bool
    chunk: int
    dtype: torch.dtype
    sparse: bool


def _walk_and_hinge(backend):
    def linear_loss(rows, weight, bias, target, margins, seed, *options, shards=None):
        """Losses [N] and the class of each sample's k-th largest [N, n_sample]; classes of all ranks take part."""
        o = Options(*options)
        first = 0 if shards is None else shards.first_class
        lists = ops.kernel("linear_candidates", backend)(
            rows, weight, bias, target, seed, o.k, o.epsilon, o.n_sample, first, o.dense, o.normalize, o.chunk, o.dtype
        )
        values, classes, true_score = lists if shards is None else shards.best(*lists, target)
        return reference.loss_of(
            values[..., -1], classes[..., -1], true_score, target, margins, o.scale, o.ignore_index
        )[:2]

    return linear_loss


_LOSS_SCHEMA = (
    "(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? margins, Tensor seed, int k, float epsilon, "
    "int n_sample, float scale, int ignore_index, bool dense, bool normalize, SymInt chunk_size, ScalarType dtype, "
    "bool sparse_grad) -> (Tensor, Tensor)"
)


def _fake_loss(input, weight, bias, target, margins, seed, *options):
    o = Options(*options)
    losses = input.new_empty(input.shape[0], dtype=reference.arithmetic(o.dtype))
    return losses, input.new_empty((input.shape[0], o.n_sample), dtype=torch.int64)


class LinearLoss(Function):
    """Rows [N, D], already normalised where asked, and this rank's classes to losses [N]; keeps the class ids alone."""

    @staticmethod
    def forward(rows, weight, bias, target, margins, seed, options, shards, backend):
        if shards is None:
            return ops.kernel("linear_loss", backend)(rows, weight, bias, target, margins, seed, *options)
        return _walk_and_hinge(backend)(rows, weight, bias, target, margins, seed, *options, shards=shards)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, weight, bias, target, _, _, ctx.options, ctx.shards, _ = inputs
        losses, classes = output
        ctx.mark_non_differentiable(classes)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(rows, weight, target, losses, classes)

    @staticmethod
    def backward(ctx, grad, _):
        again = torch.is_grad_enabled()
        if again and ctx.shards is not None:
            raise RuntimeError(
                "a linear loss whose classes are sharded has no second derivative: call backward without create_graph"
            )
        if again and ctx.options.sparse:
            raise RuntimeError("a loss with sparse_grad=True has no second derivative: pass sparse_grad=False")
        rows, weight, target, losses, classes = ctx.saved_tensors
        first = 0 if ctx.shards is None else ctx.shards.first_class
        classes, values = reference.entries(grad, losses, classes, target, ctx.options.scale)
        values = values.masked_fill(losses.isnan()[:, None] & (classes == target[:, None]), math.nan)
        classes, order = classes.sort(dim=1)
        values, place = values.gather(1, order), classes - first
        repeated = F.pad(classes[:, 1:] == classes[:, :-1], (1, 0))  # equal classes have equal values: one is enough
        active = ~repeated & (place >= 0) & (place < weight.shape[0]) & (values != 0)
        values, place = values.masked_fill(~active, 0), place.masked_fill(~active, 0)
        spread = _Spread.apply if again else _Spread.forward
        of_rows, of_weight, of_bias = spread(
            values, place, active, rows, weight, ctx.bias_dtype, ctx.options, ctx.needs_input_grad[:3]
        )
        if of_rows is not None:
            of_rows = (of_rows if ctx.shards is None else ctx.shards.sum(of_rows)).to(rows.dtype)
        return of_rows, of_weight, of_bias, *[None] * 6


def apply_outside_of_graphs(*args):
    """`LinearLoss` where torch.compile traces: the graph breaks before it, and a full graph raises with the reason."""
    return torch.compiler.disable(_apply)(*args)


def _apply(*args):
    return LinearLoss.apply(*args)


# As the decorator torch.compiler.disable, which would import torch._dynamo, and Triton with it, at every import.
apply_outside_of_graphs._torchdynamo_disable = True
apply_outside_of_graphs._torchdynamo_disable_msg = (
    "sparse_grad=True makes gradients whose number of rows depends on data, which no full graph can hold: use "
    "sparse_grad=False, or compile only the layers before the loss"
)


class _Spread(Function):
    r"""Entries v [N, J] of the scores' gradient at the classes ``place`` to the gradients of rows, weight and bias.

    .. math:: \sum_j v_{nj} \hat w_{p_{nj}}, \quad \sum_{nj} v_{nj} x_n [p_{nj} = l] \, \partial \hat w_l / \partial w_l,
              \quad \sum_{nj} v_{nj} [p_{nj} = l]

    with :math:`\hat w` the weight's rows as the logits take them. A gradient that is not wanted is None.
    """

    @staticmethod
    def forward(values, place, active, rows, weight, bias_dtype, options, wanted):
        n_classes = weight.shape[0]
        of_rows = of_weight = of_bias = None
        if wanted[0]:
            of_rows = torch.zeros(rows.shape, dtype=values.dtype, device=rows.device)
            for j in range(values.shape[1] if n_classes else 0):
                picked = _prepared(weight[place[:, j]], options.normalize, options.dtype)
                of_rows.addcmul_(values[:, j, None], picked.to(values.dtype))
        if wanted[1] or wanted[2]:
            bags = _Bags(values, place, active, n_classes)
            if wanted[1]:
                of_weight = _weight_gradient(bags, rows.to(options.dtype), weight, options.normalize)
                of_weight = bags.spread(of_weight, options.sparse)
            if wanted[2]:
                of_bias = bags.spread(bags.sums(rows.new_ones((len(rows), 1)))[:, 0].to(bias_dtype), options.sparse)
        return of_rows, of_weight, of_bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, place, active, rows, weight, _, ctx.options, _ = inputs
        ctx.save_for_backward(values, place, active, rows, weight)

    @staticmethod
    def backward(ctx, g_rows, g_weight, g_bias):
        """By autograd, from the product of the three gradients with those that come in; holds [N, J, D]."""
        values, place, active, rows, weight = ctx.saved_tensors
        normalize = ctx.options.normalize

        def product(values, rows, weight):
            w = weight[place].to(values.dtype)  # [N, J, D]
            length = torch.linalg.vector_norm(w, dim=2, keepdim=True) if normalize else None
            shortest = _shortest(weight.dtype)
            unit = w / length.clamp(min=shortest) if normalize else w
            total = torch.zeros_like(values)
            if g_rows is not None:
                total = total + (unit * g_rows[:, None].to(values.dtype)).sum(2)
            if g_weight is not None:
                g = g_weight[place].to(values.dtype)
                g = _along_the_sphere(g, unit, length, shortest) if normalize else g
                total = total + (g * rows[:, None].to(values.dtype)).sum(2)
            if g_bias is not None:
                total = total + g_bias[place].to(values.dtype)
            return (total * values).sum()

        _, pullback = torch.func.vjp(product, values, rows, weight)
        of_values, of_rows, of_weight = pullback(values.new_ones(()))
        return of_values.masked_fill(~active, 0), None, None, of_rows, of_weight, None, None, None


def _along_the_sphere(x: Tensor, unit: Tensor, length: Tensor, shortest: float) -> Tensor:
    """The derivative of `unit_rows` at rows of ``length``, applied to x: what x has across the row, over its length."""
    along = (unit * x).sum(-1, keepdim=True).masked_fill(length < shortest, 0)
    return (x - unit * along) / length.clamp(min=shortest)


class _Bags:
    """The entries of the gradient ordered by class, then by row: a bag for each class that has some.

    The number of bags is at most that of entries, and of classes + 1: shapes never depend on data. Bags without a class
    are empty.
    """

    def __init__(self, values: Tensor, place: Tensor, active: Tensor, n_classes: int):
        n_rows, width = values.shape
        key, order = place.masked_fill(~active, n_classes).flatten().sort(stable=True)
        self.n_classes = n_classes
        self.row = torch.where(key < n_classes, order // width, n_rows)  # n_rows: a row of zeros
        self.value = values.flatten()[order]
        bag = F.pad((key[1:] != key[:-1]).cumsum(0), (min(1, len(key)), 0))
        n_bags = min(len(key), n_classes + 1)
        self.starts = torch.searchsorted(bag, torch.arange(n_bags + 1, device=key.device))
        self.classes = F.pad(key, (0, 1), value=n_classes)[self.starts[:-1]]  # n_classes: none

    def sums(self, x: Tensor) -> Tensor:
        """Sum of value * x[row] over each bag, in order: x [N, D] -> [bags, D]."""
        table = F.pad(x.to(self.value.dtype), (0, 0, 0, 1))
        return F.embedding_bag(
            self.row, table, self.starts, mode="sum", per_sample_weights=self.value, include_last_offset=True
        )

    def spread(self, sums: Tensor, sparse: bool) -> Tensor:
        """[bags, ...] -> [L, ...], dense or coalesced sparse; a bag without a class adds zeros to the last one."""
        shape = (self.n_classes, *sums.shape[1:])
        if sparse:
            used = int((self.classes < self.n_classes).sum())
            return torch.sparse_coo_tensor(
                self.classes[None, :used], sums[:used], shape, is_coalesced=True, check_invariants=False
            )
        out = sums.new_zeros(shape)
        return out.index_add_(0, self.classes.clamp(max=self.n_classes - 1), sums) if self.n_classes else out


def _weight_gradient(bags: _Bags, rows: Tensor, weight: Tensor, normalize: bool) -> Tensor:
    """The gradient of the weight's rows that have a bag [bags, D]."""
    sums = bags.sums(rows)
    if normalize and bags.n_classes:
        w = weight[bags.classes.clamp(max=bags.n_classes - 1)].to(sums.dtype)
        length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        shortest = _shortest(weight.dtype)
        sums = _along_the_sphere(sums, w / length.clamp(min=shortest), length, shortest)
    return sums.to(weight.dtype)


def _derivative(backend: str):
    """`LinearLoss`'s, for the op itself, so that exported graphs train."""

    def keep(ctx, inputs, output):
        LinearLoss.setup_context(ctx, (*inputs[:6], Options(*inputs[6:]), None, backend), output)

    def backward(ctx, *grads):
        return *LinearLoss.backward(ctx, *grads)[:6], *[None] * len(Options._fields)

    return keep, backward


ops.define("linear_candidates", _SCHEMA, _fake, _walk)
ops.define("linear_loss", _LOSS_SCHEMA, _fake_loss, _walk_and_hinge, _derivative)
