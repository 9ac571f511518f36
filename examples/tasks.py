"""The classification tasks of the study: pretrained features, kanji, species, and glyphs in three forms."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.data_sets import glyphs, kanji, species
from examples.data_sets.dataset import Dataset, Task, shuffle_within_classes
from examples.networks import FEATURES, convolutions
from examples.training import train_epochs

NAMES = ("features", "kanji", "species", "long-tailed glyphs", "noisy glyphs", "glyphs")
SEED = 0  # of splits, distortions and wrong labels: the same for all losses
COMPONENTS = 256  # of the species' k-mer counts
DRAWINGS = {"test": 2, "val": 2, "train": 4}  # of each character; fonts may share one, so they are told apart by pixels
VARIANTS = 8  # distorted images of each drawing, in training
KEPT = 2  # of them, where the classes are balanced
GROUP = 5  # classes with neighbouring code points that a wrong label may come from
WRONG = 0.5  # share of labels that are redrawn from their group


@lru_cache(maxsize=1)
def load(name: str, cache: Path) -> Task:
    """The data set called `name`; its sources are downloaded or rendered into `cache` at first use."""
    if name not in NAMES:
        raise ValueError(f"the task must be one of {NAMES}, got {name!r}")
    if name == "species":
        data = species.load(cache)
        return _split_by_input(name, data, lambda seen: _components(data, seen, cache), shares=4)
    if name == "kanji":
        data = kanji.load(cache)
        return _split_by_input(name, data, lambda seen: torch.from_numpy(data.inputs).int(), shares=5)
    return _features(cache) if name == "features" else _glyphs(name, cache)


def _split_by_input(name: str, data: Dataset, inputs_of: Callable[[Tensor], Tensor], shares: int) -> Task:
    """Gives one of `shares` parts of the distinct inputs to the test, one to validation, and the rest to training.

    No test input is seen in training; a class without a training row is left out. `inputs_of` the training inputs'
    numbers returns all inputs.
    """
    place = np.random.default_rng(SEED).permutation(len(data.inputs)) % shares
    part_of = np.array(["test", "val", *["train"] * (shares - 2)])[place][data.group]  # [N], of each row
    known = np.unique(data.target[part_of == "train"])
    target = np.searchsorted(known, data.target).clip(max=len(known) - 1)
    usable = known[target] == data.target
    parts = {}
    for part in DRAWINGS:
        rows = np.flatnonzero((part_of == part) & usable)
        parts[part] = torch.from_numpy(data.group[rows]), torch.from_numpy(target[rows])
    return Task(name, len(known), inputs_of(parts["train"][0].unique()), parts, tuple(data.classes[known].tolist()))


def _components(data: Dataset, seen: Tensor, cache: Path) -> Tensor:
    """Principal components of the square roots of the species' 6-mer counts, found on the training inputs."""
    path = cache / "study_species.pt"
    if not path.exists():
        x = data.features()
        mean = x[seen].mean(0)
        torch.manual_seed(SEED)
        directions = torch.pca_lowrank(x[seen] - mean, COMPONENTS, center=False, niter=4)[2]  # [F, COMPONENTS]
        z = (x - mean) @ directions
        torch.save(z / z.std(), path)
    return torch.load(path)


def _images(cache: Path, half: int) -> Tensor:
    """Drawings of every second character, from the `half`-th on: [C, drawings, 1, S, S].

    The characters are those that enough fonts draw differently, in the order of their code points.
    """
    data = glyphs.load(cache)
    label, group = np.unique(np.stack([data.target, data.group]), axis=1)
    order, rank = shuffle_within_classes(label, SEED)
    count, width = np.bincount(label), sum(DRAWINGS.values())
    rows = order[(rank < width) & np.repeat(count >= width, count)].reshape(-1, width)[half::2]
    images = torch.from_numpy(data.inputs[group[rows]]).float().div_(255)
    return images.view(len(rows), width, 1, glyphs.SIZE, glyphs.SIZE)


def _glyphs(name: str, cache: Path) -> Task:
    images = _images(cache, 0)
    classes, inputs, parts, start, first = len(images), [], {}, 0, 0
    for part, many in DRAWINGS.items():
        chosen, copies = images[:, first : first + many].flatten(0, 1), VARIANTS if part == "train" else 1
        made = torch.cat([distort(chosen, first * VARIANTS + copy) for copy in range(copies)])
        target = torch.arange(classes).repeat_interleave(many).repeat(copies)
        keep = _kept(name, target, classes) if part == "train" else torch.arange(len(target))
        inputs.append(made[keep])
        parts[part] = (torch.arange(start, start + len(keep)), target[keep])
        start, first = start + len(keep), first + many
    if name == "noisy glyphs":  # as in the paper, the labels of validation and test are right
        parts["train"] = parts["train"][0], wrong_labels(parts["train"][1], classes, SEED)
    return Task(name, classes, torch.cat(inputs), parts)


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


def _features(cache: Path) -> Task:
    """The long-tailed glyphs as a network sees them that cross-entropy has trained on the other characters."""
    path, data = cache / "study_features.pt", _glyphs("long-tailed glyphs", cache)
    if not path.exists():
        body = _pretrained(_images(cache, 1))
        with torch.no_grad():
            torch.save(torch.cat([body(part) for part in data.inputs.split(1024)]), path)
    return Task("features", data.classes, torch.load(path), data.parts)


def _pretrained(images: Tensor) -> nn.Module:
    """The convolutions of a network that was trained on all drawings of other characters, [C, drawings, 1, S, S]."""
    torch.manual_seed(SEED)
    classes, width = images.shape[:2]
    epochs, variants, batch = 4, 4, 256
    inputs = torch.cat([distort(images.flatten(0, 1), SEED + copy) for copy in range(variants)])
    target = torch.arange(classes).repeat_interleave(width).repeat(variants)
    body, head = convolutions(images.shape[-1]), nn.Linear(FEATURES, classes)
    network = nn.Sequential(body, head)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=0.05, eps=1e-4, fused=True)

    def loss_of(rows: Tensor) -> Tensor:
        return F.cross_entropy(network(inputs[rows]), target[rows])

    for _ in train_epochs(loss_of, len(inputs), batch, epochs, optimizer):
        pass
    return body.eval()
