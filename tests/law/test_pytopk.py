"""Contract under test: on noise of its own topk_fast has the mean values and the mean gradients of pytopk."""

import importlib
from functools import cache

import pytest
import torch

from testing import batch_with_closed_gates

pytest.importorskip("pytopk", reason="parity with pytopk needs the package itself: pip install pytopk")

U = 2.0**-24  # unit roundoff of float32, the arithmetic of both packages
CALLS, COPIES = 400, 10  # calls, each with so many copies of the rows
ERRORS = 5.0  # standard errors; a right mean is further off once in 1.7 million, and some 1200 means are compared
LAWS = {
    "NoisedTopK": (6, 1.0),
    "BalNoisedTopK": (5, 1.0),
    "ImbalNoisedTopK": (5, 0.5, 0.4, tuple(range(1, 101)), 10),
}


@cache
def moments(package, name, arguments):
    """Means and squared standard errors of value and gradient over many calls with noise of the package's own."""
    torch.manual_seed(0)
    module = getattr(importlib.import_module(package), name)(*arguments)
    scores, target = batch_with_closed_gates(4, 100)
    scores, target = scores.repeat(COPIES, 1).requires_grad_(), target.repeat(COPIES)
    total, square = 0.0, 0.0
    for _ in range(CALLS):
        value = module(scores) if name == "NoisedTopK" else module(scores, target)
        (gradient,) = torch.autograd.grad(value.mean(), scores)
        sample = torch.cat([value.detach().mean().view(1), gradient.view(COPIES, -1).sum(0)])
        total, square = total + sample.double(), square + sample.double() ** 2
    mean = total / CALLS
    return mean, (square / CALLS - mean**2).clamp(min=0.0) / CALLS


@pytest.mark.parametrize("name", LAWS)
def test_values_and_gradients_have_the_same_mean_on_own_noise(name):
    mean, error = moments("pytopk", name, LAWS[name])
    our_mean, our_error = moments("topk_fast", name, LAWS[name])
    assert (error > 0).sum() > 75, "most of the gradient would be constant: nothing to compare"
    # Entries that no call moves have no error, but the float32 rounding of either package.
    off = (our_mean - mean).abs() / (ERRORS * (error + our_error).sqrt() + 16 * U)
    assert off.max() <= 1.0, f"entry {int(off.argmax())}: {float(off.max() * ERRORS):.2f} standard errors"


def test_a_mean_that_is_off_is_found():
    """The power of the comparison above: noise 5 % too wide moves the mean loss by far more than its error."""
    mean, error = moments("pytopk", "BalNoisedTopK", LAWS["BalNoisedTopK"])
    our_mean, our_error = moments("topk_fast", "BalNoisedTopK", (5, 1.05))
    assert abs(our_mean[0] - mean[0]) > 2 * ERRORS * (error[0] + our_error[0]).sqrt()
