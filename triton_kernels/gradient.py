"""The gradient of the scores, [N, L] with at most B * M + 1 entries a row, or a slice of it, in Triton.

Formula: topk_fast/reference.py's ``gradient``. A program fills one block of the flat output with zeros, in whole
vectors wherever rows begin, and then writes the entries of its rows that fall into it, those of all rows side by side:
the barrier between makes that safe, and every byte goes to memory once.
Bytes: N * L written; class ids and labels are read once per block that they may concern.
Bits: sums over ranks in order of ``grad * (count / B)``, the count exact, one rounding to the output's dtype.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

AT_ONCE = tl.constexpr(128)  # entries that are computed side by side
SAMPLES = tl.constexpr(8)  # of each of them, that are compared at a time


class Ids(NamedTuple):
    """The class ids and the gradients that belong to them."""

    classes: Any  # [N, B, M]
    grad: Any  # [N, M]
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
def entry_of(ids, row, wanted, is_target, mask):
    """The gradient's float32 entries [J] at the classes ``wanted`` of the rows ``row``."""
    value = tl.zeros_like(wanted).to(tl.float32)
    total = tl.zeros_like(value)
    for m in range(0, ids.n_ranks):
        count = tl.zeros_like(wanted).to(tl.int32)
        for start in range(0, ids.n_sample, SAMPLES):
            b = start + tl.arange(0, SAMPLES)[None, :]
            place = ((row * ids.n_sample)[:, None] + b) * ids.n_ranks + m
            other = tl.load(ids.classes + place, mask=mask[:, None] & (b < ids.n_sample), other=-1)
            count += tl.sum((wanted[:, None] == other).to(tl.int32), 1)
        grad = tl.load(ids.grad + row * ids.n_ranks + m, mask=mask, other=0.0)
        term = grad * tl.div_rn(count.to(tl.float32), tl.cast(ids.n_sample, tl.float32))
        value = tl.where(m == 0, term, value + term)
        total = tl.where(m == 0, grad, total + grad)
    return tl.where(is_target, value - total, value)


@triton.jit
def fill_nan(ids, out, first_row, rows, begin, end, n_classes):
    """Fills the rows among ``rows`` rows that are marked by ids of -2, within [begin, end) of the output."""
    n_ids = ids.n_sample * ids.n_ranks
    lane = tl.arange(0, AT_ONCE)
    for done in range(0, rows, AT_ONCE):
        here = lane < rows - done
        marked = tl.load(ids.classes + (first_row + done + lane) * n_ids, mask=here, other=0) == -2
        if tl.max(marked.to(tl.int32), 0) > 0:
            for n in range(first_row + done, first_row + tl.minimum(done + AT_ONCE, rows)):
                if tl.load(ids.classes + n * n_ids) == -2:
                    start = tl.maximum(n * n_classes, begin)
                    stop = tl.minimum((n + 1) * n_classes, end)
                    nan = rounded(tl.full((AT_ONCE,), float("nan"), tl.float32), out.dtype.element_ty)
                    for at in range(start, stop, AT_ONCE):
                        tl.store(out + at + lane, nan, mask=lane < stop - at)


@triton.jit(do_not_specialize=range(4, 10), do_not_specialize_on_alignment=range(1, 4))
def gradient_kernel(
    out,
    grad,
    classes,
    target,
    n_rows: tl.int32,
    n_sample: tl.int32,
    n_ranks: tl.int32,
    ignore_index: tl.int64,
    first_class: tl.int32,
    n_classes: tl.int32,
    BLOCK: tl.constexpr,
):
    """Fills one block of the output. Numbers come one by one, because Triton recompiles for new ones in a tuple."""
    if out.dtype.element_ty == tl.bfloat16:
        out = out.to(tl.pointer_type(tl.int16), bitcast=True)
    DTYPE: tl.constexpr = out.dtype.element_ty
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    end = tl.minimum(begin + BLOCK, n_rows.to(tl.int64) * n_classes)
    at = begin + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), DTYPE)
    if end - begin == BLOCK:
        tl.store(out + at, zeros)
    else:
        tl.store(out + at, zeros, mask=at < end)
    tl.debug_barrier()
    ids = Ids(classes, grad, n_sample, n_ranks)
    n_ids = n_sample * n_ranks
    first_row = begin // n_classes
    rows = ((end - 1) // n_classes + 1 - first_row).to(tl.int32)
    each = n_ids + 1  # the true class comes after the last sample
    for done in range(0, rows * each, AT_ONCE):
        number = done + tl.arange(0, AT_ONCE)
        row = first_row + number // each
        i = number % each
        here = number < rows * each
        c = tl.load(classes + row * n_ids + i, mask=here & (i < n_ids), other=-1)
        here &= tl.load(classes + row * n_ids, mask=here, other=-2) != -2
        is_target = c != c
        if target is not None:
            y = tl.load(target + row, mask=here, other=-1)
            here &= y != ignore_index
            c = tl.where(i == n_ids, y, c)
            is_target = c == y
        place = c - first_class
        inside = here & (c >= first_class) & (place < n_classes)
        inside &= (row * n_classes + place >= begin) & (row * n_classes + place < end)
        if tl.max(inside.to(tl.int32), 0) > 0:
            entry = rounded(entry_of(ids, row, c, is_target, inside), DTYPE)
            tl.store(out + row * n_classes + place, entry, mask=inside)
    fill_nan(ids, out, first_row, rows, begin, end, n_classes)
