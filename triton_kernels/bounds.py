"""Bounds on words and on times of arrivals beyond which no noised score reaches a known value, in Triton.

csrc/bounds.h has the derivations. Bounds change the cost of a search and never its result: what is not certain passes.
"""

import triton
import triton.language as tl

from .noise import GUMBEL, exp_minus
from .order import MAX32

SMALLEST = tl.constexpr(1.1754943508222875e-38)  # normal number


@triton.jit
def certain_below(score, reach, epsilon):
    """An x such that score + epsilon * z is below ``reach`` for every draw z < x; -inf or NaN where there is none."""
    epsilon = tl.where((epsilon > 0.0) & (epsilon < SMALLEST), SMALLEST, epsilon)  # it may only grow
    x = tl.div_rn((reach - score) - (tl.abs(reach) + tl.abs(score)) * 4e-7, epsilon)
    return x - (tl.minimum(tl.abs(x), 1e30) * 4e-6 + 2e-5)  # +inf where epsilon is 0


@triton.jit
def upper_tail(x):
    """A bound on 1 - Phi(x) for x >= 0: phi(x) * 2 / (x + sqrt(x^2 + 8 / pi)) (Pollak 1956).

    Clamped at 7.5, beyond which the quantile's error exceeds the slack of ``certain_below``.
    """
    x = tl.minimum(x, 7.5)
    return tl.div_rn(exp_minus(x * x * 0.5) * 0.79796, x + tl.sqrt_rn(x * x + 2.5464790894703255))


@triton.jit
def upper_bounds(x, LAW: tl.constexpr):
    """Bounds on 1 - F(x) and on -ln F(x), for x > 0."""
    x = tl.where(x > 0.0, x, 0.0)
    if LAW == GUMBEL:
        tail = exp_minus(x + 0.5772157) * 1.0001  # a 10000th covers the error of exp_minus
        hazard = tail
    else:
        tail = upper_tail(x)
        hazard = (tail + tail * tail) * 1.00001  # -ln(1 - q) <= q + q^2 for q <= 1/2
    return tail, hazard


@triton.jit
def word_bound(score, reach, epsilon, LAW: tl.constexpr):
    """A bound on ``word >> 8`` beyond which score + epsilon * draw is certainly below ``reach``."""
    x = certain_below(score, reach, epsilon)
    tail, _ = upper_bounds(x, LAW)
    return tl.where(x > 0.0, (tail * 16777216.0 + 2.0).to(tl.int32), MAX32)


@triton.jit
def time_bound(cut, reach, epsilon, LAW: tl.constexpr):
    """A bound on an arrival's time beyond which cut + epsilon * level is certainly below ``reach``."""
    x = certain_below(cut, reach, epsilon)
    _, hazard = upper_bounds(x, LAW)
    return tl.where(x > 0.0, hazard, float("inf"))
