"""The classes at or below the cut of a row, in Triton: arrivals of one Poisson process a sample, at falling levels.

Rule: topk_fast/reference.py's ``_walk``. ``walk`` computes arrivals side by side, two from each call of ``philox``;
``follow`` takes them in order. Bytes: 32 for each arrival's score that is read.
"""

import triton
import triton.language as tl

from .bounds import time_bound
from .noise import arrival_class, arrival_time, gap, level_of, philox
from .order import NO_KEY, NO_SCORE, make_key, ordered, value_of
from .row import flat, load_scores


@triton.jit
def alternate(x, y):
    """Rows of x [M, N] and of y in turn: [2 M, N]."""
    return tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), (2 * x.shape[0], x.shape[1]))


@triton.jit
def follow(best, key, level, walking):
    """The serial part of the walk: arrivals with ``key`` and ``level`` [M, N] enter in order until none can any more.

    Returns the best, the samples that still walk, and whether a best has changed. A key below all others stands for an
    arrival that is skipped.
    """
    M: tl.constexpr = key.shape[0]
    lane = tl.arange(0, M)[:, None]
    behind = tl.full((key.shape[1],), -1, tl.int32)  # the last arrival that is dealt with
    stop = tl.zeros((key.shape[1],), tl.int32)
    more = 1
    rounds = 0
    while more > 0:
        worst = tl.min(best, 0)
        ahead = lane > behind[None, :]
        ends = ahead & (level <= (worst >> 32).to(tl.int32)[None, :])
        stop = tl.min(tl.where(ends, lane, M), 0)
        first = tl.min(tl.where(ahead & (key > worst[None, :]), lane, M), 0)
        acting = walking & (first < stop)
        more = tl.max(acting.to(tl.int32), 0)
        if more > 0:
            chosen = tl.max(tl.where(lane == first[None, :], key, NO_KEY), 0)
            same = ((best ^ chosen[None, :]) & 0xFFFFFFFE) == 0
            twice = tl.max((same & ((best >> 32) > NO_SCORE)).to(tl.int32), 0) > 0
            entering = acting & (twice == 0)
            best = tl.where((best == worst[None, :]) & entering[None, :], chosen[None, :], best)
            behind = tl.where(acting, first, behind)
            rounds += 1
    return best, walking & (stop == M), rounds > 0


@triton.jit
def walk(best, row, cut, search, first_sample, SHAPE: tl.constexpr):
    """The best of samples first_sample .. + N, which the arrivals have entered.

    An arrival that ``time_bound`` rules out ends the walk of its sample, and no score is read for it.
    """
    N: tl.constexpr = SHAPE.N
    PAIRS: tl.constexpr = SHAPE.ABREAST // 2
    sample = first_sample + tl.arange(0, N)
    walking = sample < search.n_sample
    stream = tl.full((1, 1), 1, tl.uint32) + tl.cast(search.first_class, tl.uint32)
    bound = time_bound(cut, value_of(tl.min(best, 0)), search.epsilon, SHAPE.LAW)
    sums = tl.zeros((N,), tl.int64)
    done = 0  # pairs of arrivals behind us
    going = 1
    while going > 0:
        pair = (done + tl.arange(0, PAIRS)).to(tl.uint32)[:, None]
        w0, w1, w2, w3 = philox(pair, search.number, sample.to(tl.uint32)[None, :], stream, search.seed)
        gap0 = gap(w0).to(tl.int64)
        both = gap0 + gap(w2).to(tl.int64)
        after = sums[None, :] + tl.cumsum(both, 0)
        time = arrival_time(alternate(after - both + gap0, after), row.n_classes)  # [ABREAST, N]
        near = time <= tl.where(walking, bound, -1.0)[None, :]
        walking = walking & (tl.max(near.to(tl.int32), 0) > 0)
        going = tl.max(walking.to(tl.int32), 0)
        if going > 0:
            class_id = alternate(arrival_class(w1, row.n_classes), arrival_class(w3, row.n_classes))
            clean = tl.reshape(load_scores(row, flat(class_id), flat(near), float("inf")), near.shape)
            shift = level_of(time, SHAPE.LAW) * search.epsilon
            value = clean + shift
            fits = (clean <= cut) & (value > float("-inf"))
            key = tl.where(fits, make_key(value, class_id + search.first_class), NO_KEY)
            best, walking, changed = follow(best, key, ordered(cut + shift), walking)
            going = tl.max(walking.to(tl.int32), 0)
            if changed:
                bound = time_bound(cut, value_of(tl.min(best, 0)), search.epsilon, SHAPE.LAW)
        sums += tl.sum(both, 0)
        done += PAIRS
    return best
