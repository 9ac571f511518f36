"""The study's four data sets: long-tailed species; and glyphs, balanced, with wrong labels, and long-tailed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import glyphs
import species
from dataset import split_rows

NAMES = ("species", "glyphs", "noisy glyphs", "long-tailed glyphs")
SEED = 0  # of splits, distortions and wrong labels: the same for all losses
COMPONENTS = 256  # of the species' k-mer counts
FONTS = {"test": 3, "val": 2, "train": 7}  # of each glyph: no font of a class stands in two parts
VARIANTS = 4  # distorted images of each glyph in each training font
GROUP = 5  # classes with neighbouring code points that a wrong label may come from
WRONG = 0.5  # share of labels that are drawn anew from their group


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
    """The data set called `name`; what it is made from is fetched or rendered into `cache` at first use."""
    if name not in NAMES:
        raise ValueError(f"data must be one of {NAMES}, got {name!r}")
    return _species(cache) if name == "species" else _glyphs(name, cache)


def _species(cache: Path) -> Data:
    """Principal components of the square roots of the 6-mer counts, found on the training inputs."""
    data = species.load(cache)
    split, x = split_rows(data.target, SEED), data.features()
    group, target = torch.from_numpy(data.group), torch.from_numpy(data.target)
    path = cache / "study_species.pt"
    if not path.exists():
        seen = x[group[split.train].unique()]
        mean = seen.mean(0)
        torch.manual_seed(SEED)
        directions = torch.pca_lowrank(seen - mean, COMPONENTS, center=False, niter=4)[2]  # [F, COMPONENTS]
        z = (x - mean) @ directions
        torch.save(z / z.std(), path)
    parts = {name: (group[rows], target[rows]) for name in FONTS for rows in [getattr(split, name)]}
    return Data("species", len(data.classes), torch.load(path), parts)


def _glyphs(name: str, cache: Path) -> Data:
    data = glyphs.load(cache)
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(data.target))
    order = order[np.argsort(data.target[order], kind="stable")]  # shuffled within each class
    count = np.bincount(data.target)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    fonts = sum(FONTS.values())
    rows = order[(rank < fonts) & np.repeat(count >= fonts, count)].reshape(-1, fonts)  # [C, fonts]
    classes = len(rows)
    images = torch.from_numpy(data.inputs[data.group[rows]]).float().div_(255)  # [C, fonts, pixels]
    images = images.view(-1, 1, glyphs.SIZE, glyphs.SIZE)
    inputs, parts, start, first = [], {}, 0, 0
    for part, width in FONTS.items():
        chosen = images.view(classes, fonts, *images.shape[1:])[:, first : first + width].flatten(0, 1)
        copies = VARIANTS if part == "train" else 1
        made = torch.cat([distort(chosen, first * VARIANTS + copy) for copy in range(copies)])
        label = torch.arange(classes).repeat_interleave(width).repeat(copies)
        keep = _kept(name, label, classes) if part == "train" else torch.arange(len(label))
        inputs.append(made[keep])
        parts[part] = (torch.arange(start, start + len(keep)), label[keep])
        start, first = start + len(keep), first + width
    if name == "noisy glyphs":  # the test's labels are right
        parts |= {part: (parts[part][0], wrong_labels(parts[part][1], classes)) for part in ("train", "val")}
    return Data(name, classes, torch.cat(inputs), parts)


def _kept(name: str, label: Tensor, classes: int) -> Tensor:
    """Which training images are used: one variant of each font; or the n_j of a tail that falls from all to one."""
    fonts = FONTS["train"]
    if name != "long-tailed glyphs":
        return torch.arange(classes * fonts)
    most = fonts * VARIANTS
    generator = torch.Generator().manual_seed(SEED)
    place = torch.randperm(classes, generator=generator)  # of each class in the order of frequencies
    count = (most ** (1 - place / (classes - 1))).round().long()
    shuffled = torch.randperm(len(label), generator=generator)
    shuffled = shuffled[label[shuffled].argsort(stable=True)]
    rank = torch.arange(len(label)) - label[shuffled] * most
    return shuffled[rank < count[label[shuffled]]].sort().values


def wrong_labels(label: Tensor, classes: int) -> Tensor:
    """Each label drawn anew, with probability WRONG, from its group of GROUP classes (the last group may be smaller)."""
    generator = torch.Generator().manual_seed(SEED)
    first = label // GROUP * GROUP
    size = (classes - first).clamp(max=GROUP)
    drawn = first + (torch.rand(label.shape, generator=generator) * size).long()
    return torch.where(torch.rand(label.shape, generator=generator) < WRONG, drawn, label)


def distort(images: Tensor, seed: int) -> Tensor:
    """Each of [M, 1, S, S] turned by up to 8 degrees, scaled by up to a tenth and moved by up to 2 pixels."""
    generator = torch.Generator().manual_seed(seed)
    turn, scale, right, down = (2 * torch.rand(4, len(images), generator=generator) - 1).unbind()
    angle, scale, pixel = turn * (8 * torch.pi / 180), 1 + 0.1 * scale, 2 / images.shape[-1]
    top = torch.stack([scale * angle.cos(), -scale * angle.sin(), 2 * pixel * right], 1)
    bottom = torch.stack([scale * angle.sin(), scale * angle.cos(), 2 * pixel * down], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
