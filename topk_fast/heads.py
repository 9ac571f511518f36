"""Modules that own a classifier's weight and compute its loss in one step, for up to millions of classes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import checks, sharding
from .functional import linear_noised_topk_loss, linear_topk
from .linear_gradient import unit_rows
from .nn import Loss, Margins
from .request import Options

__all__ = ["LinearBalNoisedTopK", "LinearImbalNoisedTopK"]

_BLOCK = 1 << 16  # classes whose first weights are drawn at a time


class _Layer(NamedTuple):
    """The arguments of a classifier's layer, as the user gave them."""

    in_features: Any
    n_classes: Any
    bias: Any
    normalize: Any
    scale: Any
    chunk_size: Any
    sparse_grad: Any
    device: Any
    dtype: Any


class _LinearLoss(Loss):
    """The part that these losses share: the parameters, in a process group those of this rank's classes."""

    def __init__(self, layer: _Layer, k, options: Options, reduction, ignore_index):
        super().__init__(k, options, reduction, ignore_index)
        self.in_features = checks.check_integer("in_features", layer.in_features, 1, 2**31 - 1)
        n_classes = self.n_classes = checks.check_integer("n_classes", layer.n_classes, 2, 2**31 - 1)
        checks.check_top(k, n_classes)
        checks.check_scale(layer.scale)
        if layer.chunk_size is not None:
            checks.check_integer("chunk_size", layer.chunk_size, 1, 2**31 - 1)
        self.normalize, self.scale = layer.normalize, layer.scale
        self.chunk_size, self.sparse_grad = layer.chunk_size, layer.sparse_grad
        factory = dict(device=layer.device, dtype=layer.dtype)
        self.first_class, n_local = sharding.own_slice(n_classes, self.process_group)
        self.weight = Parameter(torch.empty(n_local, self.in_features, **factory))
        if layer.bias:
            self.bias = Parameter(torch.empty(n_local, **factory))
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

    def _layer(self) -> dict:
        """The keywords that the linear functions share."""
        return dict(normalize=self.normalize, chunk_size=self.chunk_size)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_noised_topk_loss(
            input,
            self.weight,
            target,
            self.bias,
            k=self.k,
            epsilon=self.epsilon,
            n_sample=self.n_sample,
            margins=self._buffers.get("m_list"),
            scale=self.scale,
            sparse_grad=self.sparse_grad,
            **self._layer(),
            **self._keywords(),
        )

    def topk(self, input: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The ``k`` best logits and classes of every row, see :func:`~topk_fast.functional.linear_topk`.

        ``k`` is the loss's if not given.
        """
        k = self.k if k is None else k
        where = dict(backend=self.backend, process_group=self.process_group)
        return linear_topk(input, self.weight, k, self.bias, **where, **self._layer())


class LinearBalNoisedTopK(_LinearLoss):
    """A classifier's last layer and :class:`BalNoisedTopK` in one, for up to millions of classes.

    Owns ``weight`` [n_classes, in_features] and ``bias`` as :class:`torch.nn.Linear` does, and computes
    :func:`~topk_fast.functional.linear_noised_topk_loss`, which never holds all logits. With ``process_group`` each
    rank owns, in the order of ranks, the next ceil(n_classes / ranks) classes, and its state_dict holds those; keep
    it out of DistributedDataParallel then.

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
        epsilon: float | Tensor,
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
        options = Options(epsilon, n_sample, "normal", seed, generator, sampler, backend, process_group)
        layer = _Layer(in_features, n_classes, bias, normalize, scale, chunk_size, sparse_grad, device, dtype)
        super().__init__(layer, k, options, reduction, ignore_index)


class LinearImbalNoisedTopK(Margins, _LinearLoss):
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
        epsilon: float | Tensor,
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
        counts = checks.check_counts(cls_num_list)
        n_classes = len(counts)
        options = Options(epsilon, n_sample, "normal", seed, generator, sampler, backend, process_group)
        layer = _Layer(in_features, n_classes, bias, normalize, scale, chunk_size, sparse_grad, device, dtype)
        super().__init__(layer, k, options, reduction, ignore_index)
        self._make_margins(k, max_m, counts, device)

    def reset_parameters(self) -> None:
        """The weights, as :class:`LinearBalNoisedTopK` draws them, and the margins."""
        self._reset_weights()
        super().reset_parameters()
