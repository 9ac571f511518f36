"""Noise for the contenders of a row, in Triton: one word a draw, and a value only for the words that survive a bound.

Draws: noise.py. ``reach`` is a value that the k-th best of every sample attains: -inf for the first tile, then more and
more. A word that ``word_bound`` rules out cannot enter a Best; survivors wait in memory until ``absorb`` takes them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .bounds import word_bound
from .contenders import load_scores, pack
from .noise import draw_of, philox
from .order import MAX32, NO_KEY, empty_best, enter, make_key, unordered


class Search(NamedTuple):
    """The search of a row: its noise and its ranks."""

    seed: Any
    number: Any  # the row's, in the call
    first_class: Any
    n_sample: Any
    epsilon: Any
    k: Any
    ranks: Any  # none where k is the only one


class Contenders(NamedTuple):
    """The classes above the cut: every class of the row where it is ``direct``, else those of the lists."""

    lists: Any
    cut: Any
    direct: Any
    n_parts: Any


@triton.jit
def fetch(row, contenders, place, mask):
    """Score and class of the contenders at ``place``: of the packed list, or, where that is not used, of the row."""
    if contenders.direct:
        score = load_scores(row, place, mask, float("-inf"))
        class_id = place
    else:
        both = tl.load(contenders.lists.packed + place, mask=mask, other=0)
        score = tl.where(mask, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True), float("-inf"))
        class_id = both.to(tl.int32)
    return score, class_id


@triton.jit
def absorb(best, row, contenders, search, counts, SHAPE: tl.constexpr):
    """Draws of the survivors, ``counts`` [N // 4] of them with a byte a sample; the best noised scores enter."""
    N: tl.constexpr = SHAPE.N
    byte = tl.arange(0, 4) * 8
    counts = tl.reshape((counts[:, None] >> byte[None, :].to(tl.uint32)) & 255, (N,)).to(tl.int32)
    tl.debug_barrier()
    for start in range(0, tl.max(counts, 0), SHAPE.CHUNK):
        i = start + tl.arange(0, SHAPE.CHUNK)[:, None]
        mask = i < counts[None, :]
        both = tl.load(contenders.lists.survivors + i * N + tl.arange(0, N)[None, :], mask=mask, other=0)
        score, class_id = fetch(row, contenders, both.to(tl.int32), mask)
        value = score + draw_of((both >> 32).to(tl.uint32), SHAPE.LAW) * search.epsilon
        key = make_key(value, class_id + search.first_class)
        best = enter(best, tl.where(value > float("-inf"), key, NO_KEY))
    tl.debug_barrier()
    return best


@triton.jit
def draw(row, contenders, search, first_sample, SHAPE: tl.constexpr):
    """The k best of the contenders' noised scores for samples first_sample .. + N, and whether a score is NaN."""
    N: tl.constexpr = SHAPE.N
    TILE: tl.constexpr = SHAPE.TILE
    quad = tl.arange(0, N // 4)
    lane = tl.arange(0, TILE)
    sample = first_sample + tl.arange(0, N)
    counts = tl.zeros((N // 4,), tl.uint32)  # of the survivors, a byte a sample
    best = empty_best(search.k, SHAPE.KEPT, N)
    reach = float("-inf")
    nan = 0
    part = 0
    start = 0
    fresh = 1  # no Best holds anything yet
    while part < contenders.n_parts:
        end = row.n_classes
        if contenders.direct == 0:
            end = tl.load(contenders.lists.header + part).to(tl.int32)
        here = lane < end - start
        place = part * SHAPE.LAYOUT.CAPACITY + start + lane
        score, class_id = fetch(row, contenders, place, here)
        nan = tl.maximum(nan, tl.max((score != score).to(tl.int32), 0))
        bound = word_bound(score, reach, search.epsilon, SHAPE.LAW)
        bound = tl.where(here & (score > contenders.cut), bound, -1)[:, None]
        words = philox(
            (class_id + search.first_class).to(tl.uint32)[:, None],
            search.number,
            (first_sample // 4 + quad).to(tl.uint32)[None, :],
            tl.zeros((1, 1), tl.uint32),
            search.seed,
        )
        flags = tl.zeros((TILE, N // 4), tl.uint32)
        for j in tl.static_range(4):
            valid = (first_sample + 4 * quad + j < search.n_sample)[None, :]
            flags |= (valid & ((words[j] >> 8).to(tl.int32) <= bound)).to(tl.uint32) << (8 * j)
        slots = tl.cumsum(flags, 0) - flags + counts[None, :]  # no byte exceeds HELD: one scan serves four samples
        for j in tl.static_range(4):
            to = contenders.lists.survivors + ((slots >> (8 * j)) & 255).to(tl.int32) * N + 4 * quad[None, :] + j
            tl.store(to, pack(words[j], place[:, None]), mask=((flags >> (8 * j)) & 1) == 1)
        counts += tl.sum(flags, 0)
        most = tl.max(counts >> 24, 0)
        for j in tl.static_range(3):
            most = tl.maximum(most, tl.max((counts >> (8 * j)) & 255, 0))
        start += TILE
        if start >= end:
            part += 1
            start = 0
        if (fresh == 1) | (part >= contenders.n_parts) | (most.to(tl.int32) > SHAPE.HELD - TILE):
            best = absorb(best, row, contenders, search, counts, SHAPE)
            worst = (tl.min(best, 0) >> 32).to(tl.int32)
            reach = unordered(tl.min(tl.where(sample < search.n_sample, worst, MAX32), 0))
            fresh = 0
            counts = tl.zeros((N // 4,), tl.uint32)
    return best, nan
