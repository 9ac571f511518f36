"""The form of the labelled data sets and of the tasks made from them; the cache of all data sets."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Dataset:
    """Labelled rows over distinct inputs: many rows may share one input, under one class or several."""

    classes: np.ndarray  # [C] str
    inputs: np.ndarray  # [D, F] uint8: counts or pixels of the distinct inputs
    group: np.ndarray  # [N] int64: the input of each row
    target: np.ndarray  # [N] int64: the class of each row

    def features(self, numbers: np.ndarray | slice = slice(None)) -> Tensor:
        """Square roots of the inputs with the given numbers, each scaled to length sqrt(F): [D, F] float32."""
        x = torch.from_numpy(self.inputs[numbers]).float().sqrt_()
        return torch.nn.functional.normalize(x).mul_(x.shape[1] ** 0.5)

    def ambiguous_share(self) -> float:
        """The share of rows whose input also occurs in another class; one guess cannot be right for all of these."""
        pairs = np.unique(np.stack([self.group, self.target]), axis=1)
        classes_of_input = np.bincount(pairs[0], minlength=len(self.inputs))
        return float((classes_of_input[self.group] > 1).mean())


@dataclass(frozen=True)
class Task:
    """Inputs [D, ...], and (input, class) of each row of the three parts; rows may share an input."""

    name: str
    classes: int
    inputs: Tensor
    parts: dict[str, tuple[Tensor, Tensor]]
    names: tuple[str, ...] = ()  # of the classes, where the data have names

    def count(self) -> Tensor:
        """Training rows of each class, [C]."""
        return self.parts["train"][1].bincount(minlength=self.classes)


def cached(path: Path, build: Callable[[], Kind], kind: type[Kind] = Dataset) -> Kind:
    """The dataclass of arrays stored at `path`, which is built and stored there first if necessary."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp.npz")  # an interrupted run leaves no half-written cache behind
        np.savez_compressed(partial, **vars(build()))
        partial.replace(path)
    with np.load(path, allow_pickle=False) as stored:
        return kind(*(stored[field.name] for field in fields(kind)))


def shuffle_within_classes(target: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all rows, sorted by class and in random order within each, and the place of each in its class."""
    order = np.random.default_rng(seed).permutation(len(target))
    order = order[np.argsort(target[order], kind="stable")]
    count = np.bincount(target)
    return order, np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
