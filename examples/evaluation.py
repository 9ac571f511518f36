"""Accuracies of scores, and the time of one loss step."""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

if TYPE_CHECKING:
    from tasks import Task

TOPS = (1, 5, 10, 20)
SHOTS = {"few": (1, 5), "medium": (5, 15), "many": (15, sys.maxsize)}  # training rows of a class, end excluded
FEW = (20, 10)  # a class is rare, few-shot, if it has fewer training rows than this
BINS = (1, 5, 10, 20, 50)  # the smallest number of training rows in each bin of the plot


def accuracies(scores: Tensor, target: Tensor, class_count: Tensor) -> dict[str, float | None]:
    """Top-1, 5 and 10 over rows, top-5 over classes (macro) and top-5 over the rows of rare classes.

    Args:
        scores: [N, C]. target: [N]. class_count: [C], the number of training rows of each class.

    Returns:
        One share in [0, 1] for each name; None where no row qualifies. Macro leaves out classes without a row.
    """
    everywhere = torch.ones_like(target, dtype=torch.bool)
    result = {f"top-{k}": _accuracy(scores, target, everywhere, k) for k in (1, 5, 10)}
    result["macro top-5"] = _accuracy(scores, target, everywhere, 5, "macro")
    for cut in FEW:
        result[f"top-5, <{cut} rows"] = _accuracy(scores, target, class_count[target] < cut, 5)
    return result


def _accuracy(scores: Tensor, target: Tensor, rows: Tensor, k: int, average: str = "micro") -> float | None:
    if not rows.any():
        return None
    metric = MulticlassAccuracy(scores.shape[1], top_k=min(k, scores.shape[1]), average=average)
    for part in rows.nonzero().flatten().split(128):  # the metric makes several [N, C] int64 arrays
        metric.update(scores[part], target[part])
    return round(float(metric.compute()), 5)


def look_up(group: Tensor, known_group: Tensor, known_target: Tensor, n_classes: int) -> Tensor:
    """Scores without learning: the number of known rows of the same input in each class, then the class's frequency.

    Args:
        group: [N], the inputs to score. known_group, known_target: the inputs and classes of the known rows.

    Returns:
        [N, C] float32.
    """
    used, position = group.unique(return_inverse=True)
    common = known_target.bincount(minlength=n_classes) / (2 * len(known_target))  # [C], below one row
    scores = common.repeat(len(used), 1)
    met = torch.isin(known_group, used)
    at = (torch.searchsorted(used, known_group[met]), known_target[met])
    return scores.index_put_(at, torch.ones(()), accumulate=True)[position]


@torch.no_grad()
def measure(model: nn.Module, task: Task, part: str) -> dict[str, float | None]:
    """Top-k over the rows and over the classes (macro), and top-5 for classes with few, medium and many training rows.

    A share that no row counts for is None.
    """
    rows, target = task.parts[part]
    rank = torch.cat([ranks(model(task.inputs[r]), t) for r, t in zip(rows.split(1024), target.split(1024))])
    shots, seen = task.count()[target], target.bincount(minlength=task.classes)
    share = {f"top-{k}": (rank < k).double() for k in TOPS}
    result = {name: hit.mean() for name, hit in share.items()}
    for name in ("top-1", "top-5"):
        hits = torch.zeros(task.classes, dtype=torch.double).index_add_(0, target, share[name])
        result[f"macro {name}"] = (hits[seen > 0] / seen[seen > 0]).mean()
    for name, (low, end) in SHOTS.items():
        inside = (shots >= low) & (shots < end)
        result[name] = share["top-5"][inside].mean() if inside.any() else None
    return {name: None if value is None else round(float(value), 5) for name, value in result.items()}


def ranks(scores: Tensor, target: Tensor) -> Tensor:
    """The number of other classes that do not score lower than the true class: [N], 0 if it comes first.

    Ties and NaN count against the true class.
    """
    return (~(scores < scores.gather(1, target[:, None]))).sum(1) - 1


def curve(rank: Tensor, longest: int = 20) -> list[float]:
    """Top-k accuracy for k = 1 to `longest`."""
    return [round(float((rank < k).float().mean()), 5) for k in range(1, longest + 1)]


def by_frequency(rank: Tensor, row_count: Tensor, k: int) -> list[dict]:
    """Top-k accuracy by `row_count` [N], the number of training rows of a row's class, in bins that are not empty."""
    result = []
    for low, end in zip(BINS, (*BINS[1:], None)):
        inside = (row_count >= low) & (row_count < (end or float("inf")))
        if inside.any():
            label = f"{low}-{end - 1}" if end else f"{low} or more"
            hits = round(float((rank[inside] < k).float().mean()), 5)
            result.append({"label": label, "rows": int(inside.sum()), "accuracy": hits})
    return result


def loss_step_ms(loss_of: nn.Module, scores: Tensor, target: Tensor, seconds: float = 0.5) -> float:
    """Median milliseconds of one forward and backward pass of the loss, without the network."""
    leaf = scores.detach().clone().requires_grad_()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 8 or time.perf_counter() < end:
        leaf.grad = None
        start = time.perf_counter()
        loss_of(leaf, target).backward()
        times.append(time.perf_counter() - start)
    return round(1e3 * median(times[3:]), 3)  # the first calls warm up
