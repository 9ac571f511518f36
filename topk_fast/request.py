"""Requests: a call's arguments, checked once at the door, which travel whole from there to the ops.

The fields of `Noise`, `Place`, `Slice` and `Labels` are arguments of the ops, in this order; the text below each
class is theirs in the ops' schemas. A new parameter of the search joins one of them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """The arguments that all functions share, as the user gave them; `checks` turns them into the requests below."""

    epsilon: Any
    n_sample: Any
    noise: Any
    seed: Any
    generator: Any
    sampler: Any
    backend: Any
    process_group: Any = None


class LossRequest(NamedTuple):
    """All that a loss is called with besides its input and target, as the user gave it."""

    k: Any
    options: Options
    criterion: Any  # criterion.Criterion; None: the excesses themselves
    ignore_index: Any = -100
    exclude_target: Any = False
    offset: Any = None  # [L], added to the scores
    several: bool = True  # whether k may be a sequence

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The numbers of each class [L], by what the errors call them."""
        out = {} if self.criterion is None else self.criterion.vectors
        return out if self.offset is None else out | {"offset": self.offset}


class Linear(NamedTuple):
    """A linear layer, as the user gave it; `Layer` is what the ops take of it."""

    weight: Any  # [L, D], or this rank's classes
    bias: Any = None  # [L]
    normalize: Any = False
    chunk_size: Any = None
    sparse_grad: Any = False
    return_hits: Any = None  # the K, or several, of the hits that are wanted beside the loss
    n_classes: Any = None  # of all ranks, where the layer knows


class Noise(NamedTuple):
    """The noise, and which ranks of the noised scores are searched."""

    seed: Tensor  # int64 without dimensions, on the scores' device
    ranks: tuple[int, ...]  # K + 1 for each K of a loss
    epsilon: float
    schedule: Tensor | None  # float64 without dimensions, on the scores' device: replaces the number epsilon
    n_sample: int
    law: int  # index into noise.LAWS
    dense: bool  # every class gets a draw of its own

    @property
    def k(self) -> int:
        """The length of the lists."""
        return max(self.ranks)

    @property
    def learned_epsilon(self) -> Tensor | None:
        return self.schedule if self.schedule is not None and self.schedule.requires_grad else None

    @property
    def without_derivative(self) -> "Noise":
        """The same with an epsilon that is not learned."""
        return self if self.schedule is None else self._replace(schedule=self.schedule.detach())


def without_noise(seed: Tensor, k: int) -> Noise:
    """A search for the k largest scores themselves, or for none; any seed on their device will do."""
    return Noise(seed, (k,), epsilon=0.0, schedule=None, n_sample=1, law=0, dense=False)


NOISE = "Tensor seed, int[] ranks, float epsilon, Tensor? schedule, int n_sample, int law, bool dense"


class Place(NamedTuple):
    """The global row and class of the first score of a slice, to which draws belong."""

    first_row: int = 0
    first_class: int = 0


PLACE = "int first_row, int first_class"


class Slice(NamedTuple):
    """The columns of a gradient of the scores that are wanted."""

    first_class: int
    n_classes: int
    dtype: torch.dtype


SLICE = "int first_class, SymInt n_classes, ScalarType dtype"


class Labels(NamedTuple):
    """The true classes."""

    target: Any  # int64 tensor [N]; None where the smoothed values themselves are wanted
    ignore_index: int = -100
    exclude_target: bool = False  # rank the other classes only

    @property
    def known(self) -> Tensor:
        """The true classes [N], 0 in ignored rows."""
        return self.target.masked_fill(self.target == self.ignore_index, 0)


LABELS = "Tensor? target, int ignore_index, bool exclude_target"


class Search(NamedTuple):
    """A search for the excesses of a batch of scores."""

    scores: Tensor  # [N, L], or this rank's classes
    noise: Noise
    labels: Labels
    backend: str
    shards: Any = None  # sharding.Shards where classes lie on several ranks

    @property
    def n_classes(self) -> int:
        """The number of classes at hand."""
        return self.scores.shape[1]

    @property
    def first_class(self) -> int:
        return 0 if self.shards is None else self.shards.first_class


class Layer(NamedTuple):
    """How a linear layer's logits are computed and differentiated."""

    normalize: bool
    chunk: int  # classes walked at a time
    dtype: torch.dtype  # of the logits
    sparse: bool  # row-sparse gradients of weight and bias
    n_best: int = 0  # how many classes with the largest logits are wanted beside the excesses


LAYER = "bool normalize, SymInt chunk_size, ScalarType dtype, bool sparse_grad, int n_best"


class LinearSearch(NamedTuple):
    """A search for the excesses of a linear layer's logits, which are never held as a whole."""

    rows: Tensor  # [N, D], of length 1 where the layer normalizes
    weight: Tensor  # [L, D], or this rank's classes
    bias: Tensor | None  # [L]
    noise: Noise
    labels: Labels
    layer: Layer
    backend: str
    shards: Any = None

    @property
    def n_classes(self) -> int:
        """The number of classes at hand."""
        return self.weight.shape[0]

    @property
    def first_class(self) -> int:
        return 0 if self.shards is None else self.shards.first_class
