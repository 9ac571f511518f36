"""Modules around :mod:`topk_fast.functional`, with the names, defaults and state_dict of ``pytopk``."""

from collections.abc import Sequence
from inspect import signature
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from . import backends, checks, loss_checks, losses, noise_checks, sharding
from .criterion import Criterion, make_margins
from .functional import noised_topk
from .linear_gradient import unit_rows
from .request import LossRequest, Options

__all__ = [
    "BalNoisedTopK",
    "ImbalNoisedTopK",
    "NoisedTopK",
    "NoisedTopKLoss",
    "NormedLinear",
    "SampledCrossEntropy",
]


# The arguments that are buffers where they are tensors, and whether a state_dict has them. A seed is none, because
# DistributedDataParallel makes the buffers of all ranks equal.
_TENSORS = {"epsilon": False, "margin": True, "weight": True, "offset": True}
torch.fx.wrap("unit_rows")  # a call of its own in a graph of torch.fx.symbolic_trace, which cannot look into it


class _Noised(Module):
    """The part that all modules share: a source of noise, and a repr."""

    def __init__(self, k, options: Options):
        super().__init__()
        noise_checks.check_epsilon(options.epsilon, None)
        noise_checks.check_n_sample(options.n_sample)
        noise_checks.check_law(options.noise)
        noise_checks.check_source(options.seed, options.generator)
        noise_checks.check_sampler(options.sampler)
        backends.check_name(options.backend)
        self.epsilon, self.k, self.n_sample, self.noise = options.epsilon, k, options.n_sample, options.noise
        self.generator, self.seed = options.generator, options.seed
        self.sampler, self.backend = options.sampler, options.backend

    def __setattr__(self, name: str, value) -> None:
        """A tensor among the arguments is a buffer, which moves with the module, also where it replaces a number."""
        # A property of a subclass, or of torch.nn.utils.parametrize, sets what it likes.
        if name in _TENSORS and not isinstance(value, Parameter) and not hasattr(type(self), name):
            self._parameters.pop(name, None)
            if value is not None and not isinstance(value, Tensor):
                self._buffers.pop(name, None)
            elif name not in self._buffers:
                self.__dict__.pop(name, None)
                self.register_buffer(name, value, persistent=_TENSORS[name])
                return
        super().__setattr__(name, value)

    def _apply(self, function, recurse=True):
        exact = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(function, recurse)
        for name, x in exact.items():  # .half() of a whole model would round the margins for good
            if self._buffers[name].dtype != x.dtype:
                self._buffers[name] = x.to(self._buffers[name].device)
        if isinstance(self.seed, Tensor):
            moved = function(self.seed)
            self.seed = moved if self.seed.is_meta else self.seed.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """The arguments that have no default, and all others that are not at theirs."""
        shown = []
        _, *arguments = signature(
            type(self).__init__
        ).parameters.items()  # FSDP2 gives its classes a __new__ of any arguments
        for name, argument in arguments:
            if not hasattr(self, name):  # a subclass may keep its arguments elsewhere
                continue
            value = getattr(self, name)
            if name == "cls_num_list":
                shown.append(f"cls_num_list=<{len(value)} classes>")
            elif isinstance(value, Tensor) and value.dim():
                shown.append(f"{name}=<{len(value)} classes>")
            elif not _equal(value, argument.default):
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


def _equal(value, default) -> bool:
    """Numbers by value, all else by text, since arrays and tensors have no one answer."""
    if isinstance(value, Real) and isinstance(default, Real):
        return value == default
    return repr(value) == repr(default)


class NoisedTopK(_Noised):
    r"""Module of :func:`~topk_fast.functional.noised_topk`: smoothed k-th largest value along ``dim``.

    .. math:: top_k = \frac1B \sum_{b=1}^{B} (s + \epsilon Z_b)_{[k]}

    Fresh noise in every call, in eval mode too; a ``seed`` given here fixes it for all calls. The state_dict is empty.

    Args:
        k, epsilon, n_sample, dim, noise, generator, seed, sampler, backend: as in
            :func:`~topk_fast.functional.noised_topk`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

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
        k: int | Sequence[int],
        epsilon: float | Tensor = 1.0,
        n_sample: int = 5,
        dim: int = -1,
        *,
        noise: str = "normal",
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        sampler: str = "auto",
        backend: str = "auto",
    ):
        super().__init__(k, Options(epsilon, n_sample, noise, seed, generator, sampler, backend))
        checks.check_ranks(k, 1, 2**31 - 1)
        self.dim = checks.check_integer("dim", dim, -64, 63)

    def forward(self, x: Tensor) -> Tensor:
        source = dict(seed=self.seed, generator=self.generator, sampler=self.sampler, backend=self.backend)
        return noised_topk(x, self.k, self.epsilon, self.n_sample, self.dim, noise=self.noise, **source)


class Loss(_Noised):
    """The part that the losses share: their arguments under the names of :mod:`topk_fast.functional`."""

    link: str
    temperature: float
    margin: Any
    scale: float
    rank_weights: Sequence[float] | None
    weight: Tensor | None
    reduction: str
    offset: Tensor | None

    def __init__(self, loss: LossRequest):
        super().__init__(loss.k, loss.options)
        ranks = checks.check_top(loss.k, None, least=int(bool(loss.exclude_target)), several=loss.several)
        self.ignore_index = loss_checks.check_ignore_index(loss.ignore_index)
        sharding.check_group(loss.options.process_group)
        self.process_group = loss.options.process_group
        self.several, self.exclude_target = loss.several, loss.exclude_target
        loss_checks.check_link(loss.criterion, len(ranks))
        for name, x in loss.vectors.items():
            checks.check_class_vector(name, x, None, getattr(x, "device", None))
        for name, value in {**loss.criterion._asdict(), "offset": loss.offset}.items():
            setattr(self, name, value)

    def as_request(self) -> LossRequest:
        """The loss's arguments as they are now."""
        criterion = Criterion(
            self.link, self.temperature, self.margin, self.scale, self.rank_weights, self.weight, self.reduction
        )
        source = (self.seed, self.generator, self.sampler, self.backend, self.process_group)
        options = Options(self.epsilon, self.n_sample, self.noise, *source)
        return LossRequest(
            self.k, options, criterion, self.ignore_index, self.exclude_target, self.offset, self.several
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return losses.evaluate(input, target, self.as_request())

    def __deepcopy__(self, memo):
        return sharding.copy_with_group(self, memo)


class NoisedTopKLoss(Loss):
    r"""Module of :func:`~topk_fast.functional.noised_topk_loss`: any K or several, and any link.

    .. math:: \ell(s, y) = w_y \sum_m r_m \cdot scale \cdot link(m_y + top_{K_m + 1}(s) - s_y)

    Fresh noise in every call, in eval mode too; a ``seed`` given here fixes it for all calls. Use a ``generator`` for
    reproducible training. ``margin`` (if it is a tensor), ``offset`` and ``weight`` are buffers of the state_dict,
    which keep their dtype in a model that is cast. ``epsilon`` may be a :class:`torch.nn.Parameter`, which is learned.

    Args:
        k, epsilon, n_sample, noise: as in :func:`~topk_fast.functional.noised_topk_loss`.
        link, temperature, margin, scale, rank_weights: as in :func:`~topk_fast.functional.noised_topk_loss`.
        exclude_target, offset, weight, reduction, ignore_index: as in :func:`~topk_fast.functional.noised_topk_loss`.
        generator, seed, sampler, backend: as in :func:`~topk_fast.functional.noised_topk`.
        process_group: as in :func:`~topk_fast.functional.noised_topk_loss`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

    Example:
        >>> import torch
        >>> from topk_fast import NoisedTopKLoss
        >>> criterion = NoisedTopKLoss(k=(1, 5), link="softplus", exclude_target=True, margin=0.0)
        >>> logits = torch.randn(8, 100, requires_grad=True)
        >>> criterion(logits, torch.randint(100, (8,))).backward()
    """

    def __init__(
        self,
        k: int | Sequence[int] = (1, 5),
        epsilon: float | Tensor = 1.0,
        n_sample: int = 5,
        *,
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
    ):
        criterion = Criterion(link, temperature, margin, scale, rank_weights, weight, reduction)
        options = Options(epsilon, n_sample, noise, seed, generator, sampler, backend, process_group)
        super().__init__(LossRequest(k, options, criterion, ignore_index, exclude_target, offset))


class SampledCrossEntropy(Loss):
    r"""Module of :func:`~topk_fast.functional.sampled_cross_entropy`: cross-entropy for training, its gradient sparse.

    .. math:: \ell(s, y) = \frac1B \sum_{b=1}^{B} \max_j (s_j + G_{bj}) - s_y

    Fresh noise in every call, in eval mode too: evaluate with :class:`torch.nn.CrossEntropyLoss`. ``offset`` and
    ``weight`` are buffers, as in :class:`NoisedTopKLoss`.

    Args:
        n_sample, offset, weight, reduction, ignore_index, generator, seed, sampler, backend, process_group: as in
            :func:`~topk_fast.functional.sampled_cross_entropy`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

    Example:
        >>> import torch
        >>> from topk_fast import LinearHead, SampledCrossEntropy
        >>> head = LinearHead(16, 50_000, SampledCrossEntropy(n_sample=16))
        >>> head(torch.randn(8, 16), torch.randint(50_000, (8,))).backward()
    """

    def __init__(
        self,
        n_sample: int = 16,
        *,
        offset: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        sampler: str = "auto",
        backend: str = "auto",
        process_group=None,
    ):
        criterion = Criterion("identity", margin=0.0, weight=weight, reduction=reduction)
        options = Options(1.0, n_sample, "gumbel", seed, generator, sampler, backend, process_group)
        super().__init__(LossRequest(0, options, criterion, ignore_index, offset=offset))


class BalNoisedTopK(Loss):
    r"""Module of :func:`~topk_fast.functional.bal_noised_topk_loss`, for data without a long tail.

    .. math:: \ell(s, y) = \max(0,\; 1 + top_{K+1}(s) - s_y)

    Fresh noise in every call, as in :class:`NoisedTopKLoss`. The state_dict is empty.

    Args:
        k, epsilon, n_sample, reduction, ignore_index, generator, seed, sampler, backend, process_group: as in
            :func:`~topk_fast.functional.bal_noised_topk_loss`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

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
        epsilon: float | Tensor,
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
        options = Options(epsilon, n_sample, "normal", seed, generator, sampler, backend, process_group)
        super().__init__(LossRequest(k, options, Criterion(reduction=reduction), ignore_index, several=False))


class ImbalNoisedTopK(Loss):
    r"""Module of :func:`~topk_fast.functional.imbal_noised_topk_loss`, for long-tailed data.

    .. math:: \ell(s, y) = \max(0,\; scale \, (m_y + top_{K+1}(s) - s_y))

    The margins m are the buffer ``m_list`` [L] of the state_dict, as in pytopk, float32 also in a model that was cast.

    Args:
        k, epsilon: as in :func:`~topk_fast.functional.imbal_noised_topk_loss`.
        max_m, cls_num_list: the largest margin, and L counts, as in :func:`~topk_fast.functional.class_margins`. They
            are read when the module is made, and by ``reset_parameters``, which fills ``m_list`` again.
        scale: factor of the hinge, > 0. The default assumes cosine logits: end the model in :class:`NormedLinear`, or
            set ``scale=1``.
        n_sample, reduction, ignore_index, generator, seed, sampler, backend, process_group: as in
            :func:`~topk_fast.functional.imbal_noised_topk_loss`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

    Example:
        >>> import torch
        >>> from topk_fast import ImbalNoisedTopK, NormedLinear
        >>> head = NormedLinear(16, 3)
        >>> criterion = ImbalNoisedTopK(k=1, epsilon=0.01, max_m=0.3, cls_num_list=[500, 15, 3])
        >>> criterion(head(torch.randn(8, 16)), torch.randint(3, (8,))).backward()
    """

    m_list: Tensor

    def __init__(
        self,
        k: int,
        epsilon: float | Tensor,
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
        criterion = Criterion(scale=scale, reduction=reduction)
        options = Options(epsilon, n_sample, "normal", seed, generator, sampler, backend, process_group)
        super().__init__(LossRequest(k, options, criterion, ignore_index, several=False))
        counts = loss_checks.check_counts(cls_num_list)
        checks.check_top(k, len(counts))
        self.max_m, self.cls_num_list = checks.check_not_negative("max_m", max_m), counts
        device = cls_num_list.device if isinstance(cls_num_list, Tensor) else None
        self.register_buffer("m_list", make_margins(counts, self.max_m, device))

    def reset_parameters(self) -> None:
        """Fills ``m_list`` again from ``cls_num_list`` and ``max_m``, as after ``to_empty``."""
        with torch.no_grad():
            self.m_list.copy_(make_margins(self.cls_num_list, self.max_m, None))

    def as_request(self) -> LossRequest:
        loss = super().as_request()
        return loss._replace(criterion=loss.criterion._replace(margin=self.m_list))


class NormedLinear(Module):
    r"""Cosine logits, which the imbalanced loss assumes, from [..., in_features] to [..., out_features].

    .. math:: s_j = \frac{x^T w_j}{\|x\| \|w_j\|} \in [-1, 1]

    Lengths are computed in float32 at least. A length below 1e-8 (float16: 6.1e-5) counts as that, as in
    :func:`torch.nn.functional.cosine_similarity`: a row of zeros has logits of 0 and a gradient that is large, but
    finite. Rows of the weight start at length 1, in directions uniform on the sphere: the angle by which a gradient
    step turns a row falls with its length, so that long rows would learn slowly.

    Args:
        in_features, out_features, device, dtype: as in :class:`torch.nn.Linear`. The weight is
            [out_features, in_features], and there is no bias.

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
