"""Noise for the contenders of a row, in Triton: one word a draw, and a value only for the words that survive a bound.

Draws: noise.py. ``reach`` is a value that the k-th best of every sample attains. A pilot of high-scoring contenders is
drawn first, and sets it so high that few words survive; survivors wait in memory until ``absorb`` takes them. A word
that ``word_bound`` rules out cannot enter a Best.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .best import enter
from .bounds import word_bound
from .collect import NO_ENTRY, opened
from .noise import draw_of, philox
from .order import MAX32, NO_KEY, make_key, unordered
from .row import flat


class Search(NamedTuple):
    """The search of a row: its noise and its ranks."""

    seed: Any
    number: Any  # the row's, in the call
    first_class: Any
    n_sample: Any
    epsilon: Any
    k: Any


@triton.jit
def pilot_of(lists, n_lists, TILE: tl.constexpr):
    """The contender with the highest score at each of TILE lanes of the lists: int64 [TILE]."""
    top = tl.full((TILE,), NO_ENTRY, tl.int64)
    at = tl.arange(0, 8)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    for part in range(0, n_lists):
        count = tl.load(lists.header + 1 + part).to(tl.int32)
        entries = lists.pilot + TILE + part * lists.capacity
        for start in range(0, count, 8 * TILE):
            found = tl.load(entries + start + at, mask=at < count - start, other=NO_ENTRY)
            top = tl.maximum(top, tl.max(found, 0))
    return top


@triton.jit
def absorb(best, lists, search, counts, SHAPE: tl.constexpr):
    """Draws of the survivors, ``counts`` [N // 4] of them with a byte a sample; the best noised scores enter."""
    N: tl.constexpr = SHAPE.N
    byte = tl.arange(0, 4) * 8
    counts = tl.reshape((counts[:, None] >> byte[None, :].to(tl.uint32)) & 255, (N,)).to(tl.int32)
    tl.debug_barrier()
    for start in range(0, tl.max(counts, 0), SHAPE.ABREAST):
        i = start + tl.arange(0, SHAPE.ABREAST)[:, None]
        mask = i < counts[None, :]
        both = tl.load(lists.survivors + flat(i * N + tl.arange(0, N)[None, :]), mask=flat(mask), other=0)
        entry = tl.load(lists.pilot + both.to(tl.int32), mask=flat(mask), other=NO_ENTRY)
        both = tl.reshape(both, mask.shape)
        score, class_id = opened(tl.reshape(entry, mask.shape))
        value = score + draw_of((both >> 32).to(tl.uint32), SHAPE.LAW) * search.epsilon
        key = make_key(value, class_id + search.first_class)
        best = enter(best, tl.where(mask & (value > float("-inf")), key, NO_KEY))
    tl.debug_barrier()
    return best


@triton.jit
def reach_of(best, search, first_sample, N: tl.constexpr):
    """A value that the k-th best of every sample attains."""
    worst = (tl.min(best, 0) >> 32).to(tl.int32)
    return unordered(tl.min(tl.where(first_sample + tl.arange(0, N) < search.n_sample, worst, MAX32), 0))


@triton.jit
def draw(best, lists, n_lists, search, first_sample, SHAPE: tl.constexpr):
    """``best`` of samples first_sample .. + N, which the noised scores of the lists have entered.

    Returns whether a score is NaN, too.
    """
    N: tl.constexpr = SHAPE.N
    TILE: tl.constexpr = SHAPE.TILE
    quad = tl.arange(0, N // 4)
    lane = tl.arange(0, TILE)
    counts = tl.zeros((N // 4,), tl.uint32)  # of the survivors, a byte a sample
    pilot = pilot_of(lists, n_lists, TILE)
    tl.store(lists.pilot + lane, pilot)
    tl.debug_barrier()
    reach = reach_of(best, search, first_sample, N)
    nan = 0
    part = -1  # the pilot, then the lists without it
    first = 0
    start = 0
    end = TILE
    while part < n_lists:
        place = first + start + lane
        entry = tl.load(lists.pilot + place, mask=lane < end - start, other=NO_ENTRY)
        here = (entry != NO_ENTRY) & ((part < 0) | (entry != pilot))
        score, class_id = opened(entry)
        nan = tl.maximum(nan, tl.max((here & (score != score)).to(tl.int32), 0))
        bound = word_bound(score, reach, search.epsilon, SHAPE.LAW)
        bound = tl.where(here, bound, -1)[:, None]
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
            to = ((slots >> (8 * j)) & 255).to(tl.int32) * N + 4 * quad[None, :] + j
            both = (words[j].to(tl.int64) << 32) | place[:, None].to(tl.int64)
            tl.store(lists.survivors + flat(to), flat(both), mask=flat(((flags >> (8 * j)) & 1) == 1))
        counts += tl.sum(flags, 0)
        most = tl.max(counts >> 24, 0)
        for j in tl.static_range(3):
            most = tl.maximum(most, tl.max((counts >> (8 * j)) & 255, 0))
        full = (part < 0) | (most.to(tl.int32) > SHAPE.HELD - TILE)
        start += TILE
        if start >= end:
            part += 1
            start = 0
            first = TILE + part * lists.capacity
            end = tl.load(lists.header + 1 + part, mask=part < n_lists, other=0).to(tl.int32)
        if full | (part >= n_lists):
            best = absorb(best, lists, search, counts, SHAPE)
            reach = reach_of(best, search, first_sample, N)
            counts = tl.zeros((N // 4,), tl.uint32)
    return best, nan
