"""Parity with the package that topk_fast replaces: the same formulas on the same noise, the same names, the same law.

Contract under test: ``import topk_fast as pytopk`` changes the speed of a program and its random draws, nothing else.
pytopk takes its noise as an argument [N, L, B]; the dense sampler's is handed to it.
"""

import copy
import importlib
import inspect
import math

import numpy as np
import pytest
import torch

import topk_fast
from testing import BACKENDS, batch_with_closed_gates
from topk_fast import functional as ours
from topk_fast import reference

pytopk = pytest.importorskip("pytopk", reason="parity with pytopk needs the package itself: pip install pytopk")
theirs = importlib.import_module("pytopk.functional")
their_noised_topk = importlib.import_module("pytopk.noised_topk")._noised_topk

U = 2.0**-24  # unit roundoff of float32, the arithmetic of both packages
SEED = 1234
MODULES = ["NoisedTopK", "BalNoisedTopK", "ImbalNoisedTopK"]


def noise(n_rows, n_classes, n_sample):
    """The dense sampler's noise in pytopk's order [N, L, B]."""
    z = reference.dense_noise(torch.arange(n_rows), n_classes, n_sample, torch.tensor(SEED))
    return z.transpose(1, 2).contiguous()


def value_tolerance(scores, z, epsilon, scale=1.0):
    """Bound on the difference of two mean losses in float32.

    The noised scores and their k-th largest are the same bits. With M the largest of them, every later number is at
    most scale * (1 + 2 M); each package rounds at most B times in the mean of samples, 4 times in the hinge and N
    times in the mean of rows.
    """
    largest = max(float(scores.abs().max()), float((scores[..., None] + epsilon * z).abs().max()))
    return 2 * (z.shape[-1] + 4 + len(scores)) * U * scale * (1 + 2 * largest)


def gradient_tolerance(n_rows, scale=1.0):
    """An entry is count / B * scale / N, less scale / N for the true class: at most 5 roundings in either package."""
    return 2 * 5 * U * scale / n_rows


SHAPES = [
    pytest.param(16, 10, 3, 5, id="few classes"),
    pytest.param(64, 100, 5, 5, id="default n_sample"),
    pytest.param(8, 1000, 5, 3, id="a mean that no power of two divides"),
    pytest.param(8, 20, 19, 4, id="k = L - 1"),
    pytest.param(5, 50, 1, 1, id="one sample"),
    pytest.param(1, 50, 5, 10, id="one row"),
]


def value_and_gradient(function, scores):
    scores = scores.clone().requires_grad_()
    value = function(scores)
    value.sum().backward()
    return value.detach(), scores.grad


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("n_rows, n_classes, k, n_sample", SHAPES)
def test_balanced_loss_on_the_same_noise(n_rows, n_classes, k, n_sample, epsilon, backend):
    scores, y = batch_with_closed_gates(n_rows, n_classes)
    z = noise(n_rows, n_classes, n_sample)
    options = {"seed": SEED, "sampler": "dense", "backend": backend}
    expected = value_and_gradient(lambda s: theirs.bal_noised_topk_loss(s, y, k, epsilon, their_noised_topk, z), scores)
    actual = value_and_gradient(lambda s: ours.bal_noised_topk_loss(s, y, k, epsilon, n_sample, **options), scores)
    close(actual[0], expected[0], value_tolerance(scores, z, epsilon))
    close(actual[1], expected[1], gradient_tolerance(n_rows))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epsilon, scale", [(0.0, 50), (0.01, 50), (0.1, 1), (1.0, 7.3)])
@pytest.mark.parametrize("n_rows, n_classes, k, n_sample", SHAPES)
def test_imbalanced_loss_on_the_same_noise(n_rows, n_classes, k, n_sample, epsilon, scale, backend):
    scores, y = batch_with_closed_gates(n_rows, n_classes)
    z = noise(n_rows, n_classes, n_sample)
    margins = ours.class_margins(range(1, n_classes + 1), 0.4)
    options = {"seed": SEED, "sampler": "dense", "backend": backend}
    expected = value_and_gradient(
        lambda s: theirs.imbal_noised_topk_loss(s, y, k, margins, epsilon, their_noised_topk, z, scale), scores
    )
    actual = value_and_gradient(
        lambda s: ours.imbal_noised_topk_loss(s, y, k, margins, epsilon, scale, n_sample, **options), scores
    )
    close(actual[0], expected[0], value_tolerance(scores, z, epsilon, scale))
    close(actual[1], expected[1], gradient_tolerance(n_rows, scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k, epsilon", [(1, 1.0), (3, 0.0), (6, 0.5)])
@pytest.mark.parametrize(
    "shape, dim",
    [
        pytest.param((40,), -1, id="vector"),
        pytest.param((40,), 0, id="vector, counted from the front"),
        pytest.param((7, 40), -1, id="rows"),
        pytest.param((7, 40), 1, id="rows, counted from the front"),
        pytest.param((40, 7), 0, id="columns"),
        pytest.param((40, 7), -2, id="columns, counted from the end"),
        pytest.param((3, 40, 5), 1, id="dimension in the middle"),
        pytest.param((2, 3, 40), -1, id="three dimensions"),
    ],
)
def test_smoothed_value_on_the_same_noise(shape, dim, k, epsilon, backend):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rest = x.movedim(dim, -1).shape[:-1]  # our rows are numbered in its order
    z = noise(math.prod(rest), 40, 5).unflatten(0, rest or (1,)).movedim(-2, dim - (dim < 0))
    z = z.reshape(*shape, 5)
    expected = value_and_gradient(lambda x: their_noised_topk(x, z, k, epsilon, dim, -(dim < 0)), x)
    actual = value_and_gradient(
        lambda x: ours.noised_topk(x, k, epsilon, 5, dim, seed=SEED, sampler="dense", backend=backend), x
    )
    # A mean of 5 numbers of at most M: 5 roundings in either package; its gradient is a count over 5.
    close(actual[0], expected[0], 2 * 5 * U * float((x[..., None] + epsilon * z).abs().max()))
    close(actual[1], expected[1], gradient_tolerance(1))


COUNTS = [
    pytest.param([5, 15, 10], id="README"),
    pytest.param([1], id="one class"),
    pytest.param([7] * 20, id="balanced"),
    pytest.param(np.random.default_rng(0).integers(1, 10**6, 50_000).tolist(), id="50,000 random counts"),
    pytest.param(np.arange(1, 1000), id="array"),
]


@pytest.mark.parametrize("max_m", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("counts", COUNTS)
def test_margins_are_bit_equal(counts, max_m):
    expected = pytopk.ImbalNoisedTopK(k=1, epsilon=0.1, max_m=max_m, cls_num_list=counts).m_list
    margins = ours.class_margins(counts, max_m)
    assert margins.dtype == expected.dtype and torch.equal(margins, expected)
    if len(counts) > 1:  # a loss of one class has no rank to search, which the module says when it is made
        module = topk_fast.ImbalNoisedTopK(k=1, epsilon=0.1, max_m=max_m, cls_num_list=counts)
        assert torch.equal(module.m_list, expected)


@pytest.mark.parametrize("source, sink", [(pytopk, topk_fast), (topk_fast, pytopk)], ids=["from pytopk", "to pytopk"])
def test_state_dicts_are_interchangeable(source, sink):
    saved = source.ImbalNoisedTopK(2, 0.1, 0.3, [5, 15, 10])
    loaded = sink.ImbalNoisedTopK(2, 0.1, 0.3, [1, 1, 1])
    loaded.load_state_dict(saved.state_dict(), strict=True)
    assert list(loaded.state_dict()) == ["m_list"]
    assert torch.equal(loaded.m_list, saved.m_list)
    # As part of a model, under the name that the model gives it.
    model = torch.nn.ModuleDict({"criterion": copy.deepcopy(saved), "balanced": source.BalNoisedTopK(2, 1.0)})
    fresh = torch.nn.ModuleDict(
        {"criterion": sink.ImbalNoisedTopK(2, 0.1, 0.3, [1, 1, 1]), "balanced": sink.BalNoisedTopK(2, 1.0)}
    )
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh["criterion"].m_list, saved.m_list)


@pytest.mark.parametrize("name", MODULES)
def test_signatures_begin_with_pytopks(name):
    def parameters(package):
        return list(inspect.signature(getattr(package, name)).parameters.values())

    def essence(parameter):
        return parameter.name, parameter.kind, parameter.default

    expected, actual = parameters(pytopk), parameters(topk_fast)
    assert [essence(p) for p in actual[: len(expected)]] == [essence(p) for p in expected]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in actual[len(expected) :])


POSITIONAL = {
    "NoisedTopK": (3, 0.5, 7, 0),
    "BalNoisedTopK": (2, 1.0, 7),
    "ImbalNoisedTopK": (2, 0.1, 0.3, [5, 15, 10], 30, 7),
}
ATTRIBUTES = {
    "NoisedTopK": ["k", "epsilon", "n_sample", "dim"],
    "BalNoisedTopK": ["k", "epsilon", "n_sample"],
    "ImbalNoisedTopK": ["k", "epsilon", "n_sample", "scale"],
}


@pytest.mark.parametrize("name", MODULES)
def test_attributes_are_pytopks(name):
    expected = getattr(pytopk, name)(*POSITIONAL[name])
    actual = getattr(topk_fast, name)(*POSITIONAL[name])
    for attribute in ATTRIBUTES[name]:
        assert getattr(actual, attribute) == getattr(expected, attribute), attribute
    assert [n for n, _ in actual.named_buffers()] == [n for n, _ in expected.named_buffers()]
    assert not list(actual.parameters())


@pytest.mark.parametrize("package", ["pytopk", "topk_fast"])
class TestUsage:
    """Code written for pytopk, word for word but for the name behind ``import``."""

    def test_losses_of_the_readme(self, package):
        pytopk = importlib.import_module(package)
        torch.manual_seed(0)
        scores = torch.tensor([[2.0, 1.5, -3.0], [7.5, 4.0, -1.5]])
        labels = torch.tensor([0, 2])
        k = 2
        criteria_bal = pytopk.BalNoisedTopK(k=k, epsilon=1.0)
        criteria_imbal = pytopk.ImbalNoisedTopK(k=k, epsilon=0.01, max_m=0.3, cls_num_list=[17, 23, 55])
        loss_batch_bal = criteria_bal(scores, labels)
        loss_batch_imbal = criteria_imbal(scores, labels)
        assert loss_batch_bal.shape == loss_batch_imbal.shape == ()
        # The third largest is the lowest: far below the true score in the first row (loss 0), the true score itself in
        # the second (50 * margin, moved by a mean of 5 noises). Within 5 standard deviations of that:
        margin = 0.3 * (17 / 55) ** 0.25
        assert float(loss_batch_imbal) == pytest.approx(50 * margin / 2, abs=5 * 50 * 0.01 / 2 / 5**0.5)

    def test_smooth_topk_of_the_readme(self, package):
        pytopk = importlib.import_module(package)
        smooth_topk = pytopk.NoisedTopK(k=3, dim=-1)
        x = torch.tensor([[-1.5, 2.0, 0.7, 3.8], [-1.1, -5.4, 0.1, 2.3]], requires_grad=True)
        out = smooth_topk(x)
        assert out.shape == (2,)
        assert out.grad_fn is not None
        out.sum().backward()
        fifths = x.grad * 5
        close(fifths, fifths.round(), 5 * U)
        close(x.grad.sum(1), torch.ones(2), 4 * U)

    def test_positional_arguments(self, package):
        pytopk = importlib.import_module(package)
        scores, labels = batch_with_closed_gates(6, 3)
        losses = [
            pytopk.BalNoisedTopK(*POSITIONAL["BalNoisedTopK"]),
            pytopk.ImbalNoisedTopK(*POSITIONAL["ImbalNoisedTopK"]),
        ]
        for criterion in losses:
            loss = criterion(scores.requires_grad_(), labels)
            loss.backward()
            assert loss.shape == () and loss.dtype == torch.float32
        assert pytopk.NoisedTopK(*POSITIONAL["NoisedTopK"])(scores).shape == (3,)

    def test_training_loop(self, package):
        pytopk = importlib.import_module(package)
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 6)
        inputs = torch.randn(60, 8)
        labels = torch.arange(60) % 6
        criterion = pytopk.BalNoisedTopK(1, 0.5, 5).to("cpu").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        first = criterion(model(inputs), labels).item()
        for _ in range(100):
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
        assert criterion.eval()(model(inputs), labels).item() < 0.8 * first

    def test_fresh_noise_in_every_call_also_in_eval_mode(self, package):
        torch.manual_seed(0)
        criterion = importlib.import_module(package).BalNoisedTopK(5, 1.0).eval()
        scores, labels = batch_with_closed_gates(4, 50)
        assert len({criterion(scores, labels).item() for _ in range(10)}) > 1
        values = []
        for _ in range(2):
            torch.manual_seed(5)
            values.append(criterion(scores, labels).item())
        assert values[0] == values[1], "torch.manual_seed fixes the noise"


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_shown_where_pytopk_hides_it(backend):
    """The one departure: the relu of a NaN is NaN here, and a NaN score is not taken for the largest."""
    scores, target = batch_with_closed_gates(4, 50)
    scores[0, (target[0] + 1) % 50] = math.nan
    assert pytopk.BalNoisedTopK(5, 1.0)(scores, target).isfinite()
    assert topk_fast.BalNoisedTopK(5, 1.0, backend=backend)(scores, target).isnan()
