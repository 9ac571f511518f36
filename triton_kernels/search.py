"""The k best of s + epsilon * Z for every row and sample of a row, in Triton, and the losses made of them.

Formula and sampler: topk_fast/reference.py; draws: noise.py; order: order.py. A program takes a row at a time:
``cut_of`` finds the cut from some groups of classes, ``collect`` streams the row and packs the classes above the cut,
``draw`` gives them noise and keeps the k best of each sample, ``walk`` lets the others come as arrivals, and the
kernel ends with the mean, the hinge and the class ids. Rows longer than there are rows to share out are collected by
several programs first, in a launch of their own.
Fused: noise lives in registers; a draw costs one comparison of its word, and a normal only where that passes.
Bytes: the row once, 1/stride of it twice, 32 for each arrival's score; lists stay in L1 and L2.
Bits: every rounding is noise.py's or written here; what ``word_bound`` drops could not have entered.
"""

import triton
import triton.language as tl

from .contenders import areas, begin, collect, cut_of, finite_are_fewer, load_scores, pack
from .noise import arrival_class, arrival_time, exp_minus, gap, hazard_quantile, normal, philox
from .order import MAX32, NO_KEY, NO_SCORE, class_of, empty_bags, enter, make_key, ordered, unordered, value_of

# What a launch makes: all k values and classes; the mean of the k-th values, and their classes; its hinge.
CANDIDATES = tl.constexpr(0)
SMOOTHED = tl.constexpr(1)
LOSS = tl.constexpr(2)


@triton.jit
def certain_below(score, reach, epsilon):
    """An x such that score + epsilon * z is below ``reach`` for every draw z < x; see csrc/bounds.h, also of the rest."""
    x = tl.div_rn((reach - score) - (tl.abs(reach) + tl.abs(score)) * 4e-7, epsilon)
    return x - (tl.abs(x) * 4e-6 + 2e-5)


@triton.jit
def upper_tail(x):
    """A bound on 1 - Phi(x) for x >= 0: phi(x) * 2 / (x + sqrt(x^2 + 8 / pi)) (Pollak 1956), as of 7.5 beyond that."""
    x = tl.minimum(x, 7.5)
    return tl.div_rn(exp_minus(x * x * 0.5) * 0.79796, x + tl.sqrt_rn(x * x + 2.5464790894703255))


@triton.jit
def word_bound(score, reach, epsilon):
    """A bound on ``word >> 8`` beyond which score + epsilon * normal(word) is certainly below ``reach``."""
    x = certain_below(score, reach, epsilon)
    bound = tl.where(x > 0.0, (upper_tail(tl.where(x > 0.0, x, 0.0)) * 16777216.0 + 2.0).to(tl.int32), MAX32)
    return tl.where((epsilon == 0.0) & (score < reach), -1, bound)


@triton.jit
def time_bound(cut, reach, epsilon):
    """A bound on an arrival's time beyond which cut + epsilon * level is certainly below ``reach``."""
    x = certain_below(cut, reach, epsilon)
    q = upper_tail(tl.where(x > 0.0, x, 0.0))
    bound = tl.where(x > 0.0, (q + q * q) * 1.00001, float("inf"))
    return tl.where((epsilon == 0.0) & (cut < reach), 0.0, bound)


@triton.jit
def fetch(row, class_stride, packed, place, direct, mask):
    """Score and class of the contenders at ``place``: of the packed list, or, where that is not used, of the row."""
    if direct:
        score = load_scores(row + place.to(tl.int64) * class_stride, mask, float("-inf"))
        class_id = place
    else:
        both = tl.load(packed + place, mask=mask, other=0)
        score = tl.where(mask, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True), float("-inf"))
        class_id = both.to(tl.int32)
    return score, class_id


@triton.jit
def by_sample(x0, x1, x2, x3):
    """Four [M, Q] tensors, of samples 4q, 4q + 1, 4q + 2, 4q + 3, as one [M, 4 Q]."""
    x = tl.join(tl.join(x0, x1), tl.join(x2, x3))  # [M, Q, 2, 2]
    return tl.reshape(tl.permute(x, (0, 1, 3, 2)), (x0.shape[0], 4 * x0.shape[1]))


@triton.jit
def absorb(bags, row, class_stride, packed, survivors, counts, direct, first_class, epsilon, N: tl.constexpr,
           CHUNK: tl.constexpr):  # fmt: skip
    """Normals for the words that survived, ``counts`` [N] of them, and the best noised scores into the bags."""
    tl.debug_barrier()
    for start in range(0, tl.max(counts, 0), CHUNK):
        i = start + tl.arange(0, CHUNK)[:, None]
        mask = i < counts[None, :]
        both = tl.load(survivors + i * N + tl.arange(0, N)[None, :], mask=mask, other=0)
        score, class_id = fetch(row, class_stride, packed, both.to(tl.int32), direct, mask)
        value = score + normal((both >> 32).to(tl.uint32)) * epsilon
        bags = enter(bags, tl.where(value > float("-inf"), make_key(value, class_id + first_class), NO_KEY))
    tl.debug_barrier()
    return bags


@triton.jit
def draw(
    row, class_stride, packed, sizes, n_parts, direct, n_classes, cut, number, seed, first_sample, n_sample,
    first_class, k, epsilon, survivors, N: tl.constexpr, KEPT: tl.constexpr, TILE: tl.constexpr, HELD: tl.constexpr,
    CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The k best of the contenders' noised scores for samples first_sample .. + N, and whether a score is NaN.

    A word gets its normal only where it passes a bound that follows from ``reach``, which all samples' k-th best
    attain: -inf for the first tile, then more and more. Those that pass wait in ``survivors`` [HELD, N].
    """
    quad = tl.arange(0, N // 4)
    place_of = 4 * quad[None, :]
    valid0 = first_sample + 4 * quad < n_sample
    valid1 = first_sample + 4 * quad + 1 < n_sample
    valid2 = first_sample + 4 * quad + 2 < n_sample
    valid3 = first_sample + 4 * quad + 3 < n_sample
    count0 = tl.zeros((N // 4,), tl.int32)
    count1 = count0
    count2 = count0
    count3 = count0
    bags = empty_bags(k, KEPT, N)
    reach = float("-inf")
    nan = 0
    part = 0
    start = 0
    fresh = 1  # no bag holds anything yet
    while part < n_parts:
        end = n_classes
        if direct == 0:
            end = tl.load(sizes + part).to(tl.int32)
        lane = tl.arange(0, TILE)
        here = lane < end - start
        place = part * CAPACITY + start + lane
        score, class_id = fetch(row, class_stride, packed, place, direct, here)
        nan = tl.maximum(nan, tl.max((score != score).to(tl.int32), 0))
        bound = tl.where(here & (score > cut), word_bound(score, reach, epsilon), -1)[:, None]
        w0, w1, w2, w3 = philox(
            (class_id + first_class).to(tl.uint32)[:, None], number, (first_sample // 4 + quad).to(tl.uint32)[None, :],
            tl.zeros((1, 1), tl.uint32), seed,
        )  # fmt: skip
        pass0 = valid0[None, :] & ((w0 >> 8).to(tl.int32) <= bound)
        pass1 = valid1[None, :] & ((w1 >> 8).to(tl.int32) <= bound)
        pass2 = valid2[None, :] & ((w2 >> 8).to(tl.int32) <= bound)
        pass3 = valid3[None, :] & ((w3 >> 8).to(tl.int32) <= bound)
        # Counts to TILE fit into bytes: one scan serves four samples.
        flags = pass0.to(tl.uint32) | (pass1.to(tl.uint32) << 8) | (pass2.to(tl.uint32) << 16)
        flags = flags | (pass3.to(tl.uint32) << 24)
        before = tl.cumsum(flags, 0) - flags
        slot0 = (before & 255).to(tl.int32) + count0[None, :]
        slot1 = ((before >> 8) & 255).to(tl.int32) + count1[None, :]
        slot2 = ((before >> 16) & 255).to(tl.int32) + count2[None, :]
        slot3 = (before >> 24).to(tl.int32) + count3[None, :]
        tl.store(survivors + slot0 * N + place_of, pack(w0, place[:, None]), mask=pass0)
        tl.store(survivors + slot1 * N + place_of + 1, pack(w1, place[:, None]), mask=pass1)
        tl.store(survivors + slot2 * N + place_of + 2, pack(w2, place[:, None]), mask=pass2)
        tl.store(survivors + slot3 * N + place_of + 3, pack(w3, place[:, None]), mask=pass3)
        passed = tl.sum(flags, 0)
        count0 += (passed & 255).to(tl.int32)
        count1 += ((passed >> 8) & 255).to(tl.int32)
        count2 += ((passed >> 16) & 255).to(tl.int32)
        count3 += (passed >> 24).to(tl.int32)
        start += TILE
        if start >= end:
            part += 1
            start = 0
        most = tl.max(tl.maximum(tl.maximum(count0, count1), tl.maximum(count2, count3)), 0)
        if (fresh == 1) | (part >= n_parts) | (most > HELD - TILE):
            counts = by_sample(count0[None, :], count1[None, :], count2[None, :], count3[None, :])
            bags = absorb(
                bags, row, class_stride, packed, survivors, tl.reshape(counts, (N,)), direct, first_class, epsilon, N, CHUNK,
            )  # fmt: skip
            worst = (tl.min(bags, 0) >> 32).to(tl.int32)
            worst = tl.where(first_sample + tl.arange(0, N) < n_sample, worst, MAX32)
            reach = unordered(tl.min(worst, 0))
            fresh = 0
            count0 = tl.zeros((N // 4,), tl.int32)
            count1 = count0
            count2 = count0
            count3 = count0
    return bags, nan


@triton.jit
def alternate(x, y):
    """Rows of x [M, N] and of y in turn: [2 M, N]."""
    return tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), (2 * x.shape[0], x.shape[1]))


@triton.jit
def walk(bags, row, class_stride, n_classes, cut, number, seed, first_sample, n_sample, first_class, epsilon,
         N: tl.constexpr, ARRIVALS: tl.constexpr):  # fmt: skip
    """The classes at or below the cut into the bags: arrivals at falling levels, until none can enter any more.

    Scores of those that ``time_bound`` rules out are not read; they end the walk of their sample.
    """
    sample = first_sample + tl.arange(0, N)
    walking = sample < n_sample
    lane = tl.arange(0, ARRIVALS)[:, None]
    stream = tl.full((1, 1), 1, tl.uint32) + tl.cast(first_class, tl.uint32)
    sums = tl.zeros((N,), tl.int64)
    done = 0  # pairs of arrivals behind us
    going = 1
    while going > 0:
        pair = (done + tl.arange(0, ARRIVALS // 2)).to(tl.uint32)[:, None]
        w0, w1, w2, w3 = philox(pair, number, sample.to(tl.uint32)[None, :], stream, seed)
        gap0 = gap(w0).to(tl.int64)
        both = gap0 + gap(w2).to(tl.int64)
        after = sums[None, :] + tl.cumsum(both, 0)
        time = arrival_time(alternate(after - both + gap0, after), n_classes)  # [ARRIVALS, N]
        drawn = alternate(arrival_class(w1, n_classes), arrival_class(w3, n_classes))
        until = tl.where(walking, time_bound(cut, value_of(tl.min(bags, 0)), epsilon), -1.0)
        place = row + drawn.to(tl.int64) * class_stride
        clean = load_scores(place, time <= until[None, :], float("inf"))
        shift = hazard_quantile(time) * epsilon
        level = ordered(cut + shift)
        value = clean + shift
        fits = (clean <= cut) & (value > float("-inf"))
        key = tl.where(fits, make_key(value, drawn + first_class), NO_KEY)
        behind = tl.full((N,), -1, tl.int32)  # the last arrival that is dealt with
        stop = tl.zeros((N,), tl.int32)
        more = 1
        while more > 0:
            worst = tl.min(bags, 0)
            ahead = lane > behind[None, :]
            ends = ahead & (level <= (worst >> 32).to(tl.int32)[None, :])
            stop = tl.min(tl.where(ends, lane, ARRIVALS), 0)
            first = tl.min(tl.where(ahead & (key > worst[None, :]), lane, ARRIVALS), 0)
            acting = walking & (first < stop)
            chosen = tl.max(tl.where(lane == first[None, :], key, NO_KEY), 0)
            same = ((bags ^ chosen[None, :]) & 0xFFFFFFFE) == 0
            twice = tl.max((same & ((bags >> 32) > NO_SCORE)).to(tl.int32), 0) > 0
            entering = acting & (twice == 0)
            bags = tl.where((bags == worst[None, :]) & entering[None, :], chosen[None, :], bags)
            behind = tl.where(acting, first, behind)
            more = tl.max(acting.to(tl.int32), 0)
        walking = walking & (stop == ARRIVALS)
        going = tl.max(walking.to(tl.int32), 0)
        sums += tl.sum(both, 0)
        done += ARRIVALS // 2
    return bags


@triton.jit
def search_row(
    scores, values, classes, workspace, workspace_stride, slot, n, seed, row_stride, class_stride,
    n_classes, first_row, first_class, k, n_sample, epsilon, inverse, rank, stride, looked_at, wanted,
    MODE: tl.constexpr, PLANNED: tl.constexpr, COLLECTED: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr,
    HELD: tl.constexpr, CHUNK: tl.constexpr, ARRIVALS: tl.constexpr, N: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Row n, all samples: writes classes (and, for candidates, values); returns the smoothed value."""
    row, lead = begin(scores, n, row_stride, class_stride, WIDTH)
    header, packed, groups, survivors = areas(workspace, slot, workspace_stride, PARTS, CAPACITY, BLOCK // WIDTH)
    start = row + lead
    number = tl.cast(first_row + n, tl.uint32)
    cut = float("-inf")
    direct = 1
    nan = 0
    if PLANNED:
        if COLLECTED:
            cut = tl.load(header + PARTS).to(tl.int32).to(tl.float32, bitcast=True)
        else:
            cut = cut_of(start, class_stride, n_classes, rank, stride, looked_at, GROUP, GROUPS)
            count = collect(row, class_stride, lead, 0, n_classes + lead, cut, packed, groups, BLOCK, WIDTH, CAPACITY)
            tl.store(header, count.to(tl.int64))
            tl.debug_barrier()
        part = tl.arange(0, PARTS)
        count = tl.load(header + part)
        nan = (tl.min(count, 0) < 0).to(tl.int32)
        direct = ((tl.max(count, 0) > CAPACITY) | (cut == float("-inf"))).to(tl.int32)
        if (nan == 0) & (tl.sum(count, 0) < k):
            if finite_are_fewer(start, class_stride, n_classes, wanted, BLOCK):
                cut = float("-inf")
                direct = 1
    n_parts = PARTS * (1 - nan)
    if direct == 1:
        n_parts = 1 - nan
    total = 0.0
    for first_sample in range(0, n_sample, N):
        bags, bad = draw(
            start, class_stride, packed, header, n_parts, direct, n_classes, cut, number, seed, first_sample, n_sample,
            first_class, k, epsilon, survivors, N, KEPT, TILE, HELD, CAPACITY, CHUNK,
        )  # fmt: skip
        nan = tl.maximum(nan, bad)
        if (cut > float("-inf")) & (nan == 0):
            bags = walk(bags, start, class_stride, n_classes, cut, number, seed, first_sample, n_sample, first_class,
                        epsilon, N, ARRIVALS)  # fmt: skip
        sample = tl.arange(0, N)
        mask = first_sample + sample < n_sample
        to = tl.cast(n, tl.int64) * n_sample + first_sample + sample
        if MODE == CANDIDATES:
            bags = tl.where(tl.arange(0, KEPT)[:, None] < k, bags, NO_KEY)
            for i in range(0, k):
                best = tl.max(bags, 0)
                bags = tl.where(bags == best[None, :], NO_KEY, bags)
                tl.store(values + to * k + i, tl.where(nan == 1, float("nan"), value_of(best)), mask=mask)
                tl.store(classes + to * k + i, tl.where(nan == 1, -1, class_of(best)), mask=mask)
        else:
            best = tl.min(bags, 0)
            tl.store(classes + to, tl.where(nan == 1, -1, class_of(best)), mask=mask)
            bits = value_of(best).to(tl.int32, bitcast=True)
            for b in range(0, tl.minimum(n_sample - first_sample, N)):  # in sample order, for the sum's bits
                value = tl.sum(tl.where(sample == b, bits, 0), 0).to(tl.float32, bitcast=True)
                total = tl.where(first_sample + b == 0, value, total + value)
    return tl.where(nan == 1, float("nan"), total * inverse)


@triton.jit(do_not_specialize=["n_rows", "first_row", "first_class", "k", "n_sample", "rank", "stride", "looked_at",
                               "wanted", "ignore_index", "workspace_stride"])  # fmt: skip
def search_kernel(
    scores, target, margins, seed, values, classes, n_valid, workspace, workspace_stride, n_rows, row_stride,
    class_stride, n_classes, first_row, first_class, k, n_sample, epsilon, inverse, scale, ignore_index, rank, stride,
    looked_at, wanted,
    MODE: tl.constexpr, PLANNED: tl.constexpr, COLLECTED: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr,
    HELD: tl.constexpr, CHUNK: tl.constexpr, ARRIVALS: tl.constexpr, N: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    seed = tl.load(seed)
    if MODE == LOSS:
        if tl.program_id(0) == 0:
            count = tl.zeros((), tl.int64)
            for start in range(0, n_rows, 1024):
                at = tl.cast(start, tl.int64) + tl.arange(0, 1024)
                labels = tl.load(target + at, mask=at < n_rows, other=ignore_index)
                count += tl.sum((labels != ignore_index).to(tl.int64), 0)
            tl.store(n_valid, count.to(tl.float32))
    for n in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        tl.debug_barrier()  # the row before has read its lists
        y = tl.zeros((), tl.int64)
        ignored = False
        if MODE == LOSS:
            y = tl.load(target + n)
            ignored = y == ignore_index
        if ignored:
            tl.store(values + n, 0.0)
            for b in range(0, n_sample):
                tl.store(classes + tl.cast(n, tl.int64) * n_sample + b, -1)
        else:
            top = search_row(
                scores, values, classes, workspace, workspace_stride, tl.program_id(0), n, seed, row_stride,
                class_stride, n_classes, first_row, first_class, k, n_sample, epsilon, inverse, rank, stride,
                looked_at, wanted, MODE, PLANNED, COLLECTED, PARTS, GROUP, GROUPS, BLOCK, WIDTH, CAPACITY, TILE, HELD,
                CHUNK, ARRIVALS, N, KEPT,
            )  # fmt: skip
            if MODE == SMOOTHED:
                tl.store(values + n, top)
            if MODE == LOSS:
                known = (y >= 0) & (y < n_classes)
                tl.device_assert(known, "topk_fast: target out of bounds")
                place = scores + tl.cast(n, tl.int64) * row_stride + y * class_stride
                true_score = load_scores(place, known, float("nan"))
                margin = 1.0
                if margins is not None:
                    margin = tl.load(margins + y, mask=known, other=float("nan"))
                excess = ((margin + top) - true_score) * scale
                tl.store(values + n, tl.where(excess <= 0.0, 0.0, excess))
