"""The k best of s + epsilon * Z for every sample of every row, in Triton, or the excesses that losses are made of.

Formula and sampler: topk_fast/reference.py; draws: noise.py; order: order.py. A program takes a row at a time:
``cut_of`` finds the cut from some groups of classes, ``collect`` streams the row and lists the contenders, ``draw``
gives them noise and keeps the k best of each sample, ``walk`` adds the other classes as arrivals, and the kernel ends
with the entries at the ranks, their mean and the class ids. Where rows are few and long, several programs collect each
of them first, in a launch of their own.
Fused: noise lives in registers; a draw costs one comparison of its word, and a value only where that passes.
Bytes: the row once, 1/stride of it twice, 32 for each arrival's score; lists stay in L1 and L2.
Bits: every rounding is noise.py's or written here; what the bounds drop could not have entered.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .best import empty_best, in_order
from .collect import collect, finite_are_fewer, lists_of
from .cut import Plan, cut_of
from .draw import Search, draw
from .order import NO_KEY, class_of, value_of
from .row import flat, load_scores, row_of, scores_of
from .walk import walk


class Tensors(NamedTuple):
    """The tensors of a search beside the scores."""

    seed: Any
    schedule: Any  # None, or the number that replaces epsilon
    target: Any  # None, or the labels
    workspace: Any
    out: Any  # [N, B, k], or excesses [N, M]
    classes: Any  # [N, B, k or M]


class Ranks(NamedTuple):
    """The ranks that are wanted."""

    number: Any  # M
    packed: Any  # four int64 with a byte a rank, less 1; not read where k is the only rank
    exclude_target: Any


@triton.jit
def enter_contenders(best, row, cut, lists, listed, search, plan, first_sample, SHAPE: tl.constexpr):
    """``best`` of some samples, which all classes above the cut have entered.

    ``listed`` is how many lists hold the contenders already, 0 where they are collected first. Returns the cut, which
    is lowered where too few scores are above it, and ``listed`` for the next samples, and whether a score is NaN.
    """
    end = row.n_classes + row.lead
    part = tl.arange(0, SHAPE.MOST_PARTS)
    nan = 0
    start = 0
    skip = 0
    more = 1
    while more > 0:
        n_lists = listed
        if listed == 0:
            from_start = (start == 0) & (skip == 0)
            entries = lists.pilot + SHAPE.TILE
            count, start, skip = collect(row, cut, entries, lists.space, start, skip, 1, SHAPE)
            tl.store(lists.header + 1, count.to(tl.int64))
            tl.debug_barrier()
            n_lists = 1
            listed = (from_start & (start >= end)).to(tl.int32)
        more = (start < end).to(tl.int32) & (listed == 0)
        few = False
        if (listed > 0) & (cut > float("-inf")):
            found = tl.sum(tl.load(lists.header + 1 + part, mask=part < listed, other=0), 0)
            if found < search.k:
                few = finite_are_fewer(row, plan.wanted)
        if few:  # the walk over the others might find too few: every class contends
            cut = float("-inf")
            listed = 0
            start = 0
            skip = 0
            more = 1
        else:
            best, bad = draw(best, lists, n_lists, search, first_sample, SHAPE)
            nan = tl.maximum(nan, bad)
            more = more * (1 - nan)
    return best, cut, listed, nan


@triton.jit
def store_in_order(best, values, classes, k, keep):
    """Writes the k best of every sample to its ``values`` and ``classes`` [N], best first."""
    best = in_order(best, k)
    for i in range(0, k):
        top = tl.max(best, 0)
        best = tl.where(best == top[None, :], NO_KEY, best)
        tl.store(values + i, value_of(top), mask=keep)
        tl.store(classes + i, class_of(top), mask=keep)


@triton.jit
def at_ranks(best, k, ranks, excluded, SHAPE: tl.constexpr):
    """The keys at the ranks of each sample [RANKS, N]; entries of the class ``excluded`` are passed over."""
    RANKS: tl.constexpr = SHAPE.RANKS
    N: tl.constexpr = SHAPE.N
    if RANKS == 0:
        chosen = tl.min(best, 0)[None, :]  # the only rank is k
    else:
        lane = tl.arange(0, RANKS)
        place = tl.full((RANKS,), 0, tl.int64)
        for word in tl.static_range(4):
            place = tl.where(lane // 8 == word, ranks.packed[word] >> (lane % 8 * 8).to(tl.int64), place)
        place = (place & 255).to(tl.int32) - ranks.exclude_target
        best = in_order(best, k)
        chosen = tl.full((RANKS, N), NO_KEY, tl.int64)
        passed = tl.zeros((N,), tl.int32)  # entries that count
        for _ in range(0, k):
            top = tl.max(best, 0)
            best = tl.where(best == top[None, :], NO_KEY, best)
            counts = class_of(top) != excluded
            chosen = tl.where((place[:, None] == passed[None, :]) & counts[None, :], top[None, :], chosen)
            passed += counts.to(tl.int32)
    return chosen


@triton.jit
def fill(start, count, value):
    """Writes ``value`` to ``count`` places, after all that the program has written there."""
    tl.debug_barrier()
    lane = tl.arange(0, 128)
    for done in range(0, count, 128):
        tl.store(start + done + lane, value, mask=lane < count - done)


@triton.jit
def search_row(scores, tensors, search, plan, ranks, lists, listed, n, SHAPE: tl.constexpr):
    """Searches row n for all samples, and writes its values and classes. ``listed`` lists hold its contenders."""
    N: tl.constexpr = SHAPE.N
    PLACES: tl.constexpr = max(SHAPE.RANKS, 1)
    row = row_of(scores, n, SHAPE)
    cut = float("-inf")
    if listed > 0:
        cut = tl.load(lists.header).to(tl.int32).to(tl.float32, bitcast=True)
        part = tl.arange(0, SHAPE.MOST_PARTS)
        counts = tl.load(lists.header + 1 + part, mask=part < listed, other=0)
        listed = tl.where(tl.min(counts, 0) < 0, 0, listed)
    elif plan.rank > 0:
        cut = cut_of(row, plan, lists.survivors, SHAPE)
    excluded = tl.full((), -2, tl.int64)  # no class
    if tensors.target is not None:
        if ranks.exclude_target > 0:
            excluded = tl.load(tensors.target + n)
    n = tl.cast(n, tl.int64)
    M = ranks.number
    lane = tl.arange(0, PLACES)
    sample = tl.arange(0, N)
    total = tl.zeros((PLACES,), tl.float32)
    nan = 0
    for first_sample in range(0, search.n_sample, N):
        best = empty_best(search.k, SHAPE.KEPT, N)
        best, cut, listed, bad = enter_contenders(best, row, cut, lists, listed, search, plan, first_sample, SHAPE)
        nan = tl.maximum(nan, bad)
        if (cut > float("-inf")) & (nan == 0):
            best = walk(best, row, cut, search, first_sample, SHAPE)
        keep = first_sample + sample < search.n_sample
        at = n * search.n_sample + first_sample + sample
        if SHAPE.CANDIDATES:
            store_in_order(best, tensors.out + at * search.k, tensors.classes + at * search.k, search.k, keep)
        else:
            chosen = at_ranks(best, search.k, ranks, excluded, SHAPE)
            to = flat(at[None, :] * M + lane[:, None])
            tl.store(tensors.classes + to, flat(class_of(chosen)), mask=flat(keep[None, :] & (lane < M)[:, None]))
            bits = value_of(chosen).to(tl.int32, bitcast=True)
            for b in range(0, tl.minimum(search.n_sample - first_sample, N)):  # in sample order, for the sum's bits
                value = tl.sum(tl.where(sample[None, :] == b, bits, 0), 1).to(tl.float32, bitcast=True)
                total = tl.where(first_sample + b == 0, value, total + value)
    if SHAPE.CANDIDATES:
        if nan == 1:
            count = search.n_sample * search.k
            fill(tensors.out + n * count, count, float("nan"))
            fill(tensors.classes + n * count, count, -2)
    else:
        excess = total * tl.div_rn(1.0, tl.cast(search.n_sample, tl.float32))
        if tensors.target is not None:
            y = tl.load(tensors.target + n)
            known = (y >= 0) & (y < row.n_classes)
            tl.device_assert(known, "topk_fast: target out of bounds")
            excess -= load_scores(row, y, known, float("nan"))
        excess = tl.where(nan == 1, float("nan"), excess)
        tl.store(tensors.out + n * M + lane, excess, mask=lane < M)
        if tl.max(((excess != excess) & (lane < M)).to(tl.int32), 0) > 0:
            fill(tensors.classes + n * search.n_sample * M, search.n_sample * M, -2)


@triton.jit(do_not_specialize=range(7, 31), do_not_specialize_on_alignment=range(1, 7))
def search_kernel(
    scores,
    seed,
    schedule,
    target,
    workspace,
    out,
    classes,
    offset: tl.int64,
    row_stride: tl.int64,
    class_stride: tl.int64,
    n_classes: tl.int32,
    group: tl.int32,
    stride: tl.int32,
    rank: tl.int32,
    wanted: tl.int32,
    parts: tl.int32,
    capacity: tl.int32,
    slot: tl.int32,
    n_rows: tl.int32,
    first_row: tl.int32,
    first_class: tl.int32,
    n_sample: tl.int32,
    epsilon: tl.float32,
    k: tl.int32,
    ignore_index: tl.int64,
    n_ranks: tl.int32,
    ranks0: tl.int64,
    ranks1: tl.int64,
    ranks2: tl.int64,
    ranks3: tl.int64,
    exclude_target: tl.int32,
    SHAPE: tl.constexpr,
):
    """Searches rows of the scores. Numbers come one by one, because Triton recompiles for new ones in a tuple."""
    tensors = Tensors(seed, schedule, target, workspace, out, classes)
    if schedule is not None:
        epsilon = tl.load(schedule)
    epsilon = tl.cast(epsilon, tl.float32)
    data = scores_of(scores, offset, row_stride, class_stride, n_classes, SHAPE)
    plan = Plan(group, stride, rank, wanted)
    ranks = Ranks(n_ranks, (ranks0, ranks1, ranks2, ranks3), exclude_target)
    lists = lists_of(workspace, tl.program_id(0), slot, parts, capacity, SHAPE)
    listed = tl.where(parts > 1, parts, 0)
    for n in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        tl.debug_barrier()  # the row before has read its lists
        ignored = False
        if target is not None:
            ignored = tl.load(target + n) == ignore_index
        if ignored:
            fill(out + tl.cast(n, tl.int64) * n_ranks, n_ranks, 0.0)
            fill(classes + tl.cast(n, tl.int64) * n_sample * n_ranks, n_sample * n_ranks, -1)
        else:
            number = tl.cast(first_row + n, tl.uint32)
            search = Search(tl.load(seed), number, first_class, n_sample, epsilon, k)
            search_row(data, tensors, search, plan, ranks, lists, listed, n, SHAPE)
