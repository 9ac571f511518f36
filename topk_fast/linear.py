r"""Linear layer and loss in one, for so many classes that logits [N, L] would not fit or cost too much.

.. math:: s = x W^T + b, \qquad
          \partial\ell / \partial x = \sum_{j} g_j w_j, \quad \partial\ell / \partial w_j = \sum_n g_{nj} x_n

The gradient g of the scores has at most B + 1 entries a row (`reference.entries`), so one matmul is enough: the forward
walks it in tiles of rows and classes and keeps the k best of each (row, sample), and the backward gathers B + 1 rows of
the weight per row of the input, and adds as many rows into the weight's gradient, class by class in a fixed order.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import checks, ops, reference, sharding

_ROWS = 1024  # of a tile: enough for a matmul at full speed
_BYTES = {"cpu": 16 << 20}  # of a tile of logits; elsewhere _BYTES_ON_DEVICE
_BYTES_ON_DEVICE = 256 << 20
_TINY = 1e-12  # F.normalize's smallest norm


def linear_noised_topk_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    epsilon: float,
    n_sample: int = 5,
    margins: Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = False,
    chunk_size: int | None = None,
    sparse_grad: bool = False,
    reduction: str = "mean",
    ignore_index: int = -100,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""Noised top-K loss of a linear layer's logits, which are never held in memory as a whole.

    .. math:: \ell(x, y) = \max(0,\; scale \, (m_y + top_{K+1}(s) - s_y)), \qquad s = x W^T + b

    with :math:`top_{K+1}` the value of :func:`~topk_fast.functional.noised_topk`. Equal to
    :func:`~topk_fast.functional.bal_noised_topk_loss` (or, with ``margins``, its imbalanced form) of ``F.linear(input,
    weight, bias)``, at a third of the arithmetic of a linear cross-entropy: the backward has no second matmul.

    Args:
        input: features [N, D] or [..., D]; float32, float64, bfloat16 or float16. Matmuls accumulate in float32 at
            least; under autocast they run in its dtype, while gradients are accumulated and returned in the dtypes of
            input and weight.
        weight: [L, D], of input's dtype unless under autocast; as of :class:`torch.nn.Linear`.
        target: true classes, int64 in [0, L - 1] or ``ignore_index``: [N] or [...].
        bias: [L].
        k: the K of top-K accuracy, 1 to L - 1.
        epsilon: noise level, >= 0, in units of the logits.
        n_sample: number B of noise vectors, >= 1.
        margins: margins m [L] of all classes, see :func:`~topk_fast.functional.class_margins`; None means 1.
        scale: factor of the hinge, > 0; about 50 for cosine logits.
        normalize: cosine logits: rows of input and of weight are divided by their lengths, as in
            :class:`topk_fast.NormedLinear`.
        chunk_size: classes walked at a time, 1 to L; None takes as many as fit 16 MiB (256 MiB on a GPU) of logits
            for up to 1024 rows. Where that is all of them the loss equals the unfused one bit for bit, if its logits do;
            with ``sampler="dense"`` it does for any chunk size, and with the thinned one in distribution.
        sparse_grad: the weight's gradient as a coalesced row-sparse tensor of the at most N * (B + 1) rows that are not
            zero, for :class:`torch.optim.SparseAdam` and :class:`torch.optim.SGD`. The bias's gradient is dense.
        reduction: "mean" over the rows that are not ignored, "sum" or "none".
        ignore_index: rows with this target have loss 0 and no gradient.
        seed, generator, sampler, backend: as in :func:`~topk_fast.functional.noised_topk`.
        process_group: ranks over which the classes are sharded: weight and bias hold this rank's, contiguous in the
            order of ranks, any number of them; input, target, margins and all else are the same on all ranks. Every
            rank returns the loss over all classes and has the full gradient of the input. A weight that is a DTensor
            with ``Shard(0)`` needs no process_group.

    Returns:
        A tensor without dimensions, or with target's shape for ``reduction="none"``; float64 for float64 input,
        else float32. A row with a NaN score has a NaN loss, and NaN gradients for its input and its true class's weight.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others, or not
            the same on all ranks.
        RuntimeError: a named backend that is not available, or a rank that cannot go on.

    Example:
        >>> import torch
        >>> from topk_fast.functional import linear_noised_topk_loss
        >>> features, weight = torch.randn(8, 16, requires_grad=True), torch.randn(50_000, 16, requires_grad=True)
        >>> target = torch.randint(50_000, (8,))
        >>> linear_noised_topk_loss(features, weight, target, k=5, epsilon=1.0, sparse_grad=True).backward()
        >>> weight.grad.is_sparse, weight.grad.coalesce().indices().numel() <= 8 * (5 + 1)
        (True, True)
    """
    weight, process_group, wrap = sharding.local_part("weight", weight, 0, process_group)
    if wrap is not None:
        input, target = sharding.replicated(input), sharding.replicated(target)
        bias = sharding.local_part("bias", bias, 0, None)[0]
        if sparse_grad:
            raise ValueError(
                "sparse_grad=True needs a plain weight, got a DTensor: pass weight.to_local(), process_group"
            )
    with sharding.Meeting(process_group, "linear_noised_topk_loss") as meeting:
        dtype = checks.layer(input, weight, bias)
        checks.target(input, target, input.dim() - 1)
        n_classes = weight.shape[0] if process_group is None else None
        k = checks.rank(k, n_classes)
        epsilon, n_sample = checks.noise(epsilon, n_sample)
        margins = checks.margins(margins, n_classes, input.device, reference.arithmetic(dtype))
        scale, dense = checks.scale(scale), checks.dense(sampler)
        checks.reduction(reduction)
        ignore_index = checks.ignored(ignore_index)
        fixed_seed, seed = seed is not None, checks.seed(seed, generator, input.device)
        rows, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
        chunk = _chunk(chunk_size, rows, weight, dtype)
        suffix = ops.suffix(backend, rows.new_empty((0, chunk), dtype=dtype), k + 1)
        shards = meeting.agree(
            weight.shape[0], labels, margins, k, seed, fixed_seed, ignore_index, epsilon=epsilon, n_sample=n_sample,
            scale=scale, normalize=normalize, dense=dense, dtype=dtype, width=rows.shape[1],
            input_requires_grad=rows.requires_grad,
        )  # fmt: skip
    if shards is None:
        checks.labels_on_device(labels, n_classes, ignore_index)
    if normalize:
        rows = F.normalize(rows, dim=1)
    seed = seed if shards is None else shards.seed
    options = _Options(k + 1, epsilon, n_sample, scale, ignore_index, dense, bool(normalize), chunk, dtype, sparse_grad)
    losses, _ = _LinearLoss.apply(rows, weight, bias, labels, margins, seed, options, shards, suffix)
    n_valid = (labels != ignore_index).sum().to(losses.dtype)
    losses = ops.reduce(losses, n_valid, reduction)
    losses = losses.view(target.shape) if reduction == "none" else losses
    return losses if wrap is None else wrap(losses)


def linear_topk(
    input: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    normalize: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
    process_group=None,
) -> tuple[Tensor, Tensor]:
    r"""The k classes with the largest logits of a linear layer, without its logits: ``F.linear(...).topk(k)``.

    Args:
        input, weight, bias, normalize, chunk_size, process_group: as in :func:`linear_noised_topk_loss`.
        k: how many classes, 1 to L.
        backend: as in :func:`~topk_fast.functional.noised_topk`.

    Returns:
        Logits [..., k], largest first, in float64 for float64 input, else float32; and their classes, int64. NaN
        and -1 where a logit of the row is NaN. Without gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, out of range, or not fitting the others, or not the same
            on all ranks.
        RuntimeError: a named backend that is not available, or a rank that cannot go on.

    Example:
        >>> import torch
        >>> from topk_fast.functional import linear_topk
        >>> linear_topk(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), k=2)
        (tensor([[3., 2.]]), tensor([[2, 1]]))
    """
    weight, process_group, _ = sharding.local_part("weight", weight, 0, process_group)
    input, bias = sharding.replicated(input), sharding.local_part("bias", bias, 0, None)[0]
    with sharding.Meeting(process_group, "linear_topk") as meeting:
        dtype = checks.layer(input, weight, bias)
        rows = input.reshape(-1, input.shape[-1])
        k = checks.rank(k, weight.shape[0] if process_group is None else None, spare=0)
        chunk = _chunk(chunk_size, rows, weight, dtype)
        suffix = ops.suffix(backend, rows.new_empty((0, chunk), dtype=dtype), k)
        seed, target = (
            torch.zeros((), dtype=torch.int64, device=rows.device),
            rows.new_zeros(len(rows), dtype=torch.int64),
        )
        shards = meeting.agree(
            weight.shape[0],
            target,
            None,
            k,
            seed,
            True,
            0,
            spare=0,
            normalize=normalize,
            dtype=dtype,
            width=rows.shape[1],
        )
    if normalize:
        rows = F.normalize(rows, dim=1)
    first = 0 if shards is None else shards.first_class
    found = _OPS[suffix](
        rows.detach(), weight.detach(), None if bias is None else bias.detach(), None, seed, k, 0.0, 1, first, False,
        bool(normalize), chunk, dtype,
    )  # fmt: skip
    if shards is not None:
        found = shards.best(*found, target)
    return tuple(x.view(*input.shape[:-1], k) for x in found[:2])


def _chunk(chunk_size: int | None, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> int:
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


def _walk(suffix):
    def linear_candidates(
        input, weight, bias, target, seed, k, epsilon, n_sample, first_class, dense, normalize, chunk_size, dtype
    ):
        """The k best noised logits of this slice of classes [N, n_sample, k], their classes, the true class's logit."""
        n_rows, n_classes = input.shape[0], weight.shape[0]
        values, classes = reference.empty_lists(input.new_empty((n_rows, 0), dtype=dtype), k, n_sample)
        true_score = values.new_zeros(n_rows)
        tile = input.new_empty(min(n_rows, _ROWS) * min(chunk_size, n_classes), dtype=dtype)
        search = ops.kernel("candidates", suffix)
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


_OPS = {suffix: ops.define("linear_candidates" + suffix, _SCHEMA, _fake, _walk(suffix)) for suffix in ops.SUFFIXES}


def _prepared(weight: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """Rows of the weight as the matmul takes them."""
    return (F.normalize(weight, dim=1, eps=_TINY) if normalize else weight).to(dtype)


class _Options(NamedTuple):
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


class _LinearLoss(Function):
    """Rows [N, D], already normalised where asked, and this rank's classes to losses [N]; keeps the class ids alone."""

    @staticmethod
    def forward(rows, weight, bias, target, margins, seed, o, shards, suffix):
        first = 0 if shards is None else shards.first_class
        lists = _OPS[suffix](
            rows, weight, bias, target, seed, o.k, o.epsilon, o.n_sample, first, o.dense, o.normalize, o.chunk, o.dtype
        )
        values, classes, true_score = lists if shards is None else shards.best(*lists, target)
        losses, classes, _ = reference.loss_of(
            values[..., -1], classes[..., -1], true_score, target, margins, o.scale, o.ignore_index
        )
        return losses, classes

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, weight, bias, target, _, _, ctx.options, ctx.shards, _ = inputs
        losses, classes = output
        ctx.mark_non_differentiable(classes)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(rows, weight, target, losses, classes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        rows, weight, target, losses, classes = ctx.saved_tensors
        first, n_classes = 0 if ctx.shards is None else ctx.shards.first_class, weight.shape[0]
        classes, values = reference.entries(grad, losses, classes, target, ctx.options.scale)
        values = values.masked_fill(losses.isnan()[:, None] & (classes == target[:, None]), math.nan)
        classes, order = classes.sort(dim=1)
        values, place = values.gather(1, order), classes - first
        again = F.pad(classes[:, 1:] == classes[:, :-1], (1, 0))  # equal classes have equal values: one is enough
        active = ~again & (place >= 0) & (place < n_classes) & (values != 0)
        values, place = values.masked_fill(~active, 0), place.masked_fill(~active, 0)
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = torch.zeros(rows.shape, dtype=values.dtype, device=rows.device)
            for j in range(values.shape[1] if n_classes else 0):
                picked = _prepared(weight[place[:, j]], ctx.options.normalize, ctx.options.dtype)
                of_rows.addcmul_(values[:, j, None], picked.to(values.dtype))
            of_rows = (of_rows if ctx.shards is None else ctx.shards.sum(of_rows)).to(rows.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            bags = _Bags(values, place, active, n_classes)
            if ctx.needs_input_grad[1]:
                of_weight = _weight_gradient(
                    bags, rows.to(ctx.options.dtype), weight, ctx.options.normalize, ctx.options.sparse
                )
            if ctx.needs_input_grad[2]:
                of_bias = bags.dense(bags.sums(rows.new_ones((len(rows), 1)))[:, 0].to(ctx.bias_dtype))
        return of_rows, of_weight, of_bias, *[None] * 6


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

    def dense(self, sums: Tensor) -> Tensor:
        """[bags, ...] -> [L, ...]; a bag without a class adds zeros to the last one."""
        out = sums.new_zeros((self.n_classes, *sums.shape[1:]))
        return out.index_add_(0, self.classes.clamp(max=self.n_classes - 1), sums) if self.n_classes else out


def _weight_gradient(bags: _Bags, rows: Tensor, weight: Tensor, normalize: bool, sparse: bool) -> Tensor:
    sums, classes = bags.sums(rows), bags.classes
    if sparse:
        used = int((classes < bags.n_classes).sum())
        sums, classes = sums[:used], classes[:used]
    if normalize and bags.n_classes:
        w = weight[classes.clamp(max=bags.n_classes - 1)].to(sums.dtype)
        length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        unit = w / length.clamp(min=_TINY)
        along = (unit * sums).sum(1, keepdim=True).masked_fill(length < _TINY, 0)
        sums = (sums - unit * along) / length.clamp(min=_TINY)
    sums = sums.to(weight.dtype)
    if not sparse:
        return bags.dense(sums)
    return torch.sparse_coo_tensor(classes[None], sums, weight.shape, is_coalesced=True, check_invariants=False)
