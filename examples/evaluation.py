"""Accuracies of a model on the rows of a task."""

import sys

import torch
from torch import Tensor, nn

from examples.data_sets.dataset import Task

TOPS = (1, 5, 10, 20)
SHOTS = {"few": (1, 5), "medium": (5, 15), "many": (15, sys.maxsize)}  # training rows of a class, end excluded


def ranks(scores: Tensor, target: Tensor) -> Tensor:
    """The number of other classes that do not score lower than the true class: [N], 0 if it comes first.

    Ties and NaN count against the true class.
    """
    return (~(scores < scores.gather(1, target[:, None]))).sum(1) - 1


@torch.no_grad()
def ranks_of(model: nn.Module, task: Task, part: str) -> Tensor:
    """The ranks of the true classes of a part's rows."""
    rows, target = task.parts[part]
    return torch.cat([ranks(model(task.inputs[r]), t) for r, t in zip(rows.split(1024), target.split(1024))])


def measure(model: nn.Module, task: Task, part: str) -> dict[str, float | None]:
    """`summarize` of the ranks of the true classes of a part's rows."""
    return summarize(ranks_of(model, task, part), task, part)


def summarize(rank: Tensor, task: Task, part: str) -> dict[str, float | None]:
    """Top-k over the rows and over the classes (macro), and top-5 for classes with few, medium and many training rows.

    A share that no row counts for is None.
    """
    target = task.parts[part][1]
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


def curve(rank: Tensor, longest: int = 20) -> list[float]:
    """Top-k accuracy for k = 1 to `longest`."""
    return [round(float((rank < k).float().mean()), 5) for k in range(1, longest + 1)]
