"""A row of the scores in Triton, and loads from it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Scores(NamedTuple):
    """The scores of a call."""

    data: Any  # bfloat16 as int16
    offset: Any  # where row 0 begins
    row_stride: Any
    class_stride: Any  # the number 1 where classes are adjacent
    n_classes: Any


class Row(NamedTuple):
    """A row of the scores. Place p of it holds class p - lead, so that places from 0 on are aligned vectors."""

    places: Any
    lead: Any
    class_stride: Any
    n_classes: Any


@triton.jit
def scores_of(data, offset, row_stride, class_stride, n_classes, SHAPE: tl.constexpr):
    """The scores as kernels read them: int16 stands for bfloat16, of which Triton's interpreter loses subnormals."""
    if data.dtype.element_ty == tl.bfloat16:
        data = data.to(tl.pointer_type(tl.int16), bitcast=True)
    if SHAPE.ADJACENT:
        scores = Scores(data, offset, row_stride, 1, n_classes)
    else:
        scores = Scores(data, offset, row_stride, class_stride, n_classes)
    return scores


@triton.jit
def row_of(scores, n, SHAPE: tl.constexpr):
    """Row n; its places begin at a multiple of WIDTH where classes are adjacent."""
    start = scores.offset + tl.cast(n, tl.int64) * scores.row_stride
    whole = start
    if SHAPE.ADJACENT:
        whole = start // SHAPE.WIDTH * SHAPE.WIDTH
    lead = (start - whole).to(tl.int32)
    return Row(scores.data + whole, lead, scores.class_stride, scores.n_classes)


@triton.jit
def widened(x):
    """Loaded scores as float32, exactly."""
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def flat(x):
    """A tensor of places, masks or values as a vector, for loads and stores at unrelated places.

    Triton would put the first dimension of such places, the contenders of a sample, across the lanes. The vector's
    layout puts the last one there, so that most of a maximum over the first is taken inside a lane: a search had half
    the instructions.
    """
    return tl.reshape(x, (x.numel,))


@triton.jit
def load_scores(row, class_id, mask, fill):
    """Scores of classes as float32, ``fill`` where ``mask`` is not set."""
    place = row.places + (tl.cast(class_id, tl.int64) + row.lead) * row.class_stride
    return tl.where(mask, widened(tl.load(place, mask=mask, other=0)), fill)
