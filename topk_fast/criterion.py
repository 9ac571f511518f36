r"""What a loss makes of the excesses of the smoothed ranks over the true class's score: torch code for all backends.

.. math:: e_m = top_{K_m + 1}(s) - s_y, \qquad
          \ell = w_y \sum_m r_m \, scale \cdot link(m_y + e_m)

A link, its margins, weights, ignored rows and the reduction stand here. The compiled backends have a kernel for these,
csrc/link.h, because each operation on a few numbers costs a launch on a GPU, and microseconds on a CPU.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .request import Labels

LINKS = ("hinge", "softplus", "identity")
REDUCTIONS = ("mean", "sum", "none")
_LINEAR_FROM = 50.0  # where softplus and its argument are equal in float64


class Criterion(NamedTuple):
    """A loss of excesses; made of the user's arguments, and checked by `loss_checks.check_criterion`."""

    link: str = "hinge"
    temperature: float = 1.0
    margin: Any = 1.0  # a number, or a tensor [L]
    scale: float = 1.0
    rank_weights: Any = None  # a number for each rank; None: 1
    weight: Any = None  # [L]; None: 1 for every class
    reduction: str = "mean"

    @property
    def is_curved(self) -> bool:
        """Whether the loss has a second derivative in the excesses that is not 0."""
        return self.link == "softplus"

    def linked(self, excess: Tensor, labels: Labels) -> Tensor:
        """The links' values, times the scale: [N, M] -> [N, M]."""
        margin = self.margin[labels.known, None] if isinstance(self.margin, Tensor) else self.margin
        x = excess + margin
        if self.link == "hinge":
            x = x.relu()
        elif self.link == "softplus":
            x = F.softplus(x, beta=1.0 / self.temperature, threshold=_LINEAR_FROM)
        return x if self.scale == 1.0 else x * self.scale

    def losses(self, linked: Tensor, labels: Labels) -> tuple[Tensor, Tensor | None]:
        """Losses [N] from the links' values, 0 in rows whose target is ``ignore_index``, and their mean's divisor.

        The mean divides by the number of rows that are not ignored, or by the sum of their classes' weights.
        """
        valid = labels.target != labels.ignore_index
        columns = list(linked.unbind(1))
        if self.rank_weights is not None:
            columns = [x * r for x, r in zip(columns, self.rank_weights)]
        total = columns[0]
        for x in columns[1:]:
            total = total + x
        shares = valid
        if self.weight is not None:
            shares = self._weights(labels)
            total = total * shares
        return torch.where(valid, total, 0.0), shares.sum() if self.reduction == "mean" else None

    def _weights(self, labels: Labels) -> Tensor:
        """The weights of the rows [N], 0 where they are ignored: class 0's, which they would take, may be infinite."""
        return self.weight[labels.known].masked_fill(labels.target == labels.ignore_index, 0.0)

    def reduce(self, losses: Tensor, divisor: Tensor | None) -> Tensor:
        """The losses themselves for "none", their sum, or their mean."""
        if self.reduction == "none":
            return losses
        return losses.sum() if divisor is None else losses.sum() / divisor

    def reduced(self, excess: Tensor, labels: Labels) -> Tensor:
        """The loss of the excesses [N, M]."""
        return self.reduce(*self.losses(self.linked(excess, labels), labels))

    def slope(self, linked: Tensor, labels: Labels) -> Tensor:
        """The derivative [N, M] of the losses in the excesses, for links that are straight except for a kink."""
        slope = linked.sign() if self.link == "hinge" else torch.ones_like(linked)  # a hinge is not negative
        if self.rank_weights is not None:
            slope = torch.stack([x * r for x, r in zip(slope.unbind(1), self.rank_weights)], dim=1)
        if self.weight is not None:
            slope = slope * self._weights(labels)[:, None]
        return slope if self.scale == 1.0 else slope * self.scale

    def evaluated(self, excess: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss of the excesses, `slope`, and the divisor of a mean."""
        linked = self.linked(excess, labels)
        losses, divisor = self.losses(linked, labels)
        return self.reduce(losses, divisor), self.slope(linked, labels), divisor

    def arguments(self, n_ranks: int) -> tuple:
        """What the op ``link``, which does the same as `evaluated`, takes of it."""
        margin, margins = (0.0, self.margin) if isinstance(self.margin, Tensor) else (self.margin, None)
        rank_weights = self.rank_weights or (1.0,) * n_ranks
        link, reduction = LINKS.index(self.link), REDUCTIONS.index(self.reduction)
        return link, self.temperature, margin, margins, self.scale, rank_weights, self.weight, reduction

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The tensors [L], by what the errors call them."""
        out = {"margins": self.margin} if isinstance(self.margin, Tensor) else {}
        return out if self.weight is None else out | {"weight": self.weight}

    def facts(self) -> dict[str, object]:
        """What ranks that share the classes must have in common, besides `vectors`."""
        margin = self.margin if isinstance(self.margin, float) else "a tensor"
        return {
            "link": self.link,
            "temperature": self.temperature,
            "margin": margin,
            "scale": self.scale,
            "rank_weights": self.rank_weights,
            "weight": "a tensor" if self.weight is not None else None,
            "reduction": self.reduction,
        }


def make_margins(counts: list[float], max_m: float, device: torch.device | None) -> Tensor:
    """The LDAM margins [L] of classes with these numbers of examples, float32."""
    margins = [1.0 / n**0.25 for n in counts]
    factor = max_m / max(margins)
    return torch.tensor([m * factor for m in margins], dtype=torch.float32, device=device)


def make_offsets(counts: list[float], tau: float, device: torch.device | None) -> Tensor:
    """The offsets [L] of logit adjustment for classes with these numbers of examples, float32."""
    total = math.log(math.fsum(counts))
    return torch.tensor([tau * (math.log(n) - total) for n in counts], dtype=torch.float32, device=device)
