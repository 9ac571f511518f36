"""The form of the labelled data sets and the split of their rows; the cache of all data sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

Kind = TypeVar("Kind", bound="Stored")


class Stored:
    """A dataclass of arrays, lists and strings that is kept in an .npz file; `load` of the dataclass reads it."""

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp.npz")  # an interrupted run leaves no half-written cache behind
        np.savez_compressed(partial, **{f.name: np.asarray(getattr(self, f.name)) for f in fields(self)})
        partial.replace(path)


@dataclass(frozen=True)
class Dataset(Stored):
    """Labelled rows over distinct inputs: many rows may share one input, under one class or several."""

    name: str
    classes: list[str]  # [C]
    inputs: np.ndarray  # [D, F] uint8: counts or pixels of the distinct inputs
    group: np.ndarray  # [N] int64: the input of each row
    target: np.ndarray  # [N] int64: the class of each row

    def features(self, numbers: np.ndarray | slice = slice(None)) -> torch.Tensor:
        """Square roots of the inputs with the given numbers, each scaled to length sqrt(F): [D, F] float32."""
        x = torch.from_numpy(self.inputs[numbers]).float().sqrt_()
        return torch.nn.functional.normalize(x).mul_(x.shape[1] ** 0.5)

    def ambiguous_share(self) -> float:
        """The share of rows whose input also occurs in another class; one guess cannot be right for all of these."""
        pairs = np.unique(np.stack([self.group, self.target]), axis=1)
        classes_of_input = np.bincount(pairs[0], minlength=len(self.inputs))
        return float((classes_of_input[self.group] > 1).mean())

    @classmethod
    def load(cls, path: Path) -> Dataset:
        with np.load(path, allow_pickle=False) as z:
            return cls(str(z["name"]), z["classes"].tolist(), z["inputs"], z["group"], z["target"])


def cached(path: Path, build: Callable[[], Kind], kind: type[Kind] = Dataset) -> Kind:
    """The data set stored at `path`, which is built and stored there first if necessary."""
    if not path.exists():
        build().save(path)
    return kind.load(path)


def shuffle_within_classes(target: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all rows, sorted by class and in random order within each, and the place of each in its class."""
    order = np.random.default_rng(seed).permutation(len(target))
    order = order[np.argsort(target[order], kind="stable")]
    count = np.bincount(target)
    return order, np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
