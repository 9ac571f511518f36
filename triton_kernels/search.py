"""The k best of s + epsilon * Z for every sample of every row, in Triton, or the excesses that losses are made of.

Formula and sampler: topk_fast/reference.py; draws: noise.py; order: order.py. A program takes a row at a time:
``cut_of`` finds the cut from some groups of classes, ``collect`` streams the row and packs the contenders, ``draw``
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

from .contenders import collect, cut_of, finite_are_fewer, lists_of, load_scores, row_of
from .draw import Contenders, Search, draw
from .order import NO_KEY, class_of, value_of
from .walk import walk


class Tensors(NamedTuple):
    """The tensors of a search beside the scores."""

    seed: Any
    schedule: Any  # None, or the number that replaces epsilon
    target: Any  # None, or the labels
    workspace: Any
    out: Any  # [N, B, k], or excesses [N, M]
    classes: Any  # [N, B, k or M]


class Plan(NamedTuple):
    """Where noise.plan puts the cut."""

    stride: Any
    rank: Any
    wanted: Any  # about as many contenders


@triton.jit
def contenders_of(row, k, plan, lists, SHAPE: tl.constexpr):
    """The contenders of a row, and whether it is known to hold a NaN; then it has none."""
    LAYOUT: tl.constexpr = SHAPE.LAYOUT
    cut = float("-inf")
    direct = 1
    nan = 0
    if SHAPE.PLANNED:
        if LAYOUT.PARTS > 1:
            cut = tl.load(lists.header + LAYOUT.PARTS).to(tl.int32).to(tl.float32, bitcast=True)
        else:
            cut = cut_of(row, plan.stride, plan.rank, LAYOUT)
            collect(row, cut, lists, 0, LAYOUT)
            tl.debug_barrier()
        count = tl.load(lists.header + tl.arange(0, LAYOUT.PARTS))
        nan = (tl.min(count, 0) < 0).to(tl.int32)
        direct = ((tl.max(count, 0) > LAYOUT.CAPACITY) | (cut == float("-inf"))).to(tl.int32)
        if (nan == 0) & (tl.sum(count, 0) < k):
            if finite_are_fewer(row, plan.wanted, LAYOUT.BLOCK):
                cut = float("-inf")
                direct = 1
    n_parts = (1 - nan) * (direct + LAYOUT.PARTS * (1 - direct))
    return Contenders(lists, cut, direct, n_parts), nan


@triton.jit
def in_order(best, k, KEPT: tl.constexpr):
    """The keys of ``best`` without its padding: repeated maxima give the k best in order."""
    return tl.where(tl.arange(0, KEPT)[:, None] < k, best, NO_KEY)


@triton.jit
def store_in_order(best, values, classes, k, keep):
    """Writes the k best of every sample to its ``values`` and ``classes`` [N], best first."""
    best = in_order(best, k, best.shape[0])
    for i in range(0, k):
        top = tl.max(best, 0)
        best = tl.where(best == top[None, :], NO_KEY, best)
        tl.store(values + i, value_of(top), mask=keep)
        tl.store(classes + i, class_of(top), mask=keep)


@triton.jit
def at_ranks(best, search, excluded, SHAPE: tl.constexpr):
    """The keys at the ranks of each sample [RANKS, N]; entries of the class ``excluded`` are passed over."""
    RANKS: tl.constexpr = SHAPE.RANKS
    N: tl.constexpr = SHAPE.N
    if len(search.ranks) == 0:
        chosen = tl.min(best, 0)[None, :]  # the only rank is k
    else:
        lane = tl.arange(0, RANKS)
        place = tl.full((RANKS,), -1, tl.int32)
        for m in tl.static_range(len(search.ranks)):
            place = tl.where(lane == m, search.ranks[m] - 1, place)
        if SHAPE.EXCLUDE_TARGET:
            place -= 1
        best = in_order(best, search.k, SHAPE.KEPT)
        chosen = tl.full((RANKS, N), NO_KEY, tl.int64)
        passed = tl.zeros((N,), tl.int32)  # entries that count
        for _ in range(0, search.k):
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
def search_row(scores, tensors, search, plan, n, SHAPE: tl.constexpr):
    """Searches row n for all samples, and writes its values and classes."""
    N: tl.constexpr = SHAPE.N
    M: tl.constexpr = SHAPE.M
    RANKS: tl.constexpr = SHAPE.RANKS
    LAYOUT: tl.constexpr = SHAPE.LAYOUT
    row = row_of(scores, n, LAYOUT.WIDTH)
    lists = lists_of(tensors.workspace, tl.program_id(0), LAYOUT)
    contenders, nan = contenders_of(row, search.k, plan, lists, SHAPE)
    excluded = tl.full((), -2, tl.int64)  # no class
    if SHAPE.EXCLUDE_TARGET:
        excluded = tl.load(tensors.target + n)
    n = tl.cast(n, tl.int64)
    lane = tl.arange(0, RANKS)
    sample = tl.arange(0, N)
    total = tl.zeros((RANKS,), tl.float32)
    for first_sample in range(0, search.n_sample, N):
        best, bad = draw(row, contenders, search, first_sample, SHAPE)
        nan = tl.maximum(nan, bad)
        if SHAPE.PLANNED:
            if (contenders.cut > float("-inf")) & (nan == 0):
                best = walk(best, row, contenders.cut, search, first_sample, SHAPE)
        keep = first_sample + sample < search.n_sample
        at = n * search.n_sample + first_sample + sample
        if SHAPE.CANDIDATES:
            store_in_order(best, tensors.out + at * search.k, tensors.classes + at * search.k, search.k, keep)
        else:
            chosen = at_ranks(best, search, excluded, SHAPE)
            to = tensors.classes + at[None, :] * M + lane[:, None]
            tl.store(to, class_of(chosen), mask=keep[None, :] & (lane < M)[:, None])
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


NUMBERS = ["n_rows", "first_row", "first_class", "n_sample", "k", "ignore_index", "stride", "rank", "wanted"]


@triton.jit(do_not_specialize=NUMBERS)
def search_kernel(
    scores,
    tensors,
    ranks,
    n_rows,
    first_row,
    first_class,
    n_sample,
    epsilon,
    k,
    ignore_index,
    stride,
    rank,
    wanted,
    SHAPE: tl.constexpr,
):
    """Searches rows of the scores. Numbers come one by one, because Triton recompiles for new ones in a tuple."""
    seed = tl.load(tensors.seed)
    if tensors.schedule is not None:
        epsilon = tl.load(tensors.schedule)
    epsilon = tl.cast(epsilon, tl.float32)
    for n in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        tl.debug_barrier()  # the row before has read its lists
        ignored = False
        if tensors.target is not None:
            ignored = tl.load(tensors.target + n) == ignore_index
        if ignored:
            fill(tensors.out + tl.cast(n, tl.int64) * SHAPE.M, SHAPE.M, 0.0)
            fill(tensors.classes + tl.cast(n, tl.int64) * n_sample * SHAPE.M, n_sample * SHAPE.M, -1)
        else:
            number = tl.cast(first_row + n, tl.uint32)
            search = Search(seed, number, first_class, n_sample, epsilon, k, ranks)
            search_row(scores, tensors, search, Plan(stride, rank, wanted), n, SHAPE)
