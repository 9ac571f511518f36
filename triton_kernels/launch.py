"""The ops on Triton kernels: block shapes, workspace, launches. Arguments are those of the schemas in topk_fast/ops.py.

All launches go to the current stream of the scores' device and wait for nothing.
"""

import os
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import noise
from .contenders import Scores, collect_kernel
from .gradient import Gradient, gradient_kernel
from .search import Tensors, search_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# One rounding an operation, as the noise contract asks; a wrong label stops the device, as in torch's own losses.
EXACT = {"enable_fp_fusion": False, "debug": True, "sanitize_overflow": False}
HIP = torch.version.hip is not None


class Layout(NamedTuple):
    """How a row is read and where its lists lie: constants that its collection is compiled for."""

    PARTS: int  # programs that collect a row
    GROUP: int  # classes of a group of the plan
    GROUPS: int  # places for the groups that the plan looks at
    BLOCK: int  # places of a row in flight
    WIDTH: int  # places in 16 bytes
    CAPACITY: int  # contenders that a part's list holds
    SLOT: int  # int64 words of a row's lists and survivors in the workspace


class Shape(NamedTuple):
    """Constants that the search of a row is compiled for."""

    LAYOUT: Layout
    LAW: int
    PLANNED: bool  # there is a cut
    CANDIDATES: bool  # all k best are wanted
    EXCLUDE_TARGET: bool
    M: int  # ranks that are wanted
    RANKS: int  # places for them
    N: int  # samples side by side
    KEPT: int  # places of a Best
    TILE: int = 32  # contenders whose words are drawn at a time
    HELD: int = 64  # survivors of a sample that wait for their draws: at least TILE, at most 255
    CHUNK: int = 16  # of them taken at a time
    ARRIVALS: int = 16  # arrivals of a sample looked at at a time


class Wanted(NamedTuple):
    """The arguments of an op that searches."""

    seed: Tensor
    ranks: list[int]
    epsilon: float
    schedule: Tensor | None
    n_sample: int
    law: int
    dense: bool
    target: Tensor | None = None
    ignore_index: int = 0
    exclude_target: bool = False
    first_row: int = 0
    first_class: int = 0
    candidates: bool = False

    @property
    def k(self) -> int:
        """The length of the lists."""
        return max(self.ranks)


def warps(n: int) -> dict:
    """Options for ``n`` warps of 32 and 16 warps a multiprocessor, at the price of a few spills.

    AMD gets one wave of 64: there Triton's barrier orders shared memory only, and global memory keeps its order only
    for a wave's own accesses.
    """
    return {"num_warps": 1} if HIP else {"num_warps": n, "maxnreg": 128}


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; an interpreted kernel runs on one."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def on_device(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def as_loaded(x: Tensor) -> Tensor:
    """bfloat16 as the int16 that kernels widen and round themselves."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    """Raises where a tensor lies on another device than the kernels that read it."""
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise RuntimeError(
                f"{name} must be on {device}, as the tensors that it goes with, got {name} on {x.device}"
            )


def row_parts(n_rows: int, n_classes: int, block: int, n_processors: int) -> int:
    """The number of programs that collect a row: more than one where rows are few and long."""
    parts = 1
    while parts < 16 and n_rows * parts < 8 * n_processors and n_classes >= 16 * parts * block:
        parts *= 2
    return parts


def shape_of(scores: Tensor, wanted: Wanted, plan: tuple | None) -> Shape:
    """Block shapes by (N, L, dtype, k, n_sample): the one table of them."""
    n_rows, n_classes = scores.shape
    width = 16 // scores.element_size()
    block = min(512 * width, max(64 * width, triton.next_power_of_2(n_classes)))  # up to 8 KiB of a row in flight
    kept = max(8, triton.next_power_of_2(wanted.k))
    layout = Layout(1, 1, 1, block, width, 1, 0)
    if plan:
        group, stride, _ = plan
        layout = layout._replace(
            PARTS=row_parts(n_rows, n_classes, block, processors(scores.device)),
            GROUP=group,
            GROUPS=triton.next_power_of_2(triton.cdiv(triton.cdiv(n_classes, group), stride)),
            CAPACITY=triton.next_power_of_2(4 * noise.wanted_contenders(n_classes, wanted.k, wanted.law)),
        )
    n_ranks = len(wanted.ranks)
    shape = Shape(
        layout,
        wanted.law,
        plan is not None,
        wanted.candidates,
        wanted.exclude_target,
        n_ranks,
        triton.next_power_of_2(n_ranks),
        8 if wanted.n_sample <= 8 or kept > 128 else 16,
        kept,
    )
    slot = layout.PARTS * (2 + layout.CAPACITY + block // width) + shape.HELD * shape.N
    return shape._replace(LAYOUT=layout._replace(SLOT=slot))


def search(scores: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """The k best values and classes [N, B, k], or the excesses [N, M] and the classes at the ranks [N, B, M]."""
    check_devices(scores.device, seed=wanted.seed, schedule=wanted.schedule, target=wanted.target)
    (n_rows, n_classes), k, n_sample, target = scores.shape, wanted.k, wanted.n_sample, wanted.target
    if INTERPRETED and target is not None and not target.is_cuda:
        if ((target != wanted.ignore_index) & ((target < 0) | (target >= n_classes))).any():
            raise RuntimeError("target out of bounds")
    shape = (n_rows, n_sample, k if wanted.candidates else len(wanted.ranks))
    classes = torch.empty(shape, dtype=torch.int64, device=scores.device)
    values = torch.empty(shape if wanted.candidates else shape[::2], dtype=torch.float32, device=scores.device)
    if n_rows == 0:
        return values, classes
    plan = None if wanted.dense else noise.plan(n_classes, k, wanted.law)
    _, stride, rank = plan or (1, 1, 1)
    compiled = shape_of(scores, wanted, plan)
    parts = compiled.LAYOUT.PARTS
    programs = n_rows if parts > 1 else min(n_rows, 32 * processors(scores.device))
    workspace = torch.empty((programs, compiled.LAYOUT.SLOT), dtype=torch.int64, device=scores.device)
    target = None if target is None else target.contiguous()
    strided = Scores(as_loaded(scores), *scores.stride(), n_classes)
    # Where k is the only rank, the kernel gets no ranks: a list stays unordered, and a new K does not recompile.
    ranks = () if wanted.candidates or len(wanted.ranks) == 1 and not wanted.exclude_target else tuple(wanted.ranks)
    with on_device(scores.device):
        if parts > 1:
            collect_kernel[(n_rows * parts,)](strided, workspace, stride, rank, compiled.LAYOUT, **warps(2), **EXACT)
        search_kernel[(programs,)](
            strided,
            Tensors(wanted.seed, wanted.schedule, target, workspace, values, classes),
            ranks,
            n_rows,
            wanted.first_row,
            wanted.first_class,
            n_sample,
            wanted.epsilon,
            k,
            wanted.ignore_index,
            stride,
            rank,
            noise.wanted_contenders(n_classes, k, wanted.law),
            compiled,
            **warps(2),
            **EXACT,
        )
    return values, classes


def candidates(scores: Tensor, *args) -> tuple[Tensor, Tensor]:
    """The op of this name: ``args`` are seed, ranks, epsilon, ..., dense, first_row, first_class."""
    *args, first_row, first_class = args
    wanted = Wanted(*args, first_row=first_row, first_class=first_class, candidates=True)
    return search(scores, wanted._replace(ranks=[wanted.k]))


def excess(scores: Tensor, *args) -> tuple[Tensor, Tensor]:
    """The op of this name: ``args`` are seed, ranks, epsilon, ..., dense, target, ignore_index, exclude_target."""
    return search(scores, Wanted(*args))


def gradient(
    grad: Tensor,
    classes: Tensor,
    target: Tensor | None,
    ignore_index: int,
    first_class: int,
    n_classes: int,
    dtype: torch.dtype,
) -> Tensor:
    """The op of this name: the gradient of the scores [N, L], or its columns from ``first_class`` on."""
    check_devices(grad.device, classes=classes, target=target)
    n_rows, n_sample, n_ranks = classes.shape
    out = torch.empty((n_rows, n_classes), dtype=dtype, device=classes.device)
    if out.numel() == 0:
        return out
    target = None if target is None else target.contiguous()
    tensors = Gradient(grad.contiguous(), classes.contiguous(), target, as_loaded(out))
    block = (8192 if n_classes >= 4096 else 4096) // out.element_size()
    step = min(32, triton.next_power_of_2(n_sample * n_ranks + 1))
    with on_device(out.device):
        gradient_kernel[(triton.cdiv(out.numel(), block),)](
            tensors, n_rows, n_sample, n_ranks, ignore_index, first_class, n_classes, block, step, **warps(4), **EXACT
        )
    return out
