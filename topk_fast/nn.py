"""Modules around :mod:`topk_fast.functional`, with the names, defaults and state_dict of ``pytopk``."""

from collections.abc import Sequence
from copy import deepcopy
from inspect import Parameter as Argument
from inspect import signature

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from . import backends, checks, sharding
from .functional import (
    bal_noised_topk_loss,
    class_margins,
    imbal_noised_topk_loss,
    linear_noised_topk_loss,
    linear_topk,
    noised_topk,
)
from .linear_ops import unit_rows

__all__ = [
    "BalNoisedTopK",
    "ImbalNoisedTopK",
    "LinearBalNoisedTopK",
    "LinearImbalNoisedTopK",
    "NoisedTopK",
    "NormedLinear",
]


class _Noised(Module):
    """What all modules share: a source of noise, and a repr."""

    def __init__(self, k, epsilon, n_sample, generator, seed, sampler, backend):
        super().__init__()
        checks.noise(epsilon, n_sample)
        checks.source(seed, generator)
        checks.dense(sampler)
        backends.check_name(backend)
        self.k, self.epsilon, self.n_sample = k, epsilon, n_sample
        self.generator, self.seed, self.sampler, self.backend = generator, seed, sampler, backend

    def extra_repr(self) -> str:
        """The arguments that have no default, and all others that are not at theirs."""
        shown = []
        _, *arguments = signature(
            type(self).__init__
        ).parameters.items()  # FSDP2 gives its classes a __new__ of any arguments
        for name, argument in arguments:
            value = getattr(self, name, argument.default)
            if name == "bias":
                value = value is not None
            if name == "cls_num_list":
                shown.append(f"cls_num_list=<{len(value)} classes>")
            elif argument.default is Argument.empty or value is not argument.default and value != argument.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class NoisedTopK(_Noised):
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
        super().__init__(k, epsilon, n_sample, generator, seed, sampler, backend)
        checks.rank(k, None)
        self.dim = checks.dimension(dim)

    def forward(self, x: Tensor) -> Tensor:
        return noised_topk(
            x, self.k, self.epsilon, self.n_sample, self.dim,
            generator=self.generator, seed=self.seed, sampler=self.sampler, backend=self.backend,
        )  # fmt: skip


class _Loss(_Noised):
    """What the losses share: their parameters under the names of :mod:`topk_fast.functional`."""

    def __init__(self, k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend, process_group):
        super().__init__(k, epsilon, n_sample, generator, seed, sampler, backend)
        checks.rank(k, None)
        checks.reduction(reduction)
        checks.ignored(ignore_index)
        sharding.check_group(process_group)
        self.reduction, self.ignore_index, self.process_group = reduction, ignore_index, process_group

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


class _Margins(Module):
    """The buffer ``m_list`` of the margins, which stays exact when a module is cast, and can be made again."""

    def _make_margins(self, k, max_m, cls_num_list, device=None):
        self.max_m, self.cls_num_list = max_m, checks.counts(cls_num_list)
        checks.rank(k, len(self.cls_num_list))
        margins = class_margins(cls_num_list, max_m)
        self.register_buffer("m_list", margins if device is None else margins.to(device))

    def reset_parameters(self) -> None:
        """Fills ``m_list`` again from ``cls_num_list`` and ``max_m``, as after ``to_empty``."""
        with torch.no_grad():
            self.m_list.copy_(class_margins(self.cls_num_list, self.max_m))

    def _apply(self, function, recurse=True):
        exact = self.m_list
        super()._apply(function, recurse)
        if self.m_list.dtype != exact.dtype:  # .half() of a whole model would round the margins for good
            self.m_list = exact.to(self.m_list.device)
        return self


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


class ImbalNoisedTopK(_Margins, _Loss):
    """Module of :func:`~topk_fast.functional.imbal_noised_topk_loss`, for long-tailed data.

    ``max_m`` and ``cls_num_list`` make the margins, see :func:`~topk_fast.functional.class_margins`; they are the
    buffer ``m_list`` of the state_dict, as in pytopk, float32 also in a model that was cast. ``reset_parameters`` makes them
    again, as after ``to_empty``. The default ``scale`` assumes cosine logits: end the model in :class:`NormedLinear`, or
    set ``scale=1``.

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
        checks.scale(scale)
        self.scale = scale
        self._make_margins(k, max_m, cls_num_list)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return imbal_noised_topk_loss(
            input, target, self.k, self.m_list, self.epsilon, self.scale, self.n_sample, **self._extras()
        )


class _LinearLoss(_Loss):
    """What the losses that own a classifier share: its parameters, this rank's classes alone in a process group."""

    def __init__(
        self, in_features, n_classes, bias, normalize, scale, chunk_size, sparse_grad, device, dtype, *loss_args
    ):
        super().__init__(*loss_args)
        in_features = checks.integer("in_features", in_features, 1, 2**31 - 1)
        n_classes = checks.integer("n_classes", n_classes, 2, 2**31 - 1)
        checks.rank(self.k, n_classes)
        checks.scale(scale)
        if chunk_size is not None:
            checks.integer("chunk_size", chunk_size, 1, 2**31 - 1)
        self.in_features, self.n_classes, self.normalize = in_features, n_classes, normalize
        self.scale, self.chunk_size, self.sparse_grad = scale, chunk_size, sparse_grad
        self.first_class, n_local = sharding.own_slice(n_classes, self.process_group)
        self.weight = Parameter(torch.empty(n_local, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = Parameter(torch.empty(n_local, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._reset_weights()

    def reset_parameters(self) -> None:
        """Weights as :class:`NormedLinear` or :class:`torch.nn.Linear` draws them, the same for any number of ranks.

        All ranks must have called ``torch.manual_seed`` with the same number for that. Blocks of classes are drawn in
        turn, and each rank keeps its own, so that no rank holds them all.
        """
        self._reset_weights()

    @torch.no_grad()
    def _reset_weights(self):
        bound = self.in_features**-0.5
        for parameter in filter(lambda p: p is not None, (self.weight, self.bias)):
            local, group, _ = sharding.local_part("weight", parameter, 0, None)  # of a DTensor, as FSDP2 makes them
            first = self.first_class + sharding.own_slice(parameter.shape[0], group)[0]
            for start in range(0, self.n_classes, _BLOCK):
                block = local.new_empty((min(_BLOCK, self.n_classes - start), *local.shape[1:]))
                if self.normalize and block.dim() == 2:
                    block = unit_rows(block.normal_())
                else:
                    block.uniform_(-bound, bound)
                skipped, at = max(0, first - start), max(0, start - first)
                own = local[at : at + max(0, len(block) - skipped)]
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


class LinearImbalNoisedTopK(_Margins, _LinearLoss):
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
        n_classes = len(checks.counts(cls_num_list))
        super().__init__(
            in_features, n_classes, bias, normalize, scale, chunk_size, sparse_grad, device, dtype, k, epsilon,
            n_sample, reduction, ignore_index, generator, seed, sampler, backend, process_group,
        )  # fmt: skip
        self._make_margins(k, max_m, cls_num_list, device)

    def reset_parameters(self) -> None:
        """The weights, as :class:`LinearBalNoisedTopK` draws them, and the margins."""
        self._reset_weights()
        super().reset_parameters()


class NormedLinear(Module):
    r"""Cosine logits: :math:`x^T w_j / (\|x\| \|w_j\|)` in [-1, 1], which the imbalanced loss assumes.

    Lengths are float32 at least. A length below 1e-8 (float16: 6.1e-5) counts as that, as in
    :func:`torch.nn.functional.cosine_similarity`: a row of zeros has logits of 0 and a gradient that is large, but finite.
    Rows of the weight start at length 1, in directions uniform on the sphere. What a gradient step turns a row by falls
    with its length, so that long rows would learn slowly.

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
        """Draws new rows of length 1."""
        with torch.no_grad():
            self.weight.copy_(unit_rows(self.weight.normal_()))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(unit_rows(input), unit_rows(self.weight))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
