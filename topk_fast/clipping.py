"""Clipping by norm of gradients among which some are row-sparse, which :mod:`torch.nn.utils` does not take."""

import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""As :func:`torch.nn.utils.clip_grad_norm_`, for dense and row-sparse gradients together.

    .. math:: g \leftarrow g \cdot \min\Big(1, \frac{max\_norm}{\|g\|_p + 10^{-6}}\Big)

    where g are all gradients as one vector. Rows that a sparse gradient does not hold are zeros of this vector, so that
    ``sparse_grad=True`` and ``sparse_grad=False`` give the same norm and the same clipped gradients.

    Args:
        parameters: parameters whose gradients are scaled in place; those without a gradient are left out.
        max_norm: the largest norm of the result; ``math.inf`` measures the norm and scales nothing.
        norm_type: p, above 0 where a gradient is sparse; ``math.inf``, or ``"inf"``, is the largest absolute value.
        error_if_nonfinite, foreach: as in :func:`torch.nn.utils.clip_grad_norm_`.

    Returns:
        The norm before clipping, a tensor without dimensions. Where a process group shards the classes, it is that of
        this rank's rows; the page on sharding shows how ranks clip by the norm over all of them.

    Raises:
        ValueError: a norm_type that a sparse gradient does not have, or gradients of which only some are DTensors.
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite=True``.

    Example:
        >>> import torch
        >>> from topk_fast import LinearHead, SampledCrossEntropy, clip_grad_norm_
        >>> trunk = torch.nn.Linear(4, 16)
        >>> head = LinearHead(16, 50_000, SampledCrossEntropy(16), sparse_grad=True)
        >>> head(trunk(torch.randn(8, 4)), torch.randint(50_000, (8,))).backward()
        >>> parameters = [*trunk.parameters(), *head.parameters()]
        >>> norm = clip_grad_norm_(parameters, max_norm=0.1)
        >>> clip_grad_norm_(parameters, max_norm=0.1) <= 0.1
        tensor(True)
    """
    norm_type = float(norm_type)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(g.is_sparse for g in grads) and not norm_type > 0:
        raise ValueError(f"norm_type must be > 0 where a gradient is sparse, got {norm_type}")
    tensors = sys.modules.get("torch.distributed.tensor")  # without it there are no DTensors
    if tensors is not None and len({isinstance(g, tensors.DTensor) for g in grads}) > 1:
        raise ValueError("some gradients are DTensors and others are not: clip each kind in a call of its own")
    values = [g.coalesce().values() if g.is_sparse else g for g in grads]
    values = [v for v in values if v.numel()]
    if grads and not values:  # on the gradients' device
        return grads[0].new_zeros((), dtype=torch.float32).to_dense()
    total_norm = get_total_norm(values, norm_type, error_if_nonfinite, foreach)
    if max_norm != math.inf:
        clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    return total_norm
