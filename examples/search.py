"""The validation search that chose the demo's defaults: the same number of trials and epochs for every loss."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch
from torch import Tensor

from dataset import Split
from evaluation import accuracies
from training import BALANCED, CROSS_ENTROPY, IMBALANCED, LOSSES, Settings, fit, scores_of

CRITERION = "macro top-5"  # every class counts the same, as it is the rare ones that need more than one guess

# (low, high) of each setting, drawn log-uniformly from a scrambled Sobol sequence. The imbalanced loss's scale is no
# part of it: it multiplies every gradient, and AdamW's steps do not depend on that.
OPTIMISER = {"lr": (5e-4, 2e-2), "weight_decay": (1e-3, 1.0)}
SPACE = {
    CROSS_ENTROPY: OPTIMISER,
    BALANCED: OPTIMISER | {"epsilon": (0.2, 2.0)},
    IMBALANCED: OPTIMISER | {"epsilon": (0.005, 0.1), "max_m": (0.01, 0.3)},
}


def draw(space: dict[str, tuple[float, float]], trials: int, seed: int) -> list[dict[str, float]]:
    """`trials` points of a box of (low, high), log-uniform, from a scrambled Sobol sequence, rounded to two digits."""
    if not space:
        return [{} for _ in range(trials)]
    points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed).draw(trials).tolist()

    def place(key: str, u: float) -> float:
        low, high = space[key]
        return float(f"{low * (high / low) ** u:.2g}")

    return [{key: place(key, u) for key, u in zip(space, point)} for point in points]


def draw_settings(name: str, trials: int, seed: int) -> list[Settings]:
    """`trials` settings for the loss called `name`."""
    return [Settings(**point) for point in draw(SPACE[name], trials, seed)]


def search(
    inputs: Tensor, group: Tensor, target: Tensor, split: Split, n_classes: int, trials: int, epochs: int, seed: int
) -> list[dict]:
    """Train on the training rows, measure on the validation rows: one record a trial, the best of each loss first."""
    train, val = torch.from_numpy(split.train), torch.from_numpy(split.val)
    count = target[train].bincount(minlength=n_classes)
    records = []
    for name in LOSSES:
        found = []
        for settings in draw_settings(name, trials, seed):
            start = time.perf_counter()
            model = fit(name, settings, inputs, group[train], target[train], n_classes, epochs, seed)
            measured = accuracies(scores_of(model, inputs, group[val]), target[val], count)
            seconds = round(time.perf_counter() - start, 1)
            found.append({"loss": name, "settings": asdict(settings), "accuracy": measured, "seconds": seconds})
        records += sorted(found, key=lambda record: -record["accuracy"][CRITERION])
    return records
