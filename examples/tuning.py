"""The hyper-parameter search that chose the demo's settings, with as many trials and epochs for every loss."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch

from data_sets.dataset import Split
from evaluation import accuracies
from training import BALANCED, CROSS_ENTROPY, IMBALANCED, LOSSES, Rows, Settings, fit, scores_of
from trials import draw_points

CRITERION = "macro top-5"  # every class has the same weight, since the rare classes need more than one guess

# These are the bounds (low, high) of each setting, which is drawn log-uniformly. The scale of the imbalanced loss is
# not tuned: it multiplies every gradient, and AdamW's steps do not depend on such a factor.
OPTIMISER = {"lr": (5e-4, 2e-2), "weight_decay": (1e-3, 1.0)}
SPACE = {
    CROSS_ENTROPY: OPTIMISER,
    BALANCED: OPTIMISER | {"epsilon": (0.2, 2.0)},
    IMBALANCED: OPTIMISER | {"epsilon": (0.005, 0.1), "max_m": (0.01, 0.3)},
}


def draw_settings(name: str, trials: int, seed: int) -> list[Settings]:
    """`trials` settings for the loss called `name`."""
    return [Settings(**point) for point in draw_points(SPACE[name], trials, seed)]


def run_trials(rows: Rows, split: Split, trials: int, epochs: int, seed: int) -> list[dict]:
    """Trains on the training rows and measures on the validation rows.

    Returns:
        One record a trial, the best of each loss first.
    """
    train, val = (rows.take(torch.from_numpy(part)) for part in (split.train, split.val))
    records = []
    for name in LOSSES:
        found = []
        for settings in draw_settings(name, trials, seed):
            start = time.perf_counter()
            model = fit(name, settings, train, epochs, seed)
            measured = accuracies(scores_of(model, val), val.target, train.count())
            seconds = round(time.perf_counter() - start, 1)
            found.append({"loss": name, "settings": asdict(settings), "accuracy": measured, "seconds": seconds})
        records += sorted(found, key=lambda record: -record["accuracy"][CRITERION])
    return records
