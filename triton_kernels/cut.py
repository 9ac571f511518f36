"""The cut of a row, in Triton: the rank-th largest of the maxima of the groups that the plan looks at.

Rule: topk_fast/reference.py's ``cut_of``. Bytes: the groups looked at, up to a sixth of a long row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .order import MAX32, NO_SCORE, ordered, unordered
from .row import load_scores, widened

GROUPS = tl.constexpr(1024)  # more than the plan ever looks at


class Plan(NamedTuple):
    """Where noise.plan puts the cut, with rank 0 where every class is a contender."""

    group: Any
    stride: Any
    rank: Any
    wanted: Any  # about as many contenders


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


@triton.jit
def group_maxima(row, plan, looked_at, out, SHAPE: tl.constexpr):
    """Writes the maxima of the groups looked at to ``out``, as ordered scores. A NaN may spoil one."""
    WIDTH: tl.constexpr = SHAPE.WIDTH
    if SHAPE.ADJACENT & (row.lead == 0) & (plan.group % WIDTH == 0) & (row.n_classes % WIDTH == 0):  # aligned vectors
        AT_ONCE: tl.constexpr = 1024 // WIDTH
        for start in range(0, looked_at, AT_ONCE):
            group = start + tl.arange(0, AT_ONCE)
            top = tl.full((AT_ONCE,), float("-inf"), tl.float32)
            for i in range(0, plan.group // WIDTH):
                vector = group * (plan.stride * (plan.group // WIDTH)) + i
                inside = ((group < looked_at) & (vector < row.n_classes // WIDTH))[:, None]
                place = row.places + vector.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
                x = tl.where(inside, widened(tl.load(place, mask=inside, other=0)), float("-inf"))
                top = tl.maximum(top, tl.max(x, 1))
            tl.store(out + group, ordered(top), mask=group < looked_at)
    else:
        for start in range(0, looked_at, 256):
            group = start + tl.arange(0, 256)
            top = tl.full((256,), float("-inf"), tl.float32)
            for i in range(0, plan.group):
                class_id = group * (plan.stride * plan.group) + i
                x = load_scores(row, class_id, (group < looked_at) & (class_id < row.n_classes), float("-inf"))
                top = tl.maximum(top, x)
            tl.store(out + group, ordered(top), mask=group < looked_at)


@triton.jit
def cut_of(row, plan, words, SHAPE: tl.constexpr):
    """The rank-th largest maximum of the groups looked at; -inf where that is +inf. ``words`` hold GROUPS int32.

    In a row with a NaN it may be any number: such a row ends as NaN whatever the cut.
    """
    looked_at = tl.cdiv(tl.cdiv(row.n_classes, plan.group), plan.stride)
    for start in range(looked_at // 256 * 256, GROUPS, 256):
        place = start + tl.arange(0, 256)  # another part of the row may have stored its maxima there already
        tl.store(words.to(tl.pointer_type(tl.int32)) + place, NO_SCORE, mask=place >= looked_at)
    tl.debug_barrier()
    group_maxima(row, plan, looked_at, words.to(tl.pointer_type(tl.int32)), SHAPE)
    tl.debug_barrier()
    # Two dimensions, for the width of these loads would become that of all one-dimensional ones.
    group = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    maxima = tl.multiple_of(words.to(tl.pointer_type(tl.int32)), 16)
    tops = tl.reshape(tl.load(maxima + group), (GROUPS,))
    tl.debug_barrier()  # before the words are used otherwise
    cut = unordered(kth_largest(tops, plan.rank))
    return tl.where(cut < float("inf"), cut, float("-inf"))
