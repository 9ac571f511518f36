r"""The gradients of a linear layer from the few entries of its logits' gradient; no second matmul.

Sums over the rows of a class run in a fixed order, so that they have the same bits in every run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .autograd import Derivative
from .request import Layer

_SHORTEST = 1e-8  # F.cosine_similarity's: a shorter row is divided by this, which bounds its gradient


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1 in x's dtype, :math:`x / \\max(|x|, 10^{-8})`, with lengths and quotients of half precision in
    float32.

    float16 takes its smallest normal number, 6.1e-5, in place of 1e-8, whose inverse it could not hold.
    """
    wide = x.to(reference.arithmetic(x.dtype))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / length.clamp(min=_shortest(x.dtype))).to(x.dtype)


def _shortest(dtype: torch.dtype) -> float:
    return max(_SHORTEST, torch.finfo(dtype).tiny)


def prepare(weight: Tensor, layer: Layer) -> Tensor:
    """Rows of the weight as the matmul takes them."""
    return (unit_rows(weight) if layer.normalize else weight).to(layer.dtype)


class Spread(Derivative):
    r"""Entries v [N, J] of the scores' gradient at the classes ``place`` to the gradients of rows, weight and bias.

    .. math:: \sum_j v_{nj} \hat w_{p_{nj}}, \quad \sum_{nj} v_{nj} x_n [p_{nj} = l] \, \partial \hat w_l / \partial
    w_l,
              \quad \sum_{nj} v_{nj} [p_{nj} = l]

    with :math:`\hat w` the weight's rows as the logits take them. A gradient that is not wanted is None.
    """

    @staticmethod
    def forward(values, place, active, rows, weight, bias_dtype, layer, wanted):
        n_classes = weight.shape[0]
        of_rows = of_weight = of_bias = None
        if wanted[0]:
            of_rows = torch.zeros(rows.shape, dtype=values.dtype, device=rows.device)
            for j in range(values.shape[1] if n_classes else 0):
                picked = prepare(weight[place[:, j]], layer)
                of_rows.addcmul_(values[:, j, None], picked.to(values.dtype))
        if wanted[1] or wanted[2]:
            bags = _Bags(values, place, active, n_classes)
            if wanted[1]:
                of_weight = _weight_gradient(bags, rows.to(layer.dtype), weight, layer.normalize)
                of_weight = bags.spread(of_weight, layer.sparse)
            if wanted[2]:
                of_bias = bags.spread(bags.sums(rows.new_ones((rows.shape[0], 1)))[:, 0].to(bias_dtype), layer.sparse)
        return of_rows, of_weight, of_bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, place, active, rows, weight, _, ctx.layer, _ = inputs
        ctx.save_for_backward(values, place, active, rows, weight)

    @staticmethod
    def backward(ctx, g_rows, g_weight, g_bias):
        """By autograd, from the product of the three gradients with those that come in; holds [N, J, D]."""
        values, place, active, rows, weight = ctx.saved_tensors
        normalize = ctx.layer.normalize

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
        before = (torch.arange(key.shape[0], device=key.device) - 1).clamp(min=0)
        bag = (key != key[before]).cumsum(0)
        n_bags = torch.sym_min(key.shape[0], n_classes + 1)
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
