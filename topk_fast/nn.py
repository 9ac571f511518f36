"""Modules around :mod:`topk_fast.functional`, with the names, defaults and state_dict of ``pytopk``."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from .functional import bal_noised_topk_loss, class_margins, imbal_noised_topk_loss, noised_topk

__all__ = ["BalNoisedTopK", "ImbalNoisedTopK", "NoisedTopK", "NormedLinear"]


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

    def __init__(self, k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend):
        super().__init__()
        self.k, self.epsilon, self.n_sample = k, epsilon, n_sample
        self.reduction, self.ignore_index = reduction, ignore_index
        self.generator, self.seed, self.sampler, self.backend = generator, seed, sampler, backend

    def _extras(self):
        return dict(
            reduction=self.reduction, ignore_index=self.ignore_index, generator=self.generator, seed=self.seed,
            sampler=self.sampler, backend=self.backend,
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
    ):
        super().__init__(k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend)

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
    ):
        super().__init__(k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend)
        self.scale = scale
        self.register_buffer("m_list", class_margins(cls_num_list, max_m))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return imbal_noised_topk_loss(
            input, target, self.k, self.m_list, self.epsilon, self.scale, self.n_sample, **self._extras()
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, classes={len(self.m_list)}"


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
