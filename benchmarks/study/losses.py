"""The losses of the study: those of the demo, their rivals, and the forms for long tails."""

from torch import nn

from benchmarks.losses import FocalLoss, LDAMLoss, LogitAdjustedCrossEntropy, SmoothTopKSVM
from examples import losses as demo
from examples.losses import EPSILON, N_SAMPLE, SCALE, Bounds, K, Loss, sampled, softplus
from topk_fast import ImbalNoisedTopK

TAU: Bounds = {"tau": (0.3, 2.0)}  # the strength of a logit adjustment
IMBALANCED = "imbalanced noised top-5"


def imbalanced(s: dict, count: list[int]) -> nn.Module:
    return ImbalNoisedTopK(s.get("k", K), s["epsilon"], s["max_m"], count, n_sample=s.get("n_sample", N_SAMPLE))


def adjusted(s: dict, count: list[int]) -> nn.Module:
    return LogitAdjustedCrossEntropy(count, s["tau"])


# LDAM and the imbalanced loss, whose margins are cosines, multiply their cosines by themselves.
LOSSES = demo.LOSSES | {
    "focal": Loss(lambda s, count: FocalLoss(s["gamma"]), {"gamma": (0.5, 4.0)}),
    "smooth top-K SVM": Loss(lambda s, count: SmoothTopKSVM(K, s["temperature"]), {"temperature": (0.1, 2.0)}),
    "sampled, B = 1": Loss(sampled(1)),
    "sampled, B = 5": Loss(sampled(5)),
    "{1, 5} softplus, cosine": Loss(softplus, EPSILON | SCALE, cosine=True),
    "LDAM": Loss(
        lambda s, count: LDAMLoss(count, s["max_m"], s["s"]), {"max_m": (0.05, 0.8), "s": (10.0, 60.0)}, cosine=True
    ),
    IMBALANCED: Loss(imbalanced, {"epsilon": (0.003, 0.1), "max_m": (0.02, 0.5)}, cosine=True),
    "logit-adjusted": Loss(adjusted, TAU),
    "logit-adjusted, cosine": Loss(adjusted, TAU | SCALE, cosine=True),
    "sampled, B = 5, offset": Loss(sampled(5), TAU),
    "sampled, B = 16, offset": Loss(sampled(16), TAU),
    "{1, 5} softplus, offset": Loss(softplus, EPSILON | TAU),
    "{1, 5} softplus, cosine, offset": Loss(softplus, EPSILON | SCALE | TAU, cosine=True),
}
BALANCED_DATA = [name for name, loss in LOSSES.items() if "tau" not in loss.space]  # where all classes are alike
