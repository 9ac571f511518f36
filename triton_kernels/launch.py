"""The ops on Triton kernels: results, workspace, launches. Arguments are those of the schemas in topk_fast/ops.py.

All launches go to the current stream of the scores' device and wait for nothing.
"""

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from . import layout
from .collect import collect_kernel
from .gradient import gradient_kernel
from .layout import INTERPRETED, Wanted, layout_of
from .search import search_kernel

# One rounding an operation, as the noise contract asks; a wrong label stops the device, as in torch's own losses.
EXACT = {"enable_fp_fusion": False, "debug": True, "sanitize_overflow": False}


def warps(n: int) -> dict:
    """Options for ``n`` warps of 32 and 16 warps a multiprocessor, at the price of a few spills.

    AMD gets one wave of 64: there Triton's barrier orders shared memory only, and global memory keeps its order only
    for a wave's own accesses.
    """
    return {"num_warps": 1} if layout.HIP else {"num_warps": n, "maxnreg": 128}


def on_device(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    """Raises where a tensor lies on another device than the kernels that read it."""
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise RuntimeError(
                f"{name} must be on {device}, as the tensors that it goes with, got {name} on {x.device}"
            )


def search(scores: Tensor, seed: Tensor, epsilon: float, schedule, wanted: Wanted, labels=(None, 0), place=(0, 0)):
    """The k best values and classes [N, B, k], or the excesses [N, M] and the classes at the ranks [N, B, M]."""
    target, ignore_index = labels
    device, (n_rows, n_classes) = scores.device, scores.shape
    check_devices(device, seed=seed, schedule=schedule, target=target)
    if INTERPRETED and target is not None and not target.is_cuda:
        if ((target != ignore_index) & ((target < 0) | (target >= n_classes))).any():
            raise RuntimeError("target out of bounds")
    k, n_ranks, n_sample = max(wanted.ranks), len(wanted.ranks), wanted.n_sample
    shape = (n_rows, n_sample, k if wanted.candidates else n_ranks)
    classes = torch.empty(shape, dtype=torch.int64, device=device)
    values = torch.empty(shape if wanted.candidates else shape[::2], dtype=torch.float32, device=device)
    if n_rows == 0:
        return values, classes
    row_stride, class_stride = scores.stride()
    how = layout_of((n_rows, n_classes), scores.element_size(), class_stride == 1, wanted, layout.processors(device))
    workspace = torch.empty((how.programs, how.slot), dtype=torch.int64, device=device)
    target = None if target is None else target.contiguous()
    row = (0, row_stride, class_stride, n_classes)
    lists = (how.parts, how.capacity, how.slot)
    with on_device(device):
        if how.parts > 1:
            collect_kernel[(n_rows * how.parts,)](
                scores, workspace, *row, *how.plan[:3], *lists, how.shape, **warps(1), **EXACT
            )
        search_kernel[(how.programs,)](
            *(scores, seed, schedule, target, workspace, values, classes),
            *row,
            *how.plan,
            *lists,
            *(n_rows, (place[0] + 2**31) % 2**32 - 2**31, place[1], n_sample, epsilon, k, ignore_index),
            *(n_ranks, *how.ranks, int(wanted.exclude_target)),
            how.shape,
            **warps(1),
            **EXACT,
        )
    return values, classes


def candidates(scores: Tensor, seed, ranks, epsilon, schedule, n_sample, law, dense, first_row, first_class):
    """The op of this name."""
    wanted = Wanted((max(ranks),), n_sample, law, dense, False, True)
    return search(scores, seed, epsilon, schedule, wanted, place=(first_row, first_class))


def excess(
    scores: Tensor, seed, ranks, epsilon, schedule, n_sample, law, dense, target, ignore_index, exclude_target
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    wanted = Wanted(tuple(ranks), n_sample, law, dense, exclude_target, False)
    return search(scores, seed, epsilon, schedule, wanted, (target, ignore_index))


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
    block = 8192 // out.element_size()
    with on_device(out.device):
        gradient_kernel[(triton.cdiv(out.numel(), block),)](
            *(grad.contiguous(), classes.contiguous(), target, out),
            *(n_rows, n_sample, n_ranks, ignore_index, first_class, n_classes, block),
            **warps(4),
            **EXACT,
        )
    return out
