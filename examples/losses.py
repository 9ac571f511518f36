"""The losses of the demo, with the head and the bounds of the hyper-parameter search of each."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from topk_fast import BalNoisedTopK, NoisedTopKLoss, SampledCrossEntropy
from topk_fast.functional import class_offsets

STUDY = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "study.json"
Bounds = dict[str, tuple[float, float]]
Make = Callable[[dict, list[int]], nn.Module]

K, N_SAMPLE = 5, 5  # of the noised top-K losses, unless an ablation varies them
# Of AdamW: learning rate and weight decay are drawn log-uniformly, eps takes each of its values as often.
OPTIMIZER: Bounds = {"lr": (5e-4, 3e-2), "weight_decay": (1e-3, 1.0)}
EPS = (1e-8, 1e-6, 1e-4)
SGD: Bounds = {"lr": (1e-2, 1e1), "weight_decay": (1e-6, 1e-3)}  # with Nesterov's momentum, which the study compares
MOMENTUM = 0.9
EPSILON: Bounds = {"epsilon": (0.1, 3.0)}
SCALE: Bounds = {"scale": (8.0, 64.0)}  # of cosines


@dataclass(frozen=True)
class Loss:
    """`make(settings, counts)` returns the loss for classes of so many training rows; `space` bounds its settings.

    The head computes cosines if `cosine` is set. They are multiplied by the setting `scale` where `space` has one.
    """

    make: Make
    space: Bounds = field(default_factory=dict)
    cosine: bool = False


def offset(s: dict, count: list[int]):
    """The offset of a logit adjustment of strength `tau`, where the settings have one; it acts in training only."""
    return class_offsets(count, s["tau"]) if "tau" in s else None


def sampled(n_sample: int) -> Make:
    return lambda s, count: SampledCrossEntropy(s.get("n_sample", n_sample), offset=offset(s, count))


def softplus(s: dict, count: list[int]) -> nn.Module:
    """Softplus links at several K, of the noised top-K without the true class and without a margin."""
    return NoisedTopKLoss(
        s.get("ranks", (1, K)),
        s["epsilon"],
        s.get("n_sample", N_SAMPLE),
        link="softplus",
        exclude_target=True,
        margin=0.0,
        offset=offset(s, count),
    )


def balanced(s: dict, count: list[int]) -> nn.Module:
    return BalNoisedTopK(s.get("k", K), s["epsilon"], s.get("n_sample", N_SAMPLE))


CROSS_ENTROPY, BALANCED, SOFTPLUS = "cross-entropy", "balanced noised top-5", "{1, 5} softplus"
LOSSES = {
    CROSS_ENTROPY: Loss(lambda s, count: nn.CrossEntropyLoss()),
    "cross-entropy, cosine": Loss(lambda s, count: nn.CrossEntropyLoss(), SCALE, cosine=True),
    "sampled, B = 16": Loss(sampled(16)),
    BALANCED: Loss(balanced, EPSILON),
    SOFTPLUS: Loss(softplus, EPSILON),
}


def chosen_settings(task: str, loss: str) -> dict:
    """The settings that the study chose for a loss on the validation rows of a task, from its committed result."""
    runs = json.loads(STUDY.read_text())["runs"]
    return next(run["settings"] for run in runs if (run["stage"], run["data"], run["loss"]) == ("test", task, loss))
