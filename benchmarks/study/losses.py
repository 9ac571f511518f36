"""The losses of the study, with the head and the bounds of the hyper-parameter search of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.losses import FocalLoss, LDAMLoss, LogitAdjustedCrossEntropy, SmoothTopKSVM
from topk_fast import BalNoisedTopK, ImbalNoisedTopK, NoisedTopKLoss, SampledCrossEntropy

Bounds = dict[str, tuple[float, float]]

K, N_SAMPLE = 5, 5  # of the noised top-K losses, unless an ablation varies them
# Of AdamW: learning rate and weight decay are drawn log-uniformly, eps takes each of its values as often.
OPTIMIZER: Bounds = {"lr": (5e-4, 3e-2), "weight_decay": (1e-3, 1.0)}
EPS = (1e-8, 1e-6, 1e-4)
TAU = {"tau": (0.3, 2.0)}  # the strength of a logit adjustment
SCALE = {"scale": (8.0, 64.0)}  # of cosines


@dataclass(frozen=True)
class Loss:
    """`make(settings, counts)` returns the loss for classes of so many training rows; `space` bounds its settings.

    The head computes cosines if `cosine` is set. They are multiplied by the setting `scale` where `space` has one; LDAM
    and the imbalanced loss, whose margins are cosines, multiply by themselves.
    """

    make: Callable[[dict, list[int]], nn.Module]
    space: Bounds = field(default_factory=dict)
    cosine: bool = False


def offset(s: dict, count: list[int]) -> Tensor:
    """tau ln(n_j / sum_i n_i), which is added to the scores in training only."""
    n = torch.tensor(count, dtype=torch.float32)
    return s["tau"] * (n / n.sum()).log()


def sampled(n_sample: int, adjusted: bool = False) -> Callable[[dict, list[int]], nn.Module]:
    return lambda s, count: SampledCrossEntropy(
        s.get("n_sample", n_sample), offset=offset(s, count) if adjusted else None
    )


def softplus(s: dict, count: list[int]) -> nn.Module:
    """Softplus links at several K, of the noised top-K without the true class and without a margin."""
    return NoisedTopKLoss(
        s.get("ranks", (1, K)),
        s["epsilon"],
        s.get("n_sample", N_SAMPLE),
        link="softplus",
        exclude_target=True,
        margin=0.0,
        offset=offset(s, count) if "tau" in s else None,
    )


def balanced(s: dict, count: list[int]) -> nn.Module:
    return BalNoisedTopK(s.get("k", K), s["epsilon"], s.get("n_sample", N_SAMPLE))


def imbalanced(s: dict, count: list[int]) -> nn.Module:
    return ImbalNoisedTopK(s.get("k", K), s["epsilon"], s["max_m"], count, n_sample=s.get("n_sample", N_SAMPLE))


EPSILON = {"epsilon": (0.1, 3.0)}
BALANCED, IMBALANCED = "balanced noised top-5", "imbalanced noised top-5"
LOSSES = {
    "cross-entropy": Loss(lambda s, count: nn.CrossEntropyLoss()),
    "cross-entropy, cosine": Loss(lambda s, count: nn.CrossEntropyLoss(), SCALE, cosine=True),
    "focal": Loss(lambda s, count: FocalLoss(s["gamma"]), {"gamma": (0.5, 4.0)}),
    "smooth top-K SVM": Loss(lambda s, count: SmoothTopKSVM(K, s["temperature"]), {"temperature": (0.1, 2.0)}),
    BALANCED: Loss(balanced, EPSILON),
    "sampled, B = 1": Loss(sampled(1)),
    "sampled, B = 5": Loss(sampled(5)),
    "sampled, B = 16": Loss(sampled(16)),
    "{1, 5} softplus": Loss(softplus, EPSILON),
    "{1, 5} softplus, cosine": Loss(softplus, EPSILON | SCALE, cosine=True),
    "LDAM": Loss(
        lambda s, count: LDAMLoss(count, s["max_m"], s["s"]), {"max_m": (0.05, 0.8), "s": (10.0, 60.0)}, cosine=True
    ),
    IMBALANCED: Loss(imbalanced, {"epsilon": (0.003, 0.1), "max_m": (0.02, 0.5)}, cosine=True),
    "logit-adjusted": Loss(lambda s, count: LogitAdjustedCrossEntropy(count, s["tau"]), TAU),
    "logit-adjusted, cosine": Loss(
        lambda s, count: LogitAdjustedCrossEntropy(count, s["tau"]), TAU | SCALE, cosine=True
    ),
    "sampled, B = 5, offset": Loss(sampled(5, adjusted=True), TAU),
    "sampled, B = 16, offset": Loss(sampled(16, adjusted=True), TAU),
    "{1, 5} softplus, offset": Loss(softplus, EPSILON | TAU),
    "{1, 5} softplus, cosine, offset": Loss(softplus, EPSILON | SCALE | TAU, cosine=True),
}
BALANCED_DATA = [name for name, loss in LOSSES.items() if "tau" not in loss.space]  # where all classes are alike
