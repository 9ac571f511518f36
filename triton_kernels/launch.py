"""The ops on Triton kernels: results, workspace, launches. Arguments are those of the schemas in topk_fast/ops.py.

All launches go to the current stream of the scores' device and wait for nothing.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from . import layout
from .collect import collect_kernel
from .gradient import gradient_kernel
from .layout import INTERPRETED, Wanted, layout_of
from .search import search_kernel

# One rounding an operation, as the noise contract asks; a wrong label stops the device, as in torch's own losses.
EXACT = {"enable_fp_fusion": False, "debug": True, "sanitize_overflow": False}
_HERE = nullcontext()
_COMPILED: dict = {}  # by what they are compiled for; Triton's own look-up takes longer than all else in a launch


def options(warps: int) -> dict:
    """How to compile for ``warps`` warps of 32: a search for 16 warps a multiprocessor, at the price of a few spills,
    and the gradient for 20, without any. AMD gets one wave of 64, whose own accesses keep their order.
    """
    registers = 128 if warps == 1 else 96
    return EXACT | ({"num_warps": 1} if layout.HIP else {"num_warps": warps, "maxnreg": registers})


def launch(kernel, programs: int, tensors: tuple, numbers: tuple, constants: tuple, warps: int) -> None:
    """Launches a kernel, which numbers do not recompile: dtypes, absent tensors, the first one's alignment do.

    HIP compiles for the sizes of tensors too.
    """
    first, grid = tensors[0], (programs, 1, 1)
    dtypes = [None if x is None else x.dtype for x in tensors]
    key = (kernel, first.device, first.data_ptr() % 16 == 0, *dtypes, *constants)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[grid](*tensors, *numbers, *constants)
        return
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Triton compiles a kernel in its first call, which no CUDA graph can capture: make the call once before "
            "the capture"
        )
    compiled = kernel[grid](*tensors, *numbers, *constants, **options(warps))
    if compiled is not None and not layout.HIP:  # the interpreter compiles nothing
        _COMPILED[key] = compiled


def on_device(device: torch.device):
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


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
    itemsize, offset, adjacent = scores.element_size(), 0, class_stride == 1
    if misplaced := scores.data_ptr() % 16 // itemsize:  # vectors of 16 bytes begin in front of the first score
        if misplaced <= scores.storage_offset():
            offset = misplaced
            scores = scores.as_strided((1,), (1,), scores.storage_offset() - offset)
        else:  # the storage itself lies like that
            adjacent = False
    how = layout_of((n_rows, n_classes), itemsize, adjacent, wanted, layout.processors(device))
    parts, _, slot = how.lists
    workspace = torch.empty(how.programs * slot, dtype=torch.int64, device=device)
    target = None if target is None else target.contiguous()
    row = (offset, row_stride, class_stride, n_classes)
    first_row = (place[0] + 2**31) % 2**32 - 2**31
    with on_device(device):
        if parts > 1:
            numbers = (*row, *how.plan[:3], *how.lists)
            launch(collect_kernel, n_rows * parts, (scores, workspace), numbers, (how.collecting,), warps=1)
        launch(
            search_kernel,
            how.programs,
            (scores, seed, schedule, target, workspace, values, classes),
            (
                *(*row, *how.plan, *how.lists, n_rows, first_row, place[1], n_sample, epsilon, k, ignore_index),
                *(n_ranks, *how.ranks, int(wanted.exclude_target)),
            ),
            (how.shape,),
            warps=1,
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
    numbers = (n_rows, n_sample, n_ranks, ignore_index, first_class, n_classes)
    with on_device(out.device):
        tensors = (out, grad.contiguous(), classes.contiguous(), target)
        launch(gradient_kernel, -(-out.numel() // block), tensors, numbers, (block,), warps=4)
    return out
