"""The order of scores and of (value, class) as integers.

A key is an int64 that orders noised scores as the contract does, value descending, then class ascending:
``ordered(value) << 32 | (2**31 - 1 - class) << 1 | is minus zero``. The last bit keeps the value whole, for -0 equals
+0 in ``ordered``.
"""

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(1 << 63))  # below everything
NO_SCORE = tl.constexpr(-2139095041)  # ordered(-inf)
MAX32 = tl.constexpr(0x7FFFFFFF)


@triton.jit
def ordered(x):
    """An int32 in the order of the float32 x; -0 equals +0."""
    b = (x + 0.0).to(tl.int32, bitcast=True)
    return b ^ ((b >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(o):
    """The float32 that ``ordered`` made o of, +0 for both zeros."""
    return (o ^ ((o >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def make_key(value, class_id):
    minus_zero = value.to(tl.int32, bitcast=True) == -0x80000000
    low = ((0x7FFFFFFF - class_id).to(tl.uint32) << 1) | minus_zero.to(tl.uint32)
    return (ordered(value).to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def value_of(key):
    """-inf for an empty place."""
    high = (key >> 32).to(tl.int32)
    bits = high ^ ((high >> 31) & 0x7FFFFFFF)
    sign = (high == 0).to(tl.int32) & key.to(tl.int32)  # set for -0, which Triton takes for 0 as a literal
    return (bits ^ (sign << 31)).to(tl.float32, bitcast=True)


@triton.jit
def class_of(key):
    """-1 for an empty place."""
    class_id = 0x7FFFFFFF - ((key & 0xFFFFFFFF) >> 1)
    return tl.where((key >> 32) == NO_SCORE, -1, class_id)
