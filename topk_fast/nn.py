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
from .functional import bal_noised_topk_loss, imbal_noised_topk_loss, noised_topk
from .linear_gradient import unit_rows
from .losses import make_margins
from .request import Labels, Options

__all__ = [
    "BalNoisedTopK",
    "ImbalNoisedTopK",
    "NoisedTopK",
    "NormedLinear",
]


class _Noised(Module):
    """The part that all modules share: a source of noise, and a repr."""

    def __init__(self, k, options: Options):
        super().__init__()
        checks.check_epsilon(options.epsilon, None)
        checks.check_n_sample(options.n_sample)
        checks.check_law(options.noise)
        checks.check_source(options.seed, options.generator)
        checks.check_sampler(options.sampler)
        backends.check_name(options.backend)
        if isinstance(options.epsilon, Tensor):  # moves with the module
            self.register_buffer("epsilon", options.epsilon, persistent=False)
        else:
            self.epsilon = options.epsilon
        self.k, self.n_sample = k, options.n_sample
        self.generator, self.seed = options.generator, options.seed
        self.sampler, self.backend = options.sampler, options.backend

    def _noise(self) -> dict:
        """The keywords that all functions take."""
        return dict(generator=self.generator, seed=self.seed, sampler=self.sampler, backend=self.backend)

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
        self.dim, self.noise = checks.check_integer("dim", dim, -64, 63), noise

    def forward(self, x: Tensor) -> Tensor:
        return noised_topk(x, self.k, self.epsilon, self.n_sample, self.dim, noise=self.noise, **self._noise())


class Loss(_Noised):
    """The part that the losses share: their parameters under the names of :mod:`topk_fast.functional`."""

    def __init__(self, k, options: Options, reduction, ignore_index):
        super().__init__(k, options)
        checks.check_integer("k", k, 0, 2**31 - 2)
        checks.check_reduction(reduction)
        checks.check_ignore_index(Labels(None, ignore_index))
        sharding.check_group(options.process_group)
        self.reduction, self.ignore_index, self.process_group = reduction, ignore_index, options.process_group

    def __deepcopy__(self, memo):
        memo[id(self.process_group)] = self.process_group  # a copy communicates with the same ranks
        memo[id(self)] = copy = self.__new__(type(self))
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _keywords(self) -> dict:
        """The keywords that all losses take."""
        own = dict(reduction=self.reduction, ignore_index=self.ignore_index, process_group=self.process_group)
        return own | self._noise()


class Margins(Module):
    """The buffer ``m_list`` of the margins, which stays exact when a module is cast, and can be made again."""

    def _make_margins(self, k, max_m, counts: list[float], device) -> None:
        checks.check_top(k, len(counts))
        self.max_m, self.cls_num_list = checks.check_max_m(max_m), counts
        self.register_buffer("m_list", make_margins(counts, self.max_m, device))

    def reset_parameters(self) -> None:
        """Fills ``m_list`` again from ``cls_num_list`` and ``max_m``, as after ``to_empty``."""
        with torch.no_grad():
            self.m_list.copy_(make_margins(self.cls_num_list, self.max_m, None))

    def _apply(self, function, recurse=True):
        exact = self.m_list
        super()._apply(function, recurse)
        if self.m_list.dtype != exact.dtype:  # .half() of a whole model would round the margins for good
            self.m_list = exact.to(self.m_list.device)
        return self


class BalNoisedTopK(Loss):
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
        super().__init__(k, options, reduction, ignore_index)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return bal_noised_topk_loss(input, target, self.k, self.epsilon, self.n_sample, **self._keywords())


class ImbalNoisedTopK(Margins, Loss):
    """Module of :func:`~topk_fast.functional.imbal_noised_topk_loss`, for long-tailed data.

    ``max_m`` and ``cls_num_list`` make the margins, see :func:`~topk_fast.functional.class_margins`; they are the
    buffer ``m_list`` of the state_dict, as in pytopk, float32 also in a model that was cast. ``reset_parameters``
    makes them again, as after ``to_empty``. The default ``scale`` assumes cosine logits: end the model in
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
        options = Options(epsilon, n_sample, "normal", seed, generator, sampler, backend, process_group)
        super().__init__(k, options, reduction, ignore_index)
        checks.check_scale(scale)
        self.scale = scale
        device = cls_num_list.device if isinstance(cls_num_list, Tensor) else None
        self._make_margins(k, max_m, checks.check_counts(cls_num_list), device)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return imbal_noised_topk_loss(
            input, target, self.k, self.m_list, self.epsilon, self.scale, self.n_sample, **self._keywords()
        )


class NormedLinear(Module):
    r"""Cosine logits: :math:`x^T w_j / (\|x\| \|w_j\|)` in [-1, 1], which the imbalanced loss assumes.

    Lengths are float32 at least. A length below 1e-8 (float16: 6.1e-5) counts as that, as in
    :func:`torch.nn.functional.cosine_similarity`: a row of zeros has logits of 0 and a gradient that is large, but
    finite. Rows of the weight start at length 1, in directions uniform on the sphere. What a gradient step turns a
    row by falls with its length, so that long rows would learn slowly.

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
