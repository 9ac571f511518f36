"""Modules around :mod:`topk_fast.functional`, with the names, defaults and state_dict of ``pytopk``."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from . import checks, sharding
from .functional import (
    bal_noised_topk_loss,
    class_margins,
    imbal_noised_topk_loss,
    linear_noised_topk_loss,
    linear_topk,
    noised_topk,
)

__all__ = [
    "BalNoisedTopK",
    "ImbalNoisedTopK",
    "LinearBalNoisedTopK",
    "LinearImbalNoisedTopK",
    "NoisedTopK",
    "NormedLinear",
]


class NoisedTopK(Module):
    """Module of :func:`~topk_fast.functional.noised_topk`: smoothed k-th largest value along ``dim``.

    Fresh noise in every call, in eval mode too; ``seed`` in ``forward`` fixes it.

    Example:
        >>> import torch
        >>> from topk_fast import NoisedTopK
        >>> scores = torch.tensor([[-1.5, 2.0, 0.7, 3.8]], requires_grad=True)
        >>> NoisedTopK(k=3, epsilon=0.0)(scores).sum().backward()
        >>> scores.grad
        tensor([[0., 0., 1., 0.]])
    """

    def __init__(
        self,
        k: int,
        epsilon: float = 1.0,
        n_sample: int = 5,
        dim: int = -1,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        sampler: str = "auto",
        backend: str = "auto",
    ):
        super().__init__()
        self.k, self.epsilon, self.n_sample, self.dim = k, epsilon, n_sample, dim
        self.generator, self.seed, self.sampler, self.backend = generator, seed, sampler, backend

    def forward(self, x: Tensor) -> Tensor:
        return noised_topk(
            x, self.k, self.epsilon, self.n_sample, self.dim,
            generator=self.generator, seed=self.seed, sampler=self.sampler, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"k={self.k}, epsilon={self.epsilon}, n_sample={self.n_sample}, dim={self.dim}"


class _Loss(Module):
    """What the losses share: their parameters under the names of :mod:`topk_fast.functional`."""

    def __init__(self, k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend, process_group):
        super().__init__()
        self.k, self.epsilon, self.n_sample = k, epsilon, n_sample
        self.reduction, self.ignore_index = reduction, ignore_index
        self.generator, self.seed, self.sampler, self.backend = generator, seed, sampler, backend
        self.process_group = process_group

    def __deepcopy__(self, memo):
        memo[id(self.process_group)] = self.process_group  # a copy talks to the same ranks
        memo[id(self)] = copy = self.__new__(type(self))
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _extras(self):
        return dict(
            reduction=self.reduction, ignore_index=self.ignore_index, generator=self.generator, seed=self.seed,
            sampler=self.sampler, backend=self.backend, process_group=self.process_group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"k={self.k}, epsilon={self.epsilon}, n_sample={self.n_sample}, reduction={self.reduction!r}"


class BalNoisedTopK(_Loss):
    """Module of :func:`~topk_fast.functional.bal_noised_topk_loss`, for data without a long tail.

    Fresh noise in every call, in eval mode too; a ``seed`` given here fixes it for all calls. Use a ``generator``
    for reproducible training.

    Example:
        >>> import torch
        >>> from topk_fast import BalNoisedTopK
        >>> criterion = BalNoisedTopK(k=2, epsilon=1.0)
        >>> logits = torch.randn(8, 100, requires_grad=True)
        >>> criterion(logits, torch.randint(100, (8,))).backward()
    """

    def __init__(
        self,
        k: int,
        epsilon: float,
        n_sample: int = 5,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        sampler: str = "auto",
        backend: str = "auto",
        process_group=None,
    ):
        super().__init__(
            k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend, process_group
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return bal_noised_topk_loss(input, target, self.k, self.epsilon, self.n_sample, **self._extras())


class ImbalNoisedTopK(_Loss):
    """Module of :func:`~topk_fast.functional.imbal_noised_topk_loss`, for long-tailed data.

    ``max_m`` and ``cls_num_list`` make the margins, see :func:`~topk_fast.functional.class_margins`; they are the
    buffer ``m_list`` of the state_dict, as in pytopk. The default ``scale`` assumes cosine logits: end the model in
    :class:`NormedLinear`, or set ``scale=1``.

    Example:
        >>> import torch
        >>> from topk_fast import ImbalNoisedTopK, NormedLinear
        >>> head = NormedLinear(16, 3)
        >>> criterion = ImbalNoisedTopK(k=1, epsilon=0.01, max_m=0.3, cls_num_list=[500, 15, 3])
        >>> criterion(head(torch.randn(8, 16)), torch.randint(3, (8,))).backward()
    """

    def __init__(
        self,
        k: int,
        epsilon: float,
        max_m: float,
        cls_num_list: Sequence[int],
        scale: float = 50,
        n_sample: int = 5,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        sampler: str = "auto",
        backend: str = "auto",
        process_group=None,
    ):
        super().__init__(
            k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend, process_group
        )
        self.scale = scale
        self.register_buffer("m_list", class_margins(cls_num_list, max_m))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return imbal_noised_topk_loss(
            input, target, self.k, self.m_list, self.epsilon, self.scale, self.n_sample, **self._extras()
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, classes={len(self.m_list)}"


class _LinearLoss(_Loss):
    """What the losses that own a classifier share: its parameters, this rank's classes alone in a process group."""

    def __init__(
        self, in_features, n_classes, bias, normalize, scale, chunk_size, sparse_grad, device, dtype, *loss_args
    ):
        super().__init__(*loss_args)
        in_features = checks.integer("in_features", in_features, 1, 2**31 - 1)
        n_classes = checks.integer("n_classes", n_classes, 2, 2**31 - 1)
        self.in_features, self.n_classes, self.normalize = in_features, n_classes, normalize
        self.scale, self.chunk_size, self.sparse_grad = scale, chunk_size, sparse_grad
        sharding.check_group(self.process_group)
        ranks, rank = (1, 0) if self.process_group is None else (self.process_group.size(), self.process_group.rank())
        width = -(-n_classes // ranks)
        self.first_class = min(rank * width, n_classes)
        n_local = min(width, n_classes - self.first_class)
        self.weight = Parameter(torch.empty(n_local, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = Parameter(torch.empty(n_local, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as :class:`NormedLinear` or :class:`torch.nn.Linear` draws them, the same for any number of ranks.

        All ranks must have called ``torch.manual_seed`` with the same number for that. Blocks of classes are drawn in
        turn, and each rank keeps its own, so that no rank holds them all.
        """
        bound = self.in_features**-0.5
        for parameter in filter(lambda p: p is not None, (self.weight, self.bias)):
            for start in range(0, self.n_classes, _BLOCK):
                block = parameter.new_empty((min(_BLOCK, self.n_classes - start), *parameter.shape[1:]))
                with torch.no_grad():
                    block.normal_() if self.normalize and block.dim() == 2 else block.uniform_(-bound, bound)
                    skipped = max(0, self.first_class - start)
                    at = max(0, start - self.first_class)
                    own = parameter[at : at + max(0, len(block) - skipped)]
                    own.copy_(block[skipped : skipped + len(own)])

    def _layer(self):
        return dict(normalize=self.normalize, chunk_size=self.chunk_size)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_noised_topk_loss(
            input, self.weight, target, self.bias, k=self.k, epsilon=self.epsilon, n_sample=self.n_sample,
            margins=self._buffers.get("m_list"), scale=self.scale, sparse_grad=self.sparse_grad, **self._layer(),
            **self._extras(),
        )  # fmt: skip

    def topk(self, input: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The ``k`` best logits and classes of every row, see :func:`~topk_fast.functional.linear_topk`.

        ``k`` is the loss's if not given.
        """
        k = self.k if k is None else k
        return linear_topk(
            input, self.weight, k, self.bias, backend=self.backend, process_group=self.process_group, **self._layer()
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, n_classes={self.n_classes}, bias={self.bias is not None}, "
            f"normalize={self.normalize}, sparse_grad={self.sparse_grad}, {super().extra_repr()}"
        )


_BLOCK = 1 << 16  # classes whose first weights are drawn at a time


class LinearBalNoisedTopK(_LinearLoss):
    """A classifier's last layer and :class:`BalNoisedTopK` in one, for up to millions of classes.

    Owns ``weight`` [n_classes, in_features] and ``bias`` as :class:`torch.nn.Linear` does, and computes
    :func:`~topk_fast.functional.linear_noised_topk_loss`, which never holds all logits. With ``process_group`` each
    rank owns, in the order of ranks, the next ceil(n_classes / ranks) classes, and its state_dict holds those; keep it out
    of DistributedDataParallel then.

    Example:
        >>> import torch
        >>> from topk_fast import LinearBalNoisedTopK
        >>> head = LinearBalNoisedTopK(16, 50_000, k=5, epsilon=1.0, bias=False, sparse_grad=True)
        >>> optimizer = torch.optim.SparseAdam(head.parameters())
        >>> head(torch.randn(8, 16), torch.randint(50_000, (8,))).backward()
        >>> optimizer.step()
        >>> values, classes = head.topk(torch.randn(8, 16))
        >>> classes.shape
        torch.Size([8, 5])
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        k: int,
        epsilon: float,
        n_sample: int = 5,
        *,
        bias: bool = True,
        normalize: bool = False,
        scale: float = 1.0,
        chunk_size: int | None = None,
        sparse_grad: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        sampler: str = "auto",
        backend: str = "auto",
        process_group=None,
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_features, n_classes, bias, normalize, scale, chunk_size, sparse_grad, device, dtype, k, epsilon,
            n_sample, reduction, ignore_index, generator, seed, sampler, backend, process_group,
        )  # fmt: skip


class LinearImbalNoisedTopK(_LinearLoss):
    """A classifier's last layer and :class:`ImbalNoisedTopK` in one: cosine logits and a margin for each class.

    As :class:`LinearBalNoisedTopK`, with ``normalize=True`` and no bias as in :class:`NormedLinear` unless told
    otherwise. ``cls_num_list`` counts the examples of all classes on every rank; the margins are the buffer ``m_list``.

    Example:
        >>> import torch
        >>> from topk_fast import LinearImbalNoisedTopK
        >>> head = LinearImbalNoisedTopK(16, k=1, epsilon=0.01, max_m=0.3, cls_num_list=[500, 15, 3])
        >>> head(torch.randn(8, 16), torch.randint(3, (8,))).backward()
    """

    def __init__(
        self,
        in_features: int,
        k: int,
        epsilon: float,
        max_m: float,
        cls_num_list: Sequence[int],
        scale: float = 50,
        n_sample: int = 5,
        *,
        bias: bool = False,
        normalize: bool = True,
        chunk_size: int | None = None,
        sparse_grad: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        sampler: str = "auto",
        backend: str = "auto",
        process_group=None,
        device=None,
        dtype=None,
    ):
        margins = class_margins(cls_num_list, max_m)
        super().__init__(
            in_features, len(margins), bias, normalize, scale, chunk_size, sparse_grad, device, dtype, k, epsilon,
            n_sample, reduction, ignore_index, generator, seed, sampler, backend, process_group,
        )  # fmt: skip
        self.register_buffer("m_list", margins.to(device))


class NormedLinear(Module):
    r"""Cosine logits: :math:`x^T w_j / (\|x\| \|w_j\|)` in [-1, 1], which the imbalanced loss assumes.

    Args:
        in_features, out_features: as :class:`torch.nn.Linear`; the weight is [out_features, in_features], no bias.

    Example:
        >>> import torch
        >>> from topk_fast import NormedLinear
        >>> NormedLinear(16, 100)(torch.randn(8, 16)).shape
        torch.Size([8, 100])
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight)  # directions uniform on the sphere; lengths do not matter

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
