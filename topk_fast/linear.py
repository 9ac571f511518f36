r"""Linear layer and loss in one, for so many classes that logits [N, L] would not fit or cost too much: the functions.

.. math:: s = x W^T + b, \qquad \ell(x, y) = \text{the noised top-K loss of } s \text{ and } y

The walk over the classes and the gradient are in ``linear_op.py``.
"""

import torch
from torch import Tensor

from . import backends, checks, linear_op, ops, reference, sharding
from .linear_gradient import unit_rows
from .losses import Hinge
from .request import Labels, Layer, LinearSearch, Noise, Options


def linear_noised_topk_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    epsilon: float | Tensor,
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
        k: the K of top-K accuracy, 0 to L - 1.
        epsilon: noise level, >= 0, in units of the logits; a number, or a tensor as in
            :func:`~topk_fast.functional.noised_topk`.
        n_sample: number B of noise vectors, >= 1.
        margins: margins m [L] of all classes, see :func:`~topk_fast.functional.class_margins`; None means 1.
        scale: factor of the hinge, > 0; about 50 for cosine logits.
        normalize: cosine logits: rows of input and of weight are divided by their lengths, as in
            :class:`topk_fast.NormedLinear`.
        chunk_size: classes walked at a time, 1 to L; None takes as many as fit 16 MiB (256 MiB on a GPU) of logits
            for up to 1024 rows. Where that is all of them the loss equals the unfused one bit for bit, if its logits
            do; with ``sampler="dense"`` it does for any chunk size, and with the thinned one in distribution.
        sparse_grad: the weight's gradient as a coalesced row-sparse tensor of the at most N * (B + 1) rows that are not
            zero, for :class:`torch.optim.SparseAdam` and :class:`torch.optim.SGD`; the bias's likewise. Then weight and
            bias must be leaves of the graph, and DistributedDataParallel, FSDP2 and full graphs of torch.compile raise.
        reduction: "mean" over the rows that are not ignored, "sum" or "none".
        ignore_index: rows with this target have loss 0 and no gradient.
        seed, generator, sampler, backend: as in :func:`~topk_fast.functional.noised_topk`.
        process_group: ranks over which the classes are sharded: weight and bias hold this rank's, contiguous in the
            order of ranks, any number of them; input, target, margins and all else are the same on all ranks, to the
            last bit. Every rank returns the loss over all classes and has the full gradient of the input. A weight
            that is a DTensor with ``Shard(0)`` needs no process_group. A weight that FSDP2 sharded is such a DTensor
            outside of the module's forward: call its module, or ``unshard()`` it first.

    Returns:
        A tensor without dimensions, or with target's shape for ``reduction="none"``; float64 for float64 input,
        else float32. A row with a NaN score has a NaN loss, and NaN gradients for its input and its true class's
        weight. Differentiable any number of times, once where classes are sharded or with ``sparse_grad``.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others, or
            not the same on all ranks.
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
    options = Options(epsilon, n_sample, "normal", seed, generator, sampler, backend)
    with sharding.Meeting(process_group, "linear_noised_topk_loss", from_dtensor=wrap is not None) as meeting:
        dtype = checks.check_layer(input, weight, bias)
        checks.check_target(input, target, input.dim() - 1)
        n_classes = weight.shape[0] if process_group is None else None
        ranks = (checks.check_top(k, n_classes, several=False)[0] + 1,)
        wanted = checks.check_noise(options, ranks, input.device)
        hinge = checks.check_hinge(
            Hinge(margins, scale, reduction), n_classes, input.device, reference.arithmetic(dtype)
        )
        if sparse_grad:
            checks.check_leaves(weight=weight, bias=bias)
            sharding.check_unmanaged(weight)
        labels = checks.check_ignore_index(Labels(target.reshape(-1), ignore_index))
        rows = input.reshape(-1, input.shape[-1])
        chunk = linear_op.count_chunk(chunk_size, rows, weight, dtype)
        layer = Layer(bool(normalize), chunk, dtype, sparse_grad)
        backend = backends.resolve(backend, rows.new_empty((0, chunk), dtype=dtype), wanted.k)
        search = sharding.agree_on(
            meeting,
            LinearSearch(rows, weight, bias, wanted, labels, layer, backend),
            hinge,
            fixed_seed=seed is not None,
            tensors={"input": rows},
            facts=_facts(layer, rows) | {"input_requires_grad": rows.requires_grad},
        )
    if search.shards is None:
        known = ops.checked_labels(labels.target, search.n_classes, labels.ignore_index)
        search = search._replace(labels=labels._replace(target=known))
    if normalize:
        search = search._replace(rows=unit_rows(rows))
    losses = hinge.reduced(linear_op.linear_excess(search), search.labels)
    losses = losses.view(target.shape) if reduction == "none" else losses
    return losses if wrap is None else wrap(losses)


def _facts(layer: Layer, rows: Tensor) -> dict:
    """What the ranks must have in common, besides the bits of ``rows``."""
    return {"normalize": layer.normalize, "dtype": layer.dtype, "width": rows.shape[1]}


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
        and -2 where a logit of the row is NaN. Without gradient.

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
    weight, process_group, wrap = sharding.local_part("weight", weight, 0, process_group)
    input, bias = sharding.replicated(input), sharding.local_part("bias", bias, 0, None)[0]
    with sharding.Meeting(process_group, "linear_topk", from_dtensor=wrap is not None) as meeting:
        dtype = checks.check_layer(input, weight, bias)
        rows = input.reshape(-1, input.shape[-1])
        k = _check_k(k, weight.shape[0] if process_group is None else None)
        layer = Layer(bool(normalize), linear_op.count_chunk(chunk_size, rows, weight, dtype), dtype, sparse=False)
        backend = backends.resolve(backend, rows.new_empty((0, layer.chunk), dtype=dtype), k)
        seed = torch.zeros((), dtype=torch.int64, device=rows.device)
        no_noise = Noise(seed, (k,), epsilon=0.0, schedule=None, n_sample=1, law=0, dense=False)
        labels = Labels(rows.new_zeros(len(rows), dtype=torch.int64))
        shards = meeting.agree(
            weight.shape[0],
            labels,
            no_noise,
            fixed_seed=True,
            tensors={"input": rows},
            facts={"k": k} | _facts(layer, rows),
        )
        if shards is not None:
            _check_k(k, shards.n_classes)
    rows = (unit_rows(rows) if normalize else rows).detach()
    bias = None if bias is None else bias.detach()
    first_class = 0 if shards is None else shards.first_class
    walk = ops.kernel("linear_candidates", backend)
    *found, true_score = walk(rows, weight.detach(), bias, None, *no_noise, *layer, first_class)
    if shards is not None:
        *found, _ = shards.merge_lists(*found, true_score, labels.target)
    values, classes = found
    shape = (*input.shape[:-1], k)
    return values.view(shape), classes.view(shape)


def _check_k(k: int, n_classes: int | None) -> int:
    if n_classes is None:
        return checks.check_integer("k", k, 1, 2**31 - 1)
    return checks.check_integer("k", k, 1, n_classes, "L")
