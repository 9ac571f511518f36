"""Contenders, the classes of a row that get draws of their own, in Triton: the cut, and one pass over the row.

Rule: topk_fast/reference.py's ``cut_of``. ``cut_of`` reads the groups that the plan looks at; ``collect`` streams the
row in blocks and packs each class above the cut with its score. Both run in the program that searches the row, or, for
few long rows, in several programs a row (``collect_kernel``).
Bytes: 1/stride of a row, then the row once; lists of some M classes that stay in L1 and L2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .order import kth_largest, ordered, unordered

SCAN = tl.constexpr(32)  # groups with a class above the cut that are opened at a time


class Scores(NamedTuple):
    """The scores of a call."""

    data: Any  # bfloat16 as int16
    row_stride: Any
    class_stride: Any
    n_classes: Any


class Row(NamedTuple):
    """A row of the scores. Place p of it holds class p - lead, so that places from 0 on are aligned vectors."""

    places: Any
    lead: Any
    classes: Any  # where class 0 lies
    class_stride: Any
    n_classes: Any


class Lists(NamedTuple):
    """A row's part of the workspace, in int64."""

    header: Any  # the counts of the parts' lists, then the bits of the cut
    packed: Any  # the lists: a contender's score and class
    groups: Any  # starts of groups with a class above the cut
    survivors: Any


@triton.jit
def row_of(scores, n, WIDTH: tl.constexpr):
    """Row n; its places begin at a multiple of WIDTH where classes are adjacent."""
    start = tl.cast(n, tl.int64) * scores.row_stride
    whole = start
    if scores.class_stride == 1:
        whole = start // WIDTH * WIDTH
    lead = (start - whole).to(tl.int32)
    return Row(scores.data + whole, lead, scores.data + whole + lead, scores.class_stride, scores.n_classes)


@triton.jit
def lists_of(workspace, slot, LAYOUT: tl.constexpr):
    """The lists of the slot's row."""
    header = workspace + tl.cast(slot, tl.int64) * LAYOUT.SLOT
    packed = header + 2 * LAYOUT.PARTS
    groups = packed + LAYOUT.PARTS * LAYOUT.CAPACITY
    return Lists(header, packed, groups, groups + LAYOUT.PARTS * (LAYOUT.BLOCK // LAYOUT.WIDTH))


@triton.jit
def widened(x):
    """Loaded scores as float32, exactly; int16 stands for bfloat16, of which Triton's interpreter loses subnormals."""
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load_scores(row, class_id, mask, fill):
    """Scores of classes as float32, ``fill`` where ``mask`` is not set."""
    place = row.classes + tl.cast(class_id, tl.int64) * row.class_stride
    return tl.where(mask, widened(tl.load(place, mask=mask, other=0)), fill)


@triton.jit
def group_max(x, N: tl.constexpr, WIDTH: tl.constexpr):
    """Maxima of the rows of x [N, WIDTH], NaN where there is one; WIDTH is a power of two up to 8."""
    if WIDTH >= 8:
        a, b = tl.split(tl.reshape(x, (N, 4, 2)))
        x = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    if WIDTH >= 4:
        a, b = tl.split(tl.reshape(x, (N, 2, 2)))
        x = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    if WIDTH >= 2:
        a, b = tl.split(x)
        x = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        x = tl.reshape(x, (N,))
    return x


@triton.jit
def cut_of(row, stride, rank, LAYOUT: tl.constexpr):
    """The rank-th largest maximum of groups 0, stride, ... of GROUP classes; -inf where that is +inf."""
    GROUP: tl.constexpr = LAYOUT.GROUP
    GROUPS: tl.constexpr = LAYOUT.GROUPS
    WIDTH: tl.constexpr = min(GROUP, 4)
    group = tl.arange(0, GROUPS)
    first = group * (stride * GROUP)
    looked_at = tl.cdiv(tl.cdiv(row.n_classes, GROUP), stride)
    top = tl.full((GROUPS,), float("-inf"), tl.float32)
    for i in range(0, GROUP, WIDTH):  # unrolled it would take all registers
        class_id = first[:, None] + i + tl.arange(0, WIDTH)[None, :]
        mask = (group < looked_at)[:, None] & (class_id < row.n_classes)
        x = load_scores(row, class_id, mask, float("-inf"))
        top = tl.maximum(top, group_max(x, GROUPS, WIDTH), propagate_nan=tl.PropagateNan.ALL)
    cut = unordered(kth_largest(ordered(top), rank))
    return tl.where(cut < float("inf"), cut, float("-inf"))


@triton.jit
def pack(high, low):
    """Two words in an int64; the low one is not negative."""
    return (high.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def collect(row, cut, lists, part, LAYOUT: tl.constexpr):
    """Packs the classes above the cut in one of PARTS parts of a row, with their scores, in order; writes their count.

    The count may be more than CAPACITY, the number kept, and is -1 where a score is NaN. Groups of WIDTH places that
    hold one of them come first, for a scan over all places would cost more than all else.
    """
    BLOCK: tl.constexpr = LAYOUT.BLOCK
    WIDTH: tl.constexpr = LAYOUT.WIDTH
    CAPACITY: tl.constexpr = LAYOUT.CAPACITY
    n_places = row.n_classes + row.lead
    share = tl.cdiv(tl.cdiv(row.n_classes + WIDTH, LAYOUT.PARTS), BLOCK) * BLOCK
    end = n_places
    if LAYOUT.PARTS > 1:
        end = tl.minimum(part * share + share, n_places)
    packed = lists.packed + part * CAPACITY
    groups = lists.groups + part * (BLOCK // WIDTH)
    count = 0
    nan = 0
    width = tl.arange(0, WIDTH)
    block = tl.arange(0, BLOCK // WIDTH)
    lane = tl.arange(0, SCAN * WIDTH)
    for start in range(part * share, end, BLOCK):
        at = start + block[:, None] * WIDTH + width[None, :]
        place = row.places + at.to(tl.int64) * row.class_stride
        if (start >= row.lead) & (end - start >= BLOCK):
            x = widened(tl.load(place))
        else:
            inside = (at >= row.lead) & (block[:, None] * WIDTH + width[None, :] < end - start)
            x = tl.where(inside, widened(tl.load(place, mask=inside, other=0)), float("-inf"))
        hit = ((group_max(x, BLOCK // WIDTH, WIDTH) <= cut) == 0).to(tl.int32)
        n_groups = tl.sum(hit, 0)
        tl.store(groups + tl.cumsum(hit, 0) - 1, start + block * WIDTH, mask=hit == 1)
        tl.debug_barrier()
        for i in range(0, n_groups, SCAN):
            found = i + lane // WIDTH < n_groups
            p = tl.load(groups + i + lane // WIDTH, mask=found, other=0).to(tl.int32) + lane % WIDTH
            found = found & (p >= row.lead) & (p < end)
            score = load_scores(row, p - row.lead, found, float("-inf"))
            above = (found & ((score <= cut) == 0)).to(tl.int32)
            to = count + tl.cumsum(above, 0) - 1
            both = pack(score.to(tl.int32, bitcast=True), p - row.lead)
            tl.store(packed + to, both, mask=(above == 1) & (to < CAPACITY))
            count += tl.sum(above, 0)
            nan = tl.maximum(nan, tl.max((score != score).to(tl.int32), 0))
        tl.debug_barrier()  # before the next block overwrites the groups
    tl.store(lists.header + part, tl.where(nan > 0, -1, count).to(tl.int64))


@triton.jit
def finite_are_fewer(row, wanted, BLOCK: tl.constexpr):
    """Whether fewer than ``wanted`` scores of the row are above -inf."""
    finite = 0
    start = 0
    while (start < row.n_classes) & (finite < wanted):
        offset = tl.arange(0, BLOCK)
        x = load_scores(row, start + offset, offset < row.n_classes - start, float("-inf"))
        finite += tl.sum((x > float("-inf")).to(tl.int32), 0)
        start += BLOCK
    return finite < wanted


@triton.jit(do_not_specialize=["stride", "rank"])
def collect_kernel(scores, workspace, stride, rank, LAYOUT: tl.constexpr):
    """Collects one of PARTS parts of a row, each in a program of its own."""
    n = tl.program_id(0) // LAYOUT.PARTS
    row = row_of(scores, n, LAYOUT.WIDTH)
    lists = lists_of(workspace, n, LAYOUT)
    cut = cut_of(row, stride, rank, LAYOUT)
    collect(row, cut, lists, tl.program_id(0) % LAYOUT.PARTS, LAYOUT)
    tl.store(lists.header + LAYOUT.PARTS, cut.to(tl.int32, bitcast=True).to(tl.int64))
