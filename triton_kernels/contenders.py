"""The classes of a row that get draws of their own, in Triton: the cut, and one pass over the row.

Rule: topk_fast/reference.py's ``cut``. ``cut_of`` reads the groups that the plan looks at; ``collect`` streams the row
in blocks and packs each class above the cut with its score. Both may run in the program that searches the row, or, for
few long rows, in several programs a row (``collect_kernel``).
Bytes: 1/stride of a row, then the row once; lists of some M classes that stay in L1 and L2.
"""

import triton
import triton.language as tl

from .order import kth_largest, ordered, unordered

SCAN = tl.constexpr(32)  # groups with a class above the cut that are opened at a time


@triton.jit
def widened(x):
    """Loaded scores as float32, exactly; int16 stands for bfloat16, of which Triton's interpreter loses subnormals."""
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load_scores(place, mask, fill):
    """Scores as float32, ``fill`` where ``mask`` is not set."""
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
def cut_of(row, class_stride, n_classes, rank, stride, looked_at, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """The rank-th largest maximum of groups 0, stride, ... of GROUP classes; -inf where that is +inf."""
    WIDTH: tl.constexpr = min(GROUP, 4)
    group = tl.arange(0, GROUPS)
    first = group * (stride * GROUP)
    top = tl.full((GROUPS,), float("-inf"), tl.float32)
    for i in range(0, GROUP, WIDTH):  # unrolled it would take all registers
        at = first[:, None] + i + tl.arange(0, WIDTH)[None, :]
        mask = (group < looked_at)[:, None] & (at < n_classes)
        x = load_scores(row + at.to(tl.int64) * class_stride, mask, float("-inf"))
        top = tl.maximum(top, group_max(x, GROUPS, WIDTH), propagate_nan=tl.PropagateNan.ALL)
    cut = unordered(kth_largest(ordered(top), rank))
    return tl.where(cut < float("inf"), cut, float("-inf"))


@triton.jit
def pack(high, low):
    """Two words in an int64; the low one is not negative."""
    return (high.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def collect(
    row, class_stride, lead, begin, end, cut, out, groups, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Packs the classes above the cut in places [begin, end) of a row, with their scores, into ``out``, in order.

    Place p holds class p - lead, so that ``row`` is aligned and blocks load whole vectors. Returns how many there
    are, which may be more than CAPACITY, the number kept, and -1 where one is NaN. Groups of WIDTH places that hold
    one come first, for a scan over all places would cost more than all else.
    """
    count = 0
    nan = 0
    width = tl.arange(0, WIDTH)
    block = tl.arange(0, BLOCK // WIDTH)
    lane = tl.arange(0, SCAN * WIDTH)
    for start in range(begin, end, BLOCK):
        at = start + block[:, None] * WIDTH + width[None, :]
        place = row + at.to(tl.int64) * class_stride
        if (start >= lead) & (end - start >= BLOCK):
            x = widened(tl.load(place))
        else:
            inside = (at >= lead) & (block[:, None] * WIDTH + width[None, :] < end - start)
            x = load_scores(place, inside, float("-inf"))
        hit = ((group_max(x, BLOCK // WIDTH, WIDTH) <= cut) == 0).to(tl.int32)
        n_groups = tl.sum(hit, 0)
        tl.store(groups + tl.cumsum(hit, 0) - 1, start + block * WIDTH, mask=hit == 1)
        tl.debug_barrier()
        for i in range(0, n_groups, SCAN):
            found = i + lane // WIDTH < n_groups
            p = tl.load(groups + i + lane // WIDTH, mask=found, other=0).to(tl.int32) + lane % WIDTH
            found = found & (p >= lead) & (p < end)
            score = load_scores(row + p.to(tl.int64) * class_stride, found, float("-inf"))
            above = (found & ((score <= cut) == 0)).to(tl.int32)
            to = count + tl.cumsum(above, 0) - 1
            tl.store(out + to, pack(score.to(tl.int32, bitcast=True), p - lead), mask=(above == 1) & (to < CAPACITY))
            count += tl.sum(above, 0)
            nan = tl.maximum(nan, tl.max((score != score).to(tl.int32), 0))
        tl.debug_barrier()  # before the next block overwrites the groups
    return tl.where(nan > 0, -1, count)


@triton.jit
def finite_are_fewer(row, class_stride, n_classes, wanted, BLOCK: tl.constexpr):
    """Whether fewer than ``wanted`` scores of the row are above -inf."""
    finite = 0
    start = 0
    while (start < n_classes) & (finite < wanted):
        at = tl.arange(0, BLOCK)
        place = row + (start + at).to(tl.int64) * class_stride
        x = load_scores(place, at < n_classes - start, float("-inf"))
        finite += tl.sum((x > float("-inf")).to(tl.int32), 0)
        start += BLOCK
    return finite < wanted


@triton.jit
def begin(scores, n, row_stride, class_stride, WIDTH: tl.constexpr):
    """The start of row n, moved back to a multiple of WIDTH where classes are adjacent, and by how many places."""
    start = tl.cast(n, tl.int64) * row_stride
    whole = start
    if class_stride == 1:
        whole = start // WIDTH * WIDTH
    return scores + whole, (start - whole).to(tl.int32)


@triton.jit
def areas(workspace, n, stride, PARTS: tl.constexpr, CAPACITY: tl.constexpr, GROUPS: tl.constexpr):
    """A row's part of the workspace: counts of PARTS lists and the cut, the lists, groups, words that survived."""
    header = workspace + tl.cast(n, tl.int64) * stride
    packed = header + 2 * PARTS
    groups = packed + PARTS * CAPACITY
    return header, packed, groups, groups + PARTS * GROUPS


@triton.jit
def collect_kernel(
    scores, workspace, workspace_stride, row_stride, class_stride, n_classes, rank, stride, looked_at, share,
    PARTS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """The contenders of one of PARTS parts of a row, ``share`` places long: few long rows for many processors."""
    n = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    row, lead = begin(scores, n, row_stride, class_stride, WIDTH)
    header, packed, groups, _ = areas(workspace, n, workspace_stride, PARTS, CAPACITY, BLOCK // WIDTH)
    cut = cut_of(row + lead, class_stride, n_classes, rank, stride, looked_at, GROUP, GROUPS)
    count = collect(
        row, class_stride, lead, part * share, tl.minimum(part * share + share, n_classes + lead), cut,
        packed + part * CAPACITY, groups + part * (BLOCK // WIDTH), BLOCK, WIDTH, CAPACITY,
    )  # fmt: skip
    tl.store(header + part, count.to(tl.int64))
    tl.store(header + PARTS, cut.to(tl.int32, bitcast=True).to(tl.int64))
