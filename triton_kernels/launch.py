"""The ops on Triton kernels: block shapes, workspace, launches. Arguments are those of the schemas in topk_fast/ops.py.

All launches go to the current stream of the scores' device and wait for nothing.
"""

import os
from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor

from . import noise, search
from .contenders import collect_kernel
from .gradient import gradient_kernel
from .search import search_kernel

CANDIDATES, SMOOTHED, LOSS = search.CANDIDATES.value, search.SMOOTHED.value, search.LOSS.value
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# One rounding an operation, as the noise contract asks; a wrong label stops the device, as in torch's own losses.
EXACT = {"enable_fp_fusion": False, "debug": True, "sanitize_overflow": False}
HIP = torch.version.hip is not None
if os.environ.get("TOPK_FAST_AUTOTUNE") == "1" and not (HIP or INTERPRETED):
    # Warps and registers by trial at the first call of each shape, in place of `settings`; the bits stay the same.
    search_kernel = triton.autotune(
        [triton.Config({}, num_warps=n, maxnreg=r) for n, r in ((1, 168), (2, 96), (2, 128), (2, 168), (4, 128))],
        key=["n_rows", "n_classes", "k", "n_sample", "MODE", "PLANNED"],
    )(search_kernel)


def warps(n: int) -> dict:
    """Options for ``n`` warps of 32 and 16 warps a multiprocessor, at the price of a few spills.

    One wave of 64 on AMD: Triton's barrier orders shared memory alone there, and only a wave's own accesses to global
    memory keep their order.
    """
    return {"num_warps": 1} if HIP else {"num_warps": n, "maxnreg": 128}


def settings(n_classes: int, itemsize: int, k: int, n_sample: int) -> dict:
    """Block shapes and warps of the search by (L, dtype, k, n_sample): the one table of them."""
    width = 16 // itemsize  # places in 16 bytes
    kept = max(8, triton.next_power_of_2(k))
    return {
        "N": 8 if n_sample <= 8 or kept > 128 else 16,  # samples side by side
        "KEPT": kept,  # places of a bag
        "WIDTH": width,
        "BLOCK": min(512 * width, max(64 * width, triton.next_power_of_2(n_classes))),  # up to 8 KiB of a row in flight
        "TILE": 32,  # contenders whose words are drawn at a time; at most 255
        "HELD": 64,  # words of a sample that wait for their normals; at least TILE
        "CHUNK": 16,  # of them taken at a time
        "ARRIVALS": 16,  # arrivals of a sample looked at at a time
    } | warps(2)


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


def _search(
    mode, scores, target, margins, seed, k, epsilon, n_sample, scale, ignore_index, first_row, first_class, dense
):
    """What ``mode`` makes of the scores: values [N, B, k] or results [N], classes, and the number of valid rows."""
    n_rows, n_classes = scores.shape
    shape = (n_rows, n_sample, k) if mode == CANDIDATES else (n_rows, n_sample)
    values = torch.empty(shape if mode == CANDIDATES else (n_rows,), dtype=torch.float32, device=scores.device)
    classes = torch.empty(shape, dtype=torch.int64, device=scores.device)
    n_valid = torch.empty((), dtype=torch.float32, device=scores.device) if mode == LOSS else None
    if n_rows == 0:
        return values, classes, n_valid.zero_() if mode == LOSS else None
    table = settings(n_classes, scores.element_size(), k, n_sample)
    collecting = {name: table[name] for name in ("BLOCK", "WIDTH", *warps(2))}
    plan = None if dense else noise.plan(n_classes, k)
    group, stride, rank = plan or (1, 1, 1)
    looked_at = triton.cdiv(triton.cdiv(n_classes, group), stride)
    wanted = noise.wanted_contenders(n_classes, k)
    parts = row_parts(n_rows, n_classes, table["BLOCK"], processors(scores.device)) if plan else 1
    collecting |= {
        "PARTS": parts,
        "GROUP": group,
        "GROUPS": triton.next_power_of_2(looked_at) if plan else 1,
        "CAPACITY": triton.next_power_of_2(4 * wanted) if plan else 1,
    }
    programs = n_rows if parts > 1 else min(n_rows, 32 * processors(scores.device))
    lists = parts * (2 + collecting["CAPACITY"] + table["BLOCK"] // table["WIDTH"])
    workspace_stride = lists + table["HELD"] * table["N"]
    workspace = torch.empty((programs, workspace_stride), dtype=torch.int64, device=scores.device)
    row_stride, class_stride = scores.stride()
    scores = as_loaded(scores)
    searching = table | collecting
    if isinstance(search_kernel, triton.runtime.Autotuner):
        searching = {name: value for name, value in searching.items() if name not in warps(2)}
    with on_device(scores.device):
        if parts > 1:
            share = triton.cdiv(triton.cdiv(n_classes + table["WIDTH"], parts), table["BLOCK"]) * table["BLOCK"]
            collect_kernel[(n_rows * parts,)](
                scores, workspace, workspace_stride, row_stride, class_stride, n_classes, rank, stride, looked_at,
                share, **collecting, **EXACT,
            )  # fmt: skip
        search_kernel[(programs,)](
            scores, target, margins, seed, values, classes, n_valid, workspace, workspace_stride, n_rows,
            row_stride, class_stride, n_classes, first_row, first_class, k, n_sample, epsilon, 1.0 / n_sample, scale,
            ignore_index, rank, stride, looked_at, wanted,
            MODE=mode, PLANNED=plan is not None, COLLECTED=parts > 1, **searching, **EXACT,
        )  # fmt: skip
    return values, classes, n_valid


def row_parts(n_rows: int, n_classes: int, block: int, n_processors: int) -> int:
    """In how many parts, each a program's, a row is collected: more than one where rows are few and long."""
    parts = 1
    while parts < 16 and n_rows * parts < 8 * n_processors and n_classes >= 16 * parts * block:
        parts *= 2
    return parts


def candidates(
    scores: Tensor, seed: Tensor, k: int, epsilon: float, n_sample: int, first_row: int, first_class: int, dense: bool
) -> tuple[Tensor, Tensor]:
    args = (scores, None, None, seed, k, epsilon, n_sample, 1.0, 0, first_row, first_class, dense)
    return _search(CANDIDATES, *args)[:2]


def smoothed(scores: Tensor, seed: Tensor, k: int, epsilon: float, n_sample: int, dense: bool) -> tuple[Tensor, Tensor]:
    return _search(SMOOTHED, scores, None, None, seed, k, epsilon, n_sample, 1.0, 0, 0, 0, dense)[:2]


def loss(
    scores: Tensor, target: Tensor, margins: Tensor | None, seed: Tensor, k: int, epsilon: float, n_sample: int,
    scale: float, ignore_index: int, dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if INTERPRETED and not target.is_cuda:
        wrong = (target != ignore_index) & ((target < 0) | (target >= scores.shape[1]))
        if wrong.any():
            raise RuntimeError("target out of bounds")
    margins = None if margins is None else margins.contiguous()
    target = target.contiguous()
    return _search(LOSS, scores, target, margins, seed, k, epsilon, n_sample, scale, ignore_index, 0, 0, dense)


def gradient(
    grad: Tensor, result: Tensor, classes: Tensor, target: Tensor | None, scale: float, first_class: int,
    n_classes: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n_rows, n_sample = classes.shape
    out = torch.empty((n_rows, n_classes), dtype=dtype, device=classes.device)
    if out.numel() == 0:
        return out
    block = (8192 if n_classes >= 4096 else 4096) // out.element_size()
    with on_device(out.device):
        gradient_kernel[(triton.cdiv(out.numel(), block),)](
            grad, result.contiguous(), classes.contiguous(), None if target is None else target.contiguous(),
            as_loaded(out),
            n_rows, first_class, n_classes, n_sample, grad.stride(0), scale,
            BLOCK=block, STEP=min(32, triton.next_power_of_2(n_sample + 1)), **warps(4), **EXACT,
        )  # fmt: skip
    return out
