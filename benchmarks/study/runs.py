"""A run of the study: one model, trained with one loss and its settings, and measured."""

from __future__ import annotations

import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.losses import FocalLoss, LDAMLoss, LogitAdjustedCrossEntropy, SmoothTopKSVM
from benchmarks.study import BALANCED, IMBALANCED
from benchmarks.study.data import Data, load
from examples.evaluation import ranks
from examples.training import train_epochs
from topk_fast import BalNoisedTopK, ImbalNoisedTopK, NormedLinear

ON_COSINES = ("LDAM", IMBALANCED)  # their margins are differences of cosines
TOPS = (1, 5, 10, 20)
SHOTS = {"few": (1, 5), "medium": (5, 15), "many": (15, sys.maxsize)}  # training rows of a class, end excluded


def make_loss(name: str, s: dict, count: Tensor) -> nn.Module:
    """The loss called `name` with the settings `s`, for classes of `count` training rows."""
    rows = count.tolist()
    makers = {
        "cross-entropy": lambda: nn.CrossEntropyLoss(),
        "focal": lambda: FocalLoss(s["gamma"]),
        "LDAM": lambda: LDAMLoss(rows, s["max_m"], s["s"]),
        "logit-adjusted": lambda: LogitAdjustedCrossEntropy(rows, s["tau"]),
        "smooth top-K SVM": lambda: SmoothTopKSVM(s["k"], s["tau"]),
        BALANCED: lambda: BalNoisedTopK(s["k"], s["epsilon"], s["n_sample"]),
        IMBALANCED: lambda: ImbalNoisedTopK(s["k"], s["epsilon"], s["max_m"], rows, n_sample=s["n_sample"]),
    }
    return makers[name]()


def make_model(data: Data, loss: str) -> nn.Sequential:
    """One hidden layer for the species; three convolutions and a hidden layer for the glyphs.

    The head computes cosines where the loss's margins are cosines.
    """
    head = NormedLinear if loss in ON_COSINES else nn.Linear
    if data.name == "species":
        body = [nn.Linear(data.inputs.shape[1], 256), nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(*body, head(256, data.classes))
    body, channels = [], (1, 16, 32, 64)
    for before, after in zip(channels, channels[1:]):
        body += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    flat = channels[-1] * (-(-data.inputs.shape[-1] // 8)) ** 2
    body += [nn.Flatten(), nn.Linear(flat, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*body, head(128, data.classes))


@lru_cache(maxsize=1)
def data_set(name: str, cache: Path) -> Data:
    return load(name, cache)


def run(job: dict, cache: Path) -> dict:
    """Trains one model as `job` says and measures it, in stage "test" on the test rows, else on the validation rows."""
    data, s = data_set(job["data"], cache), job["settings"]
    torch.manual_seed(job["seed"])
    model, loss_of = make_model(data, job["loss"]), make_loss(job["loss"], s, data.count())
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"], fused=True)
    rows, target = data.parts["train"]

    def loss_of_rows(batch: Tensor) -> Tensor:
        return loss_of(model(data.inputs[rows[batch]]), target[batch])

    start = time.process_time()
    for _ in train_epochs(loss_of_rows, len(rows), job["batch"], job["epochs"], optimizer):
        pass
    seconds = (time.process_time() - start) / job["epochs"]
    part = data.parts["test" if job["stage"] == "test" else "val"]
    return job | measure(model.eval(), data, *part) | {"seconds an epoch": round(seconds, 3)}


@torch.no_grad()
def measure(model: nn.Module, data: Data, rows: Tensor, target: Tensor) -> dict:
    """Top-k over the rows and over the classes (macro), and top-5 for classes with few, medium and many shots."""
    rank = torch.cat([ranks(model(data.inputs[r]), t) for r, t in zip(rows.split(1024), target.split(1024))])
    shots, seen = data.count()[target], target.bincount(minlength=data.classes)
    share = {f"top-{k}": (rank < k).double() for k in TOPS}
    result = {name: hit.mean() for name, hit in share.items()}
    for name in ("top-1", "top-5"):
        hits = torch.zeros(data.classes, dtype=torch.double).index_add_(0, target, share[name])
        result[f"macro {name}"] = (hits[seen > 0] / seen[seen > 0]).mean()
    for name, (low, end) in SHOTS.items():
        inside = (shots >= low) & (shots < end)
        result[name] = share["top-5"][inside].mean() if inside.any() else None
    return {name: None if value is None else round(float(value), 5) for name, value in result.items()}
