"""The contenders of a row, the classes above its cut, in Triton: one pass over its scores, which lists them in chunks.

A lane turns its vectors of a block into bits, one scan gives all lanes their places, and each lane then loops over its
bits. A chunk is what a list holds: a row with more contenders is collected further after they have been drawn. With
few long rows, several programs collect a row, 128 bytes of it in turn: where classes are sorted by their frequency, all
contenders may stand in a few KiB.
Bytes: the row once; lists of some M contenders, 8 bytes each, that stay in L1 and L2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cut import Plan, cut_of
from .row import load_scores, row_of, scores_of, widened

NO_ENTRY = tl.constexpr(-(1 << 63))  # below every entry
TURN = tl.constexpr(8)  # vectors that a part takes before the next part's turn


class Lists(NamedTuple):
    """A row's part of the workspace, in int64."""

    header: Any  # the bits of the cut, then the counts of the lists, -1 where a list is too short
    pilot: Any  # TILE entries, which are drawn first; the lists' entries follow
    survivors: Any  # before them, GROUPS int32 for the cut
    capacity: Any  # of a list
    space: Any  # of all of them


@triton.jit
def lists_of(workspace, number, slot, parts, capacity, SHAPE: tl.constexpr):
    """The lists of the slot of this number."""
    header = workspace + tl.cast(number, tl.int64) * slot
    pilot = header + SHAPE.HEADER
    space = parts * capacity
    return Lists(header, pilot, pilot + SHAPE.TILE + space, capacity, space)


@triton.jit
def contender_of(score, class_id):
    """A contender as an int64 in the order of its score."""
    b = score.to(tl.int32, bitcast=True)
    high = b ^ ((b >> 31) & 0x7FFFFFFF)
    return (high.to(tl.int64) << 32) | ((class_id.to(tl.int64) << 1) | 1)


@triton.jit
def opened(entry):
    """Score and class of a contender; NaN and 0 of NO_ENTRY."""
    high = (entry >> 32).to(tl.int32)
    score = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return score, ((entry & 0xFFFFFFFF) >> 1).to(tl.int32)


@triton.jit
def low_bits(n, WIDTH: tl.constexpr):
    """Words with the lowest n bits set, at least 0 and at most WIDTH of them."""
    return (1 << tl.minimum(tl.maximum(n, 0), WIDTH)) - 1


@triton.jit
def place_of(vector, parts, WIDTH: tl.constexpr):
    """The first place of a part's vectors, from its first one on."""
    return (vector // TURN * (TURN * parts) + vector % TURN) * WIDTH


@triton.jit
def hits_of(row, cut, start, parts, SHAPE: tl.constexpr):
    """Bits of the places of a part's block from ``start`` on that are above the cut or NaN, 32 places of a lane a word.

    Bit u * WIDTH + i of word h * LANES + l is place i of vector (h * 32 / WIDTH + u) * LANES + l.
    """
    WIDTH: tl.constexpr = SHAPE.WIDTH
    LANES: tl.constexpr = SHAPE.LANES
    VECTORS: tl.constexpr = SHAPE.VECTORS
    EACH: tl.constexpr = 32 // WIDTH
    number = tl.arange(0, VECTORS)[:, None]
    vector = place_of(number * LANES + tl.arange(0, LANES)[None, :], parts, WIDTH)  # [VECTORS, LANES]
    i = tl.arange(0, WIDTH)[None, None, :]
    at = vector[:, :, None] + i
    left = row.n_classes + row.lead - start
    if SHAPE.ADJACENT:
        inside = vector[:, :, None] < left  # a whole vector lies in the same 16 bytes as one of its scores
    else:
        inside = at < left
    x = widened(tl.load(row.places + (start + at).to(tl.int64) * row.class_stride, mask=inside, other=0))
    hits = tl.sum(((x <= cut) == 0).to(tl.int32) << i, 2)
    if (start < row.lead) | (left < VECTORS * LANES * WIDTH * parts):
        hits &= low_bits(left - vector, WIDTH) & (low_bits(row.lead - start - vector, WIDTH) ^ -1)
    words = (hits << (number % EACH * WIDTH)).to(tl.uint32)
    return tl.reshape(tl.sum(tl.reshape(words, (VECTORS // EACH, EACH, LANES)), 1), (VECTORS // EACH * LANES,))


@triton.jit
def bit_count(x):
    """The number of bits set in uint32 words, as int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def collect(row, cut, entries, capacity, start, skip, parts, SHAPE: tl.constexpr):
    """Lists up to ``capacity`` contenders of the row, or of one of its parts, from a block's ``start`` on.

    The first ``skip`` contenders of this block are passed over. Returns how many are listed, and where to go on.
    """
    WIDTH: tl.constexpr = SHAPE.WIDTH
    LANES: tl.constexpr = SHAPE.LANES
    word = tl.arange(0, SHAPE.VECTORS * WIDTH // 32 * LANES)
    first = word // LANES * (32 // WIDTH) * LANES + word % LANES  # the vector of a word's bit 0
    end = row.n_classes + row.lead
    start = tl.cast(start, tl.int32)
    skip = tl.cast(skip, tl.int32)
    count = 0
    while (start < end) & (count < capacity):
        words = hits_of(row, cut, start, parts, SHAPE)
        each = bit_count(words)
        total = tl.sum(each, 0)
        to = tl.cumsum(each, 0) - each + (count - skip)
        for _ in range(0, tl.max(each, 0)):
            rest = words & (words - 1)
            bit = (words ^ rest).to(tl.float32).to(tl.int32, bitcast=True)
            bit = tl.maximum((bit >> 23) - 127, 0)  # its number
            place = start + place_of(first + bit // WIDTH * LANES, parts, WIDTH) + bit % WIDTH
            kept = (words != 0) & (to >= count) & (to < capacity)
            score = widened(tl.load(row.places + place.to(tl.int64) * row.class_stride, mask=kept, other=0))
            tl.store(entries + to, contender_of(score, place - row.lead), mask=kept)
            to += 1
            words = rest
        taken = tl.minimum(total - skip, capacity - count)
        count += taken
        skip += taken
        if skip == total:
            start += SHAPE.VECTORS * LANES * WIDTH * parts
            skip = 0
    return count, start, skip


@triton.jit
def finite_are_fewer(row, wanted):
    """Whether fewer than ``wanted`` scores of the row are above -inf."""
    finite = 0
    start = 0
    while (start < row.n_classes) & (finite < wanted):
        at = tl.arange(0, 256)
        x = load_scores(row, start + at, at < row.n_classes - start, float("-inf"))
        finite += tl.sum((x > float("-inf")).to(tl.int32), 0)
        start += 256
    return finite < wanted


@triton.jit(do_not_specialize=range(2, 12), do_not_specialize_on_alignment=[1])
def collect_kernel(
    scores,
    workspace,
    offset: tl.int64,
    row_stride: tl.int64,
    class_stride: tl.int64,
    n_classes: tl.int32,
    group: tl.int32,
    stride: tl.int32,
    rank: tl.int32,
    parts: tl.int32,
    capacity: tl.int32,
    slot: tl.int32,
    SHAPE: tl.constexpr,
):
    """Collects one of ``parts`` parts of a row, each in a program of its own."""
    n = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    row = row_of(scores_of(scores, offset, row_stride, class_stride, n_classes, SHAPE), n, SHAPE)
    lists = lists_of(workspace, n, slot, parts, capacity, SHAPE)
    # The parts of a row write the same maxima there, and nothing else.
    cut = cut_of(row, Plan(group, stride, rank, 0), lists.survivors, SHAPE)
    entries = lists.pilot + SHAPE.TILE + part * lists.capacity
    count, start, _ = collect(row, cut, entries, capacity, part * (TURN * SHAPE.WIDTH), 0, parts, SHAPE)
    whole = start >= row.n_classes + row.lead
    tl.store(lists.header + 1 + part, tl.where(whole, count, -1).to(tl.int64))
    tl.store(lists.header, cut.to(tl.int32, bitcast=True).to(tl.int64))
