"""Best, the k best noised scores of every sample so far.

A Best is a column of k keys in any order, whose least is the k-th best so far. Columns are samples, so that lanes share
them out and most of a maximum is taken inside a lane, without shuffles.
"""

import triton
import triton.language as tl

from .order import NO_KEY

EMPTY = tl.constexpr(-2139095041 << 32)  # + its number: a place that holds no key yet, above every class's -inf
PADDING = tl.constexpr(0x7FFFFFFF << 32)  # the places from k on; no class has these low bits


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
def in_order(best, k):
    """The keys of ``best`` without its padding: repeated maxima give the k best in order."""
    return tl.where(tl.arange(0, best.shape[0])[:, None] < k, best, NO_KEY)
