"""The study's four data sets: long-tailed species; and glyphs, balanced, with wrong labels, and long-tailed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.data_sets import glyphs, species
from examples.data_sets.dataset import shuffle_within_classes

NAMES = ("species", "glyphs", "noisy glyphs", "long-tailed glyphs")
SEED = 0  # of splits, distortions and wrong labels: the same for all losses
COMPONENTS = 256  # of the species' k-mer counts
DRAWINGS = {"test": 2, "val": 2, "train": 4}  # of each character; fonts may share one, so they are told apart by pixels
VARIANTS = 8  # distorted images of each drawing, in training
KEPT = 2  # of them, where the classes are balanced
GROUP = 5  # classes with neighbouring code points that a wrong label may come from
WRONG = 0.5  # share of labels that are redrawn from their group


@dataclass(frozen=True)
class Data:
    """Inputs [D, ...], and (input, class) of each row of the three parts; rows may share an input."""

    name: str
    classes: int
    inputs: Tensor
    parts: dict[str, tuple[Tensor, Tensor]]

    def count(self) -> Tensor:
        """Training rows of each class, [C]."""
        return self.parts["train"][1].bincount(minlength=self.classes)


def load(name: str, cache: Path) -> Data:
    """The data set called `name`; its sources are downloaded or rendered into `cache` at first use."""
    if name not in NAMES:
        raise ValueError(f"data must be one of {NAMES}, got {name!r}")
    return _species(cache) if name == "species" else _glyphs(name, cache)


def _species(cache: Path) -> Data:
    """Principal components of the square roots of the 6-mer counts, found on the training inputs.

    Distinct inputs are shared out over the parts, so that no test input is seen in training; a class without a training
    row is left out.
    """
    data = species.load(cache)
    place = np.random.default_rng(SEED).permutation(len(data.inputs)) % 4
    part_of = np.array(["test", "val", "train", "train"])[place][data.group]  # [N], of each row
    known = np.unique(data.target[part_of == "train"])
    target = np.searchsorted(known, data.target).clip(max=len(known) - 1)
    usable = known[target] == data.target
    parts = {}
    for part in DRAWINGS:
        rows = np.flatnonzero((part_of == part) & usable)
        parts[part] = torch.from_numpy(data.group[rows]), torch.from_numpy(target[rows])
    path = cache / "study_species.pt"
    if not path.exists():
        x = data.features()
        seen = x[parts["train"][0].unique()]
        mean = seen.mean(0)
        torch.manual_seed(SEED)
        directions = torch.pca_lowrank(seen - mean, COMPONENTS, center=False, niter=4)[2]  # [F, COMPONENTS]
        z = (x - mean) @ directions
        torch.save(z / z.std(), path)
    return Data("species", len(known), torch.load(path), parts)


def _glyphs(name: str, cache: Path) -> Data:
    data = glyphs.load(cache)
    # One row of each (class, drawing), classes with enough of them, shuffled within a class.
    label, group = np.unique(np.stack([data.target, data.group]), axis=1)
    order, rank = shuffle_within_classes(label, SEED)
    count, width = np.bincount(label), sum(DRAWINGS.values())
    rows = order[(rank < width) & np.repeat(count >= width, count)].reshape(-1, width)  # [C, drawings]
    classes = len(rows)
    images = torch.from_numpy(data.inputs[group[rows]]).float().div_(255)
    images = images.view(classes, width, 1, glyphs.SIZE, glyphs.SIZE)
    inputs, parts, start, first = [], {}, 0, 0
    for part, many in DRAWINGS.items():
        chosen, copies = images[:, first : first + many].flatten(0, 1), VARIANTS if part == "train" else 1
        made = torch.cat([distort(chosen, first * VARIANTS + copy) for copy in range(copies)])
        target = torch.arange(classes).repeat_interleave(many).repeat(copies)
        keep = _kept(name, target, classes) if part == "train" else torch.arange(len(target))
        inputs.append(made[keep])
        parts[part] = (torch.arange(start, start + len(keep)), target[keep])
        start, first = start + len(keep), first + many
    if name == "noisy glyphs":  # the test's labels are right
        for seed, part in enumerate(("train", "val"), SEED):
            parts[part] = parts[part][0], wrong_labels(parts[part][1], classes, seed)
    return Data(name, classes, torch.cat(inputs), parts)


def _kept(name: str, target: Tensor, classes: int) -> Tensor:
    """The training images that are used: KEPT variants of each drawing, or n_j of class j, from all down to one."""
    if name != "long-tailed glyphs":
        return torch.arange(classes * DRAWINGS["train"] * KEPT)
    most = DRAWINGS["train"] * VARIANTS
    generator = torch.Generator().manual_seed(SEED)
    place = torch.randperm(classes, generator=generator)  # of each class in the order of frequencies
    count = (most ** (1 - place / (classes - 1))).round().long()
    shuffled = torch.randperm(len(target), generator=generator)
    shuffled = shuffled[target[shuffled].argsort(stable=True)]
    rank = torch.arange(len(target)) - target[shuffled] * most
    return shuffled[rank < count[target[shuffled]]].sort().values


def wrong_labels(label: Tensor, classes: int, seed: int) -> Tensor:
    """Labels of which each is redrawn, with probability WRONG, from its group of GROUP classes.

    The last group may be smaller.
    """
    generator = torch.Generator().manual_seed(seed)
    first = label // GROUP * GROUP
    size = (classes - first).clamp(max=GROUP)
    drawn = first + (torch.rand(label.shape, generator=generator) * size).long()
    return torch.where(torch.rand(label.shape, generator=generator) < WRONG, drawn, label)


def distort(images: Tensor, seed: int) -> Tensor:
    """Images [M, 1, S, S], each turned by up to 8 degrees, scaled by up to a tenth and moved by up to 2 pixels."""
    generator = torch.Generator().manual_seed(seed)
    turn, scale, right, down = (2 * torch.rand(4, len(images), generator=generator) - 1).unbind()
    angle, scale, pixel = turn * (8 * torch.pi / 180), 1 + 0.1 * scale, 2 / images.shape[-1]
    top = torch.stack([scale * angle.cos(), -scale * angle.sin(), 2 * pixel * right], 1)
    bottom = torch.stack([scale * angle.sin(), scale * angle.cos(), 2 * pixel * down], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
