"""Block shapes, the workspace, and other numbers of a launch, by (N, L, dtype, k, n_sample): the one table of them."""

import math
import os
from functools import lru_cache
from typing import NamedTuple

import torch

from . import noise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HIP = torch.version.hip is not None
RESIDENT = 16  # programs of a search that run on a multiprocessor at a time, by its registers
MOST_PARTS = 16  # programs that collect a row


class Shape(NamedTuple):
    """Constants that a search is compiled for."""

    LAW: int
    CANDIDATES: bool  # all k best are wanted
    RANKS: int  # places for the ranks, 0 where k is the only one
    ADJACENT: bool  # classes are adjacent in memory
    WIDTH: int  # scores in 16 bytes
    N: int  # samples side by side
    KEPT: int  # places of a Best
    TILE: int  # contenders whose words are drawn at a time
    HELD: int  # survivors of a sample that wait for their draws: more than TILE, at most 255; at least 512 in all
    ABREAST: int  # survivors or arrivals of a sample that are looked at at a time
    LANES: int  # of a program
    VECTORS: int = 8  # of a lane, which are in flight as a row is collected
    MOST_PARTS: int = MOST_PARTS
    HEADER: int = MOST_PARTS + 2  # int64 words in front of the lists


class Layout(NamedTuple):
    """How the rows of a search are shared out and where their lists lie."""

    shape: Shape
    collecting: Shape  # what of it matters to the collection of split rows
    lists: tuple[int, int, int]  # programs that collect a row, contenders a list, int64 words of a program's lists
    plan: tuple[int, int, int, int]  # group, stride, rank, wanted
    programs: int
    ranks: tuple[int, ...]  # four words with a byte a rank, less 1


class Wanted(NamedTuple):
    """What decides a layout beside the scores."""

    ranks: tuple[int, ...]
    n_sample: int
    law: int
    dense: bool
    exclude_target: bool
    candidates: bool


def power_of_two(n: int) -> int:
    """The least power of two from n on."""
    return 1 << (n - 1).bit_length()


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; an interpreted kernel runs on one."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def row_parts(n_rows: int, n_classes: int, block: int, n_processors: int) -> int:
    """The number of programs that collect a row: more than one where rows are few and long."""
    parts = 1
    while parts < MOST_PARTS and n_rows * parts < RESIDENT // 2 * n_processors and n_classes >= 32 * parts * block:
        parts *= 2
    return parts


def samples_abreast(kept: int, n_sample: int) -> tuple[int, int]:
    """Samples side by side, and contenders in a tile: some 512 draws, and lists that fit into registers."""
    if kept > 32:
        return 4, 128
    if kept > 8:
        return 8, 64
    return (16 if n_sample > 8 else 8), 32


@lru_cache(maxsize=1024)
def layout_of(size: tuple[int, int], itemsize: int, adjacent: bool, wanted: Wanted, n_processors: int) -> Layout:
    """The layout of a search of scores [N, L]."""
    n_rows, n_classes = size
    k = max(wanted.ranks)
    kept = max(8, power_of_two(k))
    several = len(wanted.ranks) > 1 or wanted.exclude_target
    samples, tile = samples_abreast(kept, wanted.n_sample)
    shape = Shape(
        wanted.law,
        wanted.candidates,
        power_of_two(len(wanted.ranks)) if several and not wanted.candidates else 0,
        adjacent,
        16 // itemsize,
        samples,
        kept,
        tile,
        tile + 32,
        128 // samples,
        64 if HIP else 32,
    )
    plan = None if wanted.dense else noise.plan(n_classes, k, wanted.law)
    about = noise.wanted_contenders(n_classes, k, wanted.law)
    parts = 1
    if plan:
        parts = row_parts(n_rows, n_classes, shape.VECTORS * shape.LANES * shape.WIDTH, n_processors)
    capacity = tile * math.ceil((7 * about / (4 * parts) + (8 * shape.WIDTH if parts > 1 else 0)) / tile)
    packed = [sum((rank - 1) << (8 * m) for m, rank in enumerate(wanted.ranks[i : i + 8])) for i in range(0, 32, 8)]
    return Layout(
        shape,
        shape._replace(LAW=0, CANDIDATES=False, RANKS=0, N=0, KEPT=0, HELD=0, ABREAST=0),
        (parts, capacity, shape.HEADER + tile + parts * capacity + shape.HELD * samples),
        (*(plan or (1, 1, 0)), about),
        n_rows if parts > 1 else min(n_rows, RESIDENT * n_processors),
        tuple(packed),
    )
