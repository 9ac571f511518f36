r"""The losses: torch code on the excesses of the smoothed ranks over the true class's score, the same for all backends.

.. math:: e_m = top_{K_m + 1}(s) - s_y, \qquad \ell = \max(0,\; scale \, (m_y + e))

A link, its margins, ignored rows and the reduction stand here and nowhere else.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .request import Labels


class Hinge(NamedTuple):
    """The link of the top-K hinge losses."""

    margins: Tensor | None  # [L]; None: 1 for every class
    scale: float
    reduction: str

    def losses(self, excess: Tensor, labels: Labels) -> Tensor:
        """Losses [N] from excesses [N, 1], 0 in rows whose target is ``ignore_index``."""
        ignored = labels.target == labels.ignore_index
        margin = 1.0 if self.margins is None else self.margins[labels.target.masked_fill(ignored, 0)]
        losses = excess[:, 0] + margin
        if self.scale != 1.0:
            losses = losses * self.scale
        return losses.relu().masked_fill(ignored, 0.0)

    def reduced(self, excess: Tensor, labels: Labels) -> Tensor:
        """The losses' reduction, or the losses themselves."""
        return reduce_losses(self.losses(excess, labels), self.count_valid(labels), self.reduction)

    def count_valid(self, labels: Labels) -> Tensor | None:
        """The number of rows that are not ignored, without dimensions, where the reduction divides by it."""
        return (labels.target != labels.ignore_index).sum() if self.reduction == "mean" else None

    def tensors(self, labels: Labels) -> dict[str, Tensor]:
        """What ranks that share the classes must have in common, besides `facts`."""
        if self.margins is None or not len(self.margins):
            return {}
        known = labels.target.masked_fill(labels.target == labels.ignore_index, 0)
        n_classes = len(self.margins)
        picked = self.margins[known.clamp(0, n_classes - 1)]
        return {"margins": torch.cat([picked, picked.new_tensor([n_classes])])}

    def facts(self) -> dict[str, object]:
        return {"scale": self.scale, "margins": None if self.margins is None else len(self.margins)}

    def slope(self, losses: Tensor) -> Tensor:
        """The derivative [N] of the losses with respect to the excesses; 0 where the loss is 0."""
        slope = (losses > 0).to(losses.dtype)
        return slope if self.scale == 1.0 else slope * self.scale


def reduce_losses(losses: Tensor, n_valid: Tensor | None, reduction: str) -> Tensor:
    """The losses themselves for "none", their sum, or their mean over the ``n_valid`` rows that are not ignored."""
    if reduction == "none":
        return losses
    return losses.sum() if n_valid is None else losses.sum() / n_valid


def make_margins(counts: list[float], max_m: float, device: torch.device | None) -> Tensor:
    """The LDAM margins [L] of classes with these numbers of examples, float32."""
    margins = [1.0 / n**0.25 for n in counts]
    factor = max_m / max(margins)
    return torch.tensor([m * factor for m in margins], dtype=torch.float32, device=device)
