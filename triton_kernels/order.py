"""Order and selection on tensors of a program: keys of scores and of (value, class), and Best, the k best so far.

A key is an int64 that orders noised scores as the contract does, value descending, then class ascending:
``ordered(value) << 32 | (2**31 - 1 - class) << 1 | is minus zero``. The last bit keeps the value whole, for -0 equals
+0 in ``ordered``. A Best is a column of k keys in any order, whose least is the k-th best so far. Columns are samples,
so that lanes of a warp share them out and most of a maximum is taken inside a lane, without shuffles.
"""

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(1 << 63))  # below everything
NO_SCORE = tl.constexpr(-2139095041)  # ordered(-inf)
EMPTY = tl.constexpr(-2139095041 << 32)  # + its number: a place that holds no key yet
PADDING = tl.constexpr(0x7FFFFFFF << 32)  # the places from k on; no class has these low bits
MAX32 = tl.constexpr(0x7FFFFFFF)


@triton.jit
def ordered(x):
    """An int32 in the order of the float32 x; -0 equals +0."""
    b = (x + 0.0).to(tl.int32, bitcast=True)
    return b ^ ((b >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(o):
    """The float32 that ``ordered`` made o of, +0 for both zeros."""
    return (o ^ ((o >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def make_key(value, class_id):
    minus_zero = value.to(tl.int32, bitcast=True) == -0x80000000
    low = ((0x7FFFFFFF - class_id).to(tl.uint32) << 1) | minus_zero.to(tl.uint32)
    return (ordered(value).to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def value_of(key):
    """-inf for an empty place."""
    high = (key >> 32).to(tl.int32)
    bits = high ^ ((high >> 31) & 0x7FFFFFFF)
    sign = (high == 0).to(tl.int32) & key.to(tl.int32)  # set for -0, which Triton takes for 0 as a literal
    return (bits ^ (sign << 31)).to(tl.float32, bitcast=True)


@triton.jit
def class_of(key):
    """-1 for an empty place."""
    class_id = 0x7FFFFFFF - ((key & 0xFFFFFFFF) >> 1)
    return tl.where((key >> 32) == NO_SCORE, -1, class_id)


@triton.jit
def empty_best(k, KEPT: tl.constexpr, N: tl.constexpr):
    """N times places for k keys: int64 [KEPT, N]."""
    place = tl.arange(0, KEPT)[:, None] + tl.zeros((KEPT, N), tl.int32)
    return tl.where(place < k, EMPTY + place.to(tl.int64), PADDING)


@triton.jit
def enter(best, keys):
    """The best of ``keys`` [M, N], all different, enter, the largest first, until none exceeds a column's least."""
    worst = tl.min(best, 0)
    top = tl.max(keys, 0)
    more = tl.max((top > worst).to(tl.int32), 0)
    while more > 0:
        best = tl.where((best == worst[None, :]) & (top > worst)[None, :], top[None, :], best)
        keys = tl.where(keys == top[None, :], NO_KEY, keys)
        worst = tl.min(best, 0)
        top = tl.max(keys, 0)
        more = tl.max((top > worst).to(tl.int32), 0)
    return best


@triton.jit
def kth_largest(x, rank):
    """The ``rank``-th largest of ordered scores x [N] (int32), NO_SCORE where fewer than ``rank`` are above it.

    Closes in on it between a lower end that at least ``rank`` reach and an upper one that fewer do. Bounds are
    interpolated, every third one halfway: some six counts for scores, never more than a hundred.
    """
    lower = tl.min(tl.where(x > NO_SCORE, x, MAX32), 0).to(tl.int64)
    upper = tl.max(x, 0).to(tl.int64) + 1
    reach_lower = tl.sum((x > NO_SCORE).to(tl.int32), 0)
    enough = reach_lower >= rank
    reach_upper = 0
    step = 0
    while (upper - lower > 1) & (reach_lower > rank):
        width = upper - lower
        share = tl.div_rn((reach_lower - rank).to(tl.float32) + 0.5, (reach_lower - reach_upper).to(tl.float32))
        ahead = (width.to(tl.float32) * share).to(tl.int64)
        ahead = tl.where(step % 3 == 2, width >> 1, ahead)
        middle = lower + tl.minimum(tl.maximum(ahead, 1), width - 1)
        reach = tl.sum((x >= middle.to(tl.int32)).to(tl.int32), 0)
        if reach >= rank:
            lower = middle
            reach_lower = reach
        else:
            upper = middle
            reach_upper = reach
        step += 1
    found = tl.min(tl.where(x >= lower.to(tl.int32), x, MAX32), 0)
    return tl.where(enough, found, NO_SCORE)
