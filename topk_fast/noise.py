r"""The noise contract, version 2: its text and its torch form (``csrc/noise.h`` is the C++ form).

Every backend realises the same noise for the same seed, bit for bit. That holds because only exactly rounded
float32 operations are used (+ - * / sqrt, comparisons, conversions, integer steps), one rounding each, in the order
written here. ``tests/known_answers.json`` pins every function. A change of any constant, or of :func:`plan`, is a
new contract version.

========================================  ==================================================================
draw of class c, row n, sample b          ``law.draw(philox(c, n, b // 4, 0)[b % 4])``
arrival j of row n, sample b              ``w = philox(j // 2, n, b, 1 + first_class)``; its gap comes from
                                          ``w[2 * (j % 2)]``, its class from ``w[2 * (j % 2) + 1]``
time of arrival j                         ``(float(sum of gaps 0..j) * 2**-24) * (1 / float(L))``
level of arrival j                        ``law.level(time)``
class of arrival j                        ``first_class + ((class word * L) >> 32)``
noised score                              ``s + (epsilon * z)``: one product, one sum
order                                     value descending, then class ascending; -0 equals +0
========================================  ==================================================================

The key of philox is ``(seed mod 2**32, seed >> 32)``; c is the global class id, n the global row of the call and L
the number of classes of the slice that is searched, whose first class is ``first_class``. A law is a distribution
function F of the noise, given by two functions: ``draw`` turns a word into a draw from F, and ``level`` turns the
time e of an arrival into the z with -ln F(z) = e. Both laws use the same words.

Version 2 differs from version 1 in :func:`gap` (+ 1), in the second law, and in that law's :func:`plan`.

32-bit words travel as int64 tensors with values in [0, 2**32), which every device that torch knows can multiply.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

VERSION = 2
LARGEST_LEVEL = 40.0  # no noise of either law is beyond it
_MASK = 0xFFFFFFFF


def philox(c0, c1, c2, c3, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words a counter: Philox4x32-10 (Salmon et al., SC 2011), counters int64 tensors or ints that broadcast."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # The int64 product wraps, but its 64 bits are the right ones: shifts and masks recover both halves.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _horner(x: Tensor, *coefficients: float) -> Tensor:
    result = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        result = result * x + c
    return result


def ln(x: Tensor) -> Tensor:
    """Natural logarithm of a positive normal float32."""
    bits = x.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).view(torch.float32)
    s = (m - 1.0) / (m + 1.0)
    p = _horner(s * s, 0.11111111, 0.14285715, 0.2, 0.33333334, 1.0)
    return e.to(torch.float32) * 0.69314718 + (s * 2.0) * p


def upper_quantile(p: Tensor) -> Tensor:
    """The z >= 0 with 1 - Phi(z) = p, for 0 < p <= 1/2 (central part: Giles 2012)."""
    y = -ln((p * 4.0) * (1.0 - p))
    central = _horner(
        y - 2.5,
        2.81022636e-08,
        3.43273939e-07,
        -3.5233877e-06,
        -4.39150654e-06,
        0.00021858087,
        -0.00125372503,
        -0.00417768164,
        0.246640727,
        1.50140941,
    )
    # torch's float32 root is not always correctly rounded (MKL's is not); the float64
    # root rounded to float32 is: a float32's root is never that close to the middle of two float32 values.
    tail = _horner(
        y.to(torch.float64).sqrt().to(torch.float32) - 3.0,
        2.11814277e-05,
        -0.000247470773,
        0.00120883412,
        -0.00327648851,
        0.00572421542,
        -0.00776328519,
        0.00945140887,
        1.00168824,
        2.83297658,
    )
    r = torch.where(y < 5.0, central, tail)
    return (r * (1.0 - p * 2.0)) * 1.41421356


def normal(word: Tensor) -> Tensor:
    """A standard normal draw, falling as its word grows, except for rounding."""
    lower = word > 0x7FFFFFFF
    m = torch.where(lower, _MASK - word, word)
    z = upper_quantile((m.to(torch.float32) + 0.5) * 2.0**-32)
    return torch.where(lower, -z, z)


def hazard_quantile(e: Tensor) -> Tensor:
    """The z with -ln Phi(z) = e, for e > 0: the level of the arrival at time e."""
    h = e.clamp(max=0.5)
    small = -(_horner(h, 0.0013888889, -0.0083333338, 0.041666668, -0.16666667, 0.5, -1.0) * h)
    f = (e * -1.44269504).clamp(min=-126.0)
    i = (f - 0.5).to(torch.int32)
    g = (f - i.to(torch.float32)) * 0.69314718
    x = _horner(g, 0.0013888889, 0.0083333338, 0.041666668, 0.16666667, 0.5, 1.0, 1.0)
    exp = (x.view(torch.int32) + (i << 23)).view(torch.float32)
    p = torch.where(e < 0.5, small, 1.0 - exp)
    lower = p > 0.5
    z = upper_quantile(torch.where(lower, exp, p).clamp(min=2.0**-126))
    return torch.where(lower, -z, z)


def gumbel(word: Tensor) -> Tensor:
    """A draw from Gumbel's law less its mean, Euler's constant, falling as its word grows, except for rounding."""
    lower = word > 0x7FFFFFFF
    m = torch.where(lower, _MASK - word, word)
    p = (m.to(torch.float32) + 0.5) * 2.0**-32
    q = p / (2.0 - p)
    upper = (q * 2.0) * _horner(q * q, 0.11111111, 0.14285715, 0.2, 0.33333334, 1.0)  # -ln(1 - p)
    return gumbel_level(torch.where(lower, -ln(p), upper))


def gumbel_level(e: Tensor) -> Tensor:
    """The z with -ln F(z) = e for Gumbel's law less its mean: the level of the arrival at time e."""
    return -ln(e) - 0.5772157


class Law(NamedTuple):
    """The distribution of the noise."""

    name: str
    draw: Callable[[Tensor], Tensor]  # of a word
    level: Callable[[Tensor], Tensor]  # of an arrival's time


LAWS = (Law("normal", normal, hazard_quantile), Law("gumbel", gumbel, gumbel_level))  # by their numbers in the ops
NORMAL, GUMBEL = range(2)


def gap(word: Tensor) -> Tensor:
    """An Exp(1) gap in units of 2**-24 (int32), at least 1: integers, so that sums are exact in any order."""
    u = ((word >> 1).to(torch.float32) + 0.5) * 2.0**-31
    return (-ln(u) * 2.0**24).to(torch.int32) + 1


def arrival_time(gaps: Tensor, n_classes: int) -> Tensor:
    """Time of an arrival from the int64 sum of its gaps, for a process of rate ``n_classes``."""
    rate = torch.tensor(n_classes, dtype=torch.float32, device=gaps.device)
    return (gaps.to(torch.float32) * 2.0**-24) * (1.0 / rate)


def wanted_contenders(n_classes: int, k: int, law: int = NORMAL) -> int:
    """About how many classes :func:`plan` lets through.

    M = max(32, 4 k, isqrt(4 L)); for Gumbel's law, whose arrivals are few, max(32, 4 k, min(isqrt(4 L),
    isqrt(k L // 2))).
    """
    balanced = math.isqrt(4 * n_classes)
    if law == GUMBEL:
        balanced = min(balanced, math.isqrt(k * n_classes // 2))
    return max(32, 4 * k, balanced)


def plan(n_classes: int, k: int, law: int = NORMAL) -> tuple[int, int, int] | None:
    """Where to put the cut for the ``k`` best of ``n_classes``: ``(group, stride, rank)``, or None for no cut.

    The cut is the ``rank``-th largest of the maxima of groups 0, ``stride``, 2 ``stride``, ... of ``group``
    consecutive classes each. Any cut gives the same distribution; this one balances the two halves of the sampler.

    >>> plan(100_000, 6)
    (32, 6, 105)
    """
    m = wanted_contenders(n_classes, k, law)
    if n_classes < 2 * m:
        return None
    group = 1
    while group < 32 and n_classes // (2 * group) >= 4 * m:
        group *= 2
    groups = -(-n_classes // group)
    stride = max(1, groups // 512)
    looked_at = -(-groups // stride)
    return group, stride, max(1, m * looked_at // groups)
