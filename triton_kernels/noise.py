"""The noise contract, version 2, in Triton: topk_fast/noise.py has its text, csrc/noise.h is the C++ form.

The functions are those of these two files, and tests/known_answers.json pins them. Bits are equal because each float32
operation is exactly rounded and done once, in the order written: launches set ``enable_fp_fusion=False`` (EXACT in
launch.py), divisions are ``tl.div_rn``, roots are ``tl.sqrt_rn``. Words are uint32 tensors.
"""

import math

import triton
import triton.language as tl

NORMAL = tl.constexpr(0)  # laws by their numbers in the ops
GUMBEL = tl.constexpr(1)


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Four words a counter: Philox4x32-10; counters are uint32 and broadcast, ``seed`` is one int64."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53  # one wide multiplication for both halves
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def twice_artanh(s):
    """ln((1 + s) / (1 - s)) for a small s, by its series."""
    t = s * s
    p = t * 0.11111111 + 0.14285715
    p = p * t + 0.2
    p = p * t + 0.33333334
    p = p * t + 1.0
    return (s * 2.0) * p


@triton.jit
def ln(x):
    """Natural logarithm of a positive normal float32."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    return e.to(tl.float32) * 0.69314718 + twice_artanh(s)


@triton.jit
def upper_quantile(p):
    """The z >= 0 with 1 - Phi(z) = p, for 0 < p <= 1/2."""
    y = -ln((p * 4.0) * (1.0 - p))
    a = y - 2.5
    central = a * 2.81022636e-08 + 3.43273939e-07
    central = central * a + -3.5233877e-06
    central = central * a + -4.39150654e-06
    central = central * a + 0.00021858087
    central = central * a + -0.00125372503
    central = central * a + -0.00417768164
    central = central * a + 0.246640727
    central = central * a + 1.50140941
    a = tl.sqrt_rn(tl.maximum(y, 0.0)) - 3.0  # y is negative only for p near 1/2, where the tail is not asked for
    tail = a * 2.11814277e-05 + -0.000247470773
    tail = tail * a + 0.00120883412
    tail = tail * a + -0.00327648851
    tail = tail * a + 0.00572421542
    tail = tail * a + -0.00776328519
    tail = tail * a + 0.00945140887
    tail = tail * a + 1.00168824
    tail = tail * a + 2.83297658
    r = tl.where(y < 5.0, central, tail)
    return (r * (1.0 - p * 2.0)) * 1.41421356


@triton.jit
def tail_of(word):
    """The smaller tail's probability, in (0, 1/2), and -1 where it is the lower one, else 0."""
    w = word.to(tl.int32, bitcast=True)
    s = w >> 31
    return ((w ^ s).to(tl.float32) + 0.5) * 2.3283064365386963e-10, s


@triton.jit
def normal(word):
    """A standard normal draw, falling as its word grows."""
    p, s = tail_of(word)
    z = upper_quantile(p).to(tl.int32, bitcast=True)
    return (z ^ (s << 31)).to(tl.float32, bitcast=True)


@triton.jit
def exp_minus(e):
    """exp(-e) for e >= 0, not below about 2**-126: a step of hazard_quantile."""
    f = tl.maximum(e * -1.44269504, -126.0)
    i = (f - 0.5).to(tl.int32)
    g = (f - i.to(tl.float32)) * 0.69314718
    x = g * 0.0013888889 + 0.0083333338
    x = x * g + 0.041666668
    x = x * g + 0.16666667
    x = x * g + 0.5
    x = x * g + 1.0
    x = x * g + 1.0
    return (x.to(tl.int32, bitcast=True) + (i << 23)).to(tl.float32, bitcast=True)


@triton.jit
def hazard_quantile(e):
    """The z with -ln Phi(z) = e, for e > 0: the level of the arrival at time e."""
    h = tl.minimum(e, 0.5)
    s = h * 0.0013888889 + -0.0083333338
    s = s * h + 0.041666668
    s = s * h + -0.16666667
    s = s * h + 0.5
    s = s * h + -1.0
    exp = exp_minus(e)
    p = tl.where(e < 0.5, -(s * h), 1.0 - exp)
    lower = p > 0.5
    z = upper_quantile(tl.maximum(tl.where(lower, exp, p), 1.1754943508222875e-38)).to(tl.int32, bitcast=True)
    return (z ^ (lower.to(tl.int32) << 31)).to(tl.float32, bitcast=True)  # Triton's -z is 0 - z


@triton.jit
def gumbel(word):
    """A draw from Gumbel's law less its mean, Euler's constant, falling as its word grows."""
    p, s = tail_of(word)
    return gumbel_level(tl.where(s < 0, -ln(p), twice_artanh(tl.div_rn(p, 2.0 - p))))  # -ln(1 - p) by the series


@triton.jit
def gumbel_level(e):
    """The z with -ln F(z) = e for Gumbel's law less its mean: the level of the arrival at time e."""
    return -ln(e) - 0.5772157


@triton.jit
def draw_of(word, LAW: tl.constexpr):
    """A law's draw that belongs to a word."""
    return gumbel(word) if LAW == GUMBEL else normal(word)


@triton.jit
def level_of(time, LAW: tl.constexpr):
    """A law's level that belongs to an arrival's time."""
    return gumbel_level(time) if LAW == GUMBEL else hazard_quantile(time)


@triton.jit
def gap(word):
    """An Exp(1) gap in units of 2**-24 (int32), at least 1: integers, so that sums are exact in any order."""
    u = ((word >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    return (-ln(u) * 16777216.0).to(tl.int32) + 1


@triton.jit
def arrival_time(gaps, n_classes):
    """Time of an arrival from the int64 sum of its gaps, for a process of rate ``n_classes``."""
    return (gaps.to(tl.float32) * 5.9604644775390625e-08) * tl.div_rn(1.0, tl.cast(n_classes, tl.float32))


@triton.jit
def arrival_class(word, n_classes):
    """Class of an arrival, from 0 on, of ``n_classes``."""
    return ((word.to(tl.uint64) * tl.cast(n_classes, tl.uint64)) >> 32).to(tl.int32)


def wanted_contenders(n_classes: int, k: int, law: int) -> int:
    """About how many classes :func:`plan` lets through."""
    balanced = math.isqrt(4 * n_classes)
    if law == GUMBEL.value:
        balanced = min(balanced, math.isqrt(k * n_classes // 2))
    return max(32, 4 * k, balanced)


def plan(n_classes: int, k: int, law: int) -> tuple[int, int, int] | None:
    """Where to put the cut: ``(group, stride, rank)``, or None where every class is a contender."""
    wanted = wanted_contenders(n_classes, k, law)
    if n_classes < 2 * wanted:
        return None
    group = 1
    while group < 32 and n_classes // (2 * group) >= 4 * wanted:
        group *= 2
    groups = -(-n_classes // group)
    stride = max(1, groups // 512)
    looked_at = -(-groups // stride)
    return group, stride, max(1, wanted * looked_at // groups)
