"""The gradient of the scores, [N, L] with at most B * M + 1 entries a row, or a slice of it, in Triton.

Formula: topk_fast/reference.py's ``gradient``. A program fills one block of the flat output with zeros, in whole
vectors wherever rows begin, and then writes the entries of its rows that fall into it: the barrier between makes that
safe, and every byte goes to memory once.
Bytes: N * L written; class ids and labels are read once per block that they may concern.
Bits: sums over ranks in order of ``grad * (count / B)``, the count exact, one rounding to the output's dtype.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Gradient(NamedTuple):
    """The tensors of a gradient of the scores."""

    grad: Any  # [N, M]
    classes: Any  # [N, B, M]
    target: Any  # None, or the labels [N]
    out: Any  # [N, L]


class RowIds(NamedTuple):
    """The class ids of a row and the gradients that belong to them."""

    classes: Any  # [B, M]
    grad: Any  # [M]
    n_sample: Any
    n_ranks: Any


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """The float32 x rounded to a dtype; int16 stands for bfloat16, which Triton's interpreter would truncate."""
    if DTYPE == tl.int16:
        b = x.to(tl.int32, bitcast=True)
        b = tl.where(x == x, b + 0x7FFF + ((b >> 16) & 1), 0x7FC00000)
        x = b >> 16
    return x.to(DTYPE)


@triton.jit
def count_of(ids, wanted, m, STEP: tl.constexpr):
    """How many of a row's samples have the classes ``wanted`` [J] at rank m: int32 [J]."""
    count = tl.zeros_like(wanted).to(tl.int32)
    for start in range(0, ids.n_sample, STEP):
        b = start + tl.arange(0, STEP)
        other = tl.load(ids.classes + b * ids.n_ranks + m, mask=b < ids.n_sample, other=-1)
        count += tl.sum((wanted[:, None] == other[None, :]).to(tl.int32), 1)
    return count


@triton.jit
def entry_of(ids, wanted, y, STEP: tl.constexpr):
    """The gradient's float32 entries at the classes ``wanted`` [J], where y is the true class."""
    value = tl.zeros_like(wanted).to(tl.float32)
    total = tl.zeros_like(value)
    for m in range(0, ids.n_ranks):
        grad = tl.load(ids.grad + m)
        count = count_of(ids, wanted, m, STEP).to(tl.float32)
        term = grad * tl.div_rn(count, tl.cast(ids.n_sample, tl.float32))
        value = tl.where(m == 0, term, value + term)
        total = tl.where(m == 0, grad, total + grad)
    return tl.where(wanted == y, value - total, value)


@triton.jit(do_not_specialize=["n_rows", "n_sample", "n_ranks", "ignore_index", "first_class"])
def gradient_kernel(
    tensors, n_rows, n_sample, n_ranks, ignore_index, first_class, n_classes, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """Fills one block of the output. Numbers come one by one, because Triton recompiles for new ones in a tuple."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    end = tl.minimum(begin + BLOCK, n_rows.to(tl.int64) * n_classes)
    at = begin + tl.arange(0, BLOCK)
    DTYPE: tl.constexpr = tensors.out.dtype.element_ty
    zeros = tl.zeros((BLOCK,), DTYPE)
    if end - begin == BLOCK:
        tl.store(tensors.out + at, zeros)
    else:
        tl.store(tensors.out + at, zeros, mask=at < end)
    tl.debug_barrier()
    n_ids = n_sample * n_ranks
    for n in range(begin // n_classes, (end - 1) // n_classes + 1):
        start = n * n_classes
        ids = RowIds(tensors.classes + n * n_ids, tensors.grad + n * n_ranks, n_sample, n_ranks)
        y = tl.full((), -1, tl.int64)
        ignored = False
        if tensors.target is not None:
            y = tl.load(tensors.target + n)
            ignored = y == ignore_index
        if tl.load(ids.classes) == -2:
            nan = rounded(tl.full((BLOCK,), float("nan"), tl.float32), DTYPE)
            tl.store(tensors.out + at, nan, mask=(at >= start) & (at < tl.minimum(end, start + n_classes)))
        elif ignored == 0:
            for first in range(0, n_ids + 1, STEP):  # the true class comes after the last sample
                i = first + tl.arange(0, STEP)
                c = tl.load(ids.classes + i, mask=i < n_ids, other=-1)
                c = tl.where(i == n_ids, y, c)
                place = c - first_class
                inside = (c >= first_class) & (place < n_classes)
                inside &= (start + place >= begin) & (start + place < end)
                if tl.max(inside.to(tl.int32), 0) > 0:
                    entry = rounded(entry_of(ids, c, y, STEP), DTYPE)
                    tl.store(tensors.out + start + place, entry, mask=inside)
