"""The gradient of a loss or of a smoothed value, [N, L] with at most B + 1 entries a row, in Triton; or a slice of it.

Formula: topk_fast/reference.py's ``gradient``. A program fills one block of the flat output with zeros, in whole
vectors wherever rows begin, and then writes the entries of its rows that fall into it: the barrier between makes that
safe, and every byte goes to memory once.
Bytes: N * L written; classes and labels read once per block they may concern.
Bits: ``(grad * scale) * (count / B)``, the count exact, one rounding to the output's dtype.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """The float32 x rounded to a dtype; int16 stands for bfloat16, which Triton's interpreter would truncate."""
    if DTYPE == tl.int16:
        b = x.to(tl.int32, bitcast=True)
        b = tl.where(x == x, b + 0x7FFF + ((b >> 16) & 1), 0x7FC00000)
        x = b >> 16
    return x.to(DTYPE)


@triton.jit
def count_of(row_classes, wanted, n_sample, STEP: tl.constexpr):
    """How many of a row's n_sample classes are ``wanted`` [M]: int32 [M]."""
    count = tl.zeros_like(wanted).to(tl.int32)
    for start in range(0, n_sample, STEP):
        b = start + tl.arange(0, STEP)
        other = tl.load(row_classes + b, mask=b < n_sample, other=-1)
        count += tl.sum((wanted[:, None] == other[None, :]).to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=["n_rows", "first_class", "n_sample"])
def gradient_kernel(
    grad, result, classes, target, out, n_rows, first_class, n_classes, n_sample, grad_stride, scale,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    end = tl.minimum(begin + BLOCK, n_rows.to(tl.int64) * n_classes)
    at = begin + tl.arange(0, BLOCK)
    DTYPE: tl.constexpr = out.dtype.element_ty
    zeros = tl.zeros((BLOCK,), DTYPE)
    if end - begin == BLOCK:
        tl.store(out + at, zeros)
    else:
        tl.store(out + at, zeros, mask=at < end)
    tl.debug_barrier()
    for n in range(begin // n_classes, (end - 1) // n_classes + 1):
        value = tl.load(result + n)
        start = n * n_classes
        if value != value:
            nan = rounded(tl.full((BLOCK,), float("nan"), tl.float32), DTYPE)
            tl.store(out + at, nan, mask=(at >= start) & (at < tl.minimum(end, start + n_classes)))
        elif target is None or value > 0.0:
            y = tl.full((), -1, tl.int64)
            if target is not None:
                y = tl.load(target + n)
            coefficient = tl.load(grad + n * grad_stride) * scale
            row_classes = classes + n * n_sample
            for first in range(0, n_sample + 1, STEP):  # the true class comes after the last sample
                b = first + tl.arange(0, STEP)
                c = tl.load(row_classes + b, mask=b < n_sample, other=-1)
                c = tl.where(b == n_sample, y, c)
                place = c - first_class
                inside = (c >= first_class) & (place < n_classes)
                inside &= (start + place >= begin) & (start + place < end)
                if tl.max(inside.to(tl.int32), 0) > 0:
                    count = count_of(row_classes, c, n_sample, STEP) - tl.where(c == y, n_sample, 0)
                    entry = coefficient * tl.div_rn(count.to(tl.float32), tl.cast(n_sample, tl.float32))
                    tl.store(out + start + place, rounded(entry, DTYPE), mask=inside)
