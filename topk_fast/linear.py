r"""Linear layer and loss in one, for so many classes that logits [N, L] would not fit or cost too much: the functions.

.. math:: s = x W^T + b, \qquad \ell(x, y) = \text{the loss of } s \text{ and } y

Arguments become requests in ``linear_losses.py``; the pass over the classes and the gradient are in ``linear_op.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, linear_losses, ops, sharding
from .criterion import Criterion
from .linear_gradient import unit_rows
from .request import Labels, Linear, LossRequest, Options, without_noise


def linear_noised_topk_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    k: int | Sequence[int] = (1, 5),
    epsilon: float | Tensor = 1.0,
    n_sample: int = 5,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    sparse_grad: bool = False,
    noise: str = "normal",
    link: str = "hinge",
    temperature: float = 1.0,
    margin: float | Tensor = 1.0,
    scale: float = 1.0,
    rank_weights: Sequence[float] | None = None,
    exclude_target: bool = False,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""Noised top-K loss of a linear layer's logits, which are never held in memory as a whole.

    .. math:: s = x W^T + b, \qquad
              \ell(x, y) = w_y \sum_m r_m \cdot scale \cdot link(m_y + top_{K_m + 1}(s) - s_y)

    Equal to :func:`~topk_fast.functional.noised_topk_loss` of ``F.linear(input, linear_weight, linear_bias)``, at a
    third of the arithmetic of a linear cross-entropy: the backward has no second matmul. The names of the layer's
    arguments are those of ``torch.nn.functional.linear_cross_entropy``.

    Args:
        input: features [N, D] or [..., D]; float32, float64, bfloat16 or float16. Matmuls accumulate in float32 at
            least; under autocast they run in its dtype, while gradients are accumulated and returned in the dtypes of
            input and linear_weight.
        linear_weight: [L, D], of input's dtype unless under autocast; as of :class:`torch.nn.Linear`.
        target: true classes, int64 in [0, L - 1] or ``ignore_index``: [N] or [...].
        k, epsilon, n_sample: as in :func:`~topk_fast.functional.noised_topk_loss`.
        linear_bias: [L].
        normalize: cosine logits: rows of input and of linear_weight are divided by their lengths, as in
            :class:`topk_fast.NormedLinear`.
        chunk_size: classes whose logits are held at a time, 1 to L; None takes as many as fit 16 MiB (256 MiB on a
            GPU) of logits for up to 1024 rows. Where that is all of them the loss equals the unfused one bit for bit,
            if its logits do; with ``sampler="dense"`` it does for any chunk size, and with the thinned one in
            distribution.
        sparse_grad: the weight's gradient as a coalesced row-sparse tensor of the at most N * (B * M + 1) rows that are
            not zero, for M ranks; the bias's likewise. :class:`torch.optim.SparseAdam`, :class:`torch.optim.Adagrad`,
            :class:`torch.optim.SGD` and :func:`topk_fast.clip_grad_norm_` take them. Then weight and bias must be
            leaves of the graph, and DistributedDataParallel, FSDP2 and full graphs of torch.compile raise.
        offset: as in :func:`~topk_fast.functional.noised_topk_loss`; it joins the bias.
        process_group: ranks over which the classes are sharded: linear_weight and linear_bias hold this rank's,
            contiguous in the order of ranks, any number of them; input, target, margins, weight, offset and all else
            are the same on all ranks, to the last bit. Every rank returns the loss over all classes and has the full
            gradient of the input. A weight that is a DTensor with ``Shard(0)`` needs no process_group. A weight that
            FSDP2 sharded is such a DTensor outside of the module's forward: call its module, or ``unshard()`` it first.
        noise, link, temperature, margin, scale, rank_weights: as in :func:`~topk_fast.functional.noised_topk_loss`.
        exclude_target, weight, reduction, ignore_index: as in :func:`~topk_fast.functional.noised_topk_loss`.
        generator, seed, sampler, backend: as in :func:`~topk_fast.functional.noised_topk`.

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
        >>> linear_noised_topk_loss(features, weight, target, k=5, sparse_grad=True).backward()
        >>> weight.grad.is_sparse, weight.grad.coalesce().indices().numel() <= 8 * (5 + 1)
        (True, True)

    References:
        See :func:`~topk_fast.functional.noised_topk_loss`.
    """
    criterion = Criterion(link, temperature, margin, scale, rank_weights, weight, reduction)
    options = Options(epsilon, n_sample, noise, seed, generator, sampler, backend, process_group)
    loss = LossRequest(k, options, criterion, ignore_index, exclude_target, offset)
    return linear_losses.evaluate(
        input, target, Linear(linear_weight, linear_bias, normalize, chunk_size, sparse_grad), loss
    )


def linear_sampled_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    n_sample: int = 16,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    sparse_grad: bool = False,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""Sampled cross-entropy of a linear layer's logits: exact in expectation, with one matmul in place of three.

    .. math:: E\,\ell(x, y) = \log \sum_j e^{s_j} - s_y, \qquad s = x W^T + b

    The value and the gradient are those of :func:`~topk_fast.functional.sampled_cross_entropy` of ``F.linear(input,
    linear_weight, linear_bias)``; the logits are never held as a whole, and each row changes at most B + 1 rows of
    the weight. The value of one call is noisy: to evaluate a model, use :func:`torch.nn.functional.cross_entropy`.

    Args:
        input, linear_weight, target, linear_bias, chunk_size, sparse_grad, offset, process_group: as in
            :func:`linear_noised_topk_loss`.
        normalize: cosine logits, which are in [-1, 1], so that their softmax is nearly uniform: for those take
            ``linear_noised_topk_loss(..., k=0, noise="gumbel", link="identity", margin=0, epsilon=1 / s, scale=s)``,
            the sampled cross-entropy of logits s times as large.
        n_sample, weight, reduction, ignore_index, generator, seed, sampler, backend: as in
            :func:`~topk_fast.functional.sampled_cross_entropy`.

    Returns:
        As :func:`linear_noised_topk_loss`.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others, or
            not the same on all ranks.
        RuntimeError: a named backend that is not available, or a rank that cannot go on.

    Example:
        >>> import torch
        >>> from topk_fast.functional import linear_sampled_cross_entropy
        >>> features, weight = torch.randn(8, 16, requires_grad=True), torch.randn(50_000, 16, requires_grad=True)
        >>> target = torch.randint(50_000, (8,))
        >>> linear_sampled_cross_entropy(features, weight, target, sparse_grad=True).backward()
        >>> weight.grad.coalesce().indices().numel() <= 8 * (16 + 1)
        True

    References:
        See :func:`~topk_fast.functional.sampled_cross_entropy`.
    """
    options = Options(1.0, n_sample, "gumbel", seed, generator, sampler, backend, process_group)
    loss = LossRequest(
        0, options, Criterion("identity", margin=0.0, weight=weight, reduction=reduction), ignore_index, offset=offset
    )
    return linear_losses.evaluate(
        input, target, Linear(linear_weight, linear_bias, normalize, chunk_size, sparse_grad), loss
    )


def linear_noised_excess(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    k: int | Sequence[int],
    epsilon: float | Tensor = 1.0,
    n_sample: int = 5,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    sparse_grad: bool = False,
    noise: str = "normal",
    exclude_target: bool = False,
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""The excesses of a linear layer's logits: what losses of your own are made of, without the logits.

    .. math:: e_K(x, y) = top_{K+1}(s) - s_y, \qquad s = x W^T + b

    Args:
        input, linear_weight, target, linear_bias, normalize, chunk_size, sparse_grad, process_group: as in
            :func:`linear_noised_topk_loss`.
        k, epsilon, n_sample, noise, exclude_target, ignore_index, generator, seed, sampler, backend: as in
            :func:`~topk_fast.functional.noised_excess`.

    Returns:
        As :func:`~topk_fast.functional.noised_excess`.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others, or
            not the same on all ranks.
        RuntimeError: a named backend that is not available, or a rank that cannot go on.

    Example:
        >>> import torch
        >>> from topk_fast.functional import linear_noised_excess
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> linear_noised_excess(torch.tensor([[1.0, 2.0]]), weight, torch.tensor([0]), k=[0, 1], epsilon=0.0)
        tensor([[2., 1.]])

    References:
        See :func:`~topk_fast.functional.noised_excess`.
    """
    options = Options(epsilon, n_sample, noise, seed, generator, sampler, backend, process_group)
    loss = LossRequest(k, options, None, ignore_index, exclude_target)
    return linear_losses.evaluate(
        input, target, Linear(linear_weight, linear_bias, normalize, chunk_size, sparse_grad), loss
    )


def linear_topk(
    input: Tensor,
    linear_weight: Tensor,
    k: int,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
    process_group=None,
) -> tuple[Tensor, Tensor]:
    r"""The k classes with the largest logits of a linear layer, without its logits: ``F.linear(...).topk(k)``.

    .. math:: s_{c_1} \ge \dots \ge s_{c_k}, \quad \text{the largest of } s = x W^T + b

    It is for evaluation: there is neither noise nor a gradient.

    Args:
        input, linear_weight, linear_bias, normalize, chunk_size, process_group: as in :func:`linear_noised_topk_loss`.
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
    linear = Linear(linear_weight, linear_bias, normalize, chunk_size)
    linear, group, wrap = linear_losses.own_classes(linear, process_group)
    input = sharding.replicated(input)
    with sharding.Meeting(group, "linear_topk", from_dtensor=wrap is not None) as meeting:
        rows, layer = linear_losses.check_layer(input, linear)
        n_classes = linear.weight.shape[0]
        k = _check_k(k, n_classes if group is None else None)
        backend = linear_losses.resolve(backend, rows, layer, k)
        seed = torch.zeros((), dtype=torch.int64, device=rows.device)
        no_noise = without_noise(seed, k)
        labels = Labels(rows.new_zeros(rows.shape[0], dtype=torch.int64))
        shards = meeting.agree(
            n_classes,
            labels,
            no_noise,
            fixed_seed=True,
            tensors={"input": rows},
            facts={"k": k} | linear_losses.facts_of(layer, rows),
        )
        if shards is not None:
            _check_k(k, shards.n_classes)
    rows = (unit_rows(rows) if layer.normalize else rows).detach()
    bias = None if linear.bias is None else linear.bias.detach()
    first_class = 0 if shards is None else shards.first_class
    walk = ops.kernel("linear_candidates", backend)
    *found, true_score, _, _ = walk(rows, linear.weight.detach(), bias, None, *no_noise, *layer, first_class)
    if shards is not None:
        *found, _ = shards.merge_lists(*found, true_score, labels.target)
    values, classes = found
    shape = (*input.shape[:-1], k)
    return values.view(shape), classes.view(shape)


def _check_k(k: int, n_classes: int | None) -> int:
    if n_classes is None:
        return checks.check_integer("k", k, 1, 2**31 - 1)
    return checks.check_integer("k", k, 1, n_classes, "L")
