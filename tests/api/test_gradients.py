"""Gradients: against numerical derivatives, against autograd through the plain formula, against counting.

Contract under test: ``d loss / d s_j = [loss > 0] * scale * (#{b : c_b = j} / B - [j = y])``, at most B + 1 entries a
row, rounded once to the scores' dtype; and ``d top / d s_j = #{b : c_b = j} / B``.
"""

import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from testing import BACKENDS
from topk_fast import reference
from topk_fast.functional import (
    bal_noised_topk_loss,
    class_margins,
    imbal_noised_topk_loss,
    linear_sampled_cross_entropy,
    noised_topk,
    noised_topk_candidates,
    sampled_cross_entropy,
)

SEED = 2022
ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
LOSSES = {
    "balanced": lambda s, y, k, epsilon, **options: bal_noised_topk_loss(s, y, k, epsilon, **options),
    "imbalanced": lambda s, y, k, epsilon, **options: imbal_noised_topk_loss(
        s, y, k, margins_of(s), epsilon, SCALE["imbalanced"], **options
    ),
}
SCALE = {"balanced": 1.0, "imbalanced": 7.3}

both_backends = pytest.mark.parametrize("backend", BACKENDS)
both_samplers = pytest.mark.parametrize("sampler", ["thinned", "dense"])
both_losses = pytest.mark.parametrize("name", LOSSES)


def margins_of(scores):
    return class_margins(range(1, scores.shape[1] + 1), 0.4)


def batch(n_rows=6, n_classes=90, dtype=torch.float32, lift=0.0):
    """Scores and true classes; ``lift`` raises the true scores of every other row, which closes their hinges."""
    generator = torch.Generator().manual_seed(n_rows)
    scores = torch.randn(n_rows, n_classes, generator=generator, dtype=torch.float64)
    target = torch.randint(n_classes, (n_rows,), generator=generator)
    scores[torch.arange(n_rows), target] += lift * (torch.arange(n_rows) % 2)
    return scores.to(dtype), target


def gradient(function, scores):
    scores = scores.clone().requires_grad_()
    return torch.autograd.grad(function(scores), scores)[0]


def numerically(check, function, scores, backend):
    """gradcheck or gradgradcheck.

    Noised scores are piecewise linear in the scores: the central difference is exact but for rounding, some 1e-16 * 100
    (scale times scores) over the step of 1e-6. No two noised scores in reach are closer than that step. The torch
    search takes 10 ms a call, so its derivatives are checked along random directions instead of one by one.
    """
    torch.manual_seed(0)
    return check(function, (scores.requires_grad_(),), atol=1e-7, rtol=0.0, fast_mode=backend == "torch")


both_orders = pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["first order", "second order"])


@both_backends
@both_samplers
@both_losses
@both_orders
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_losses(reduction, check, name, sampler, backend):
    scores, y = batch(4, 70, torch.float64, lift=4.0)  # 70 classes: about the shortest rows with a background
    y[2] = -100
    options = {"n_sample": 3, "reduction": reduction, "seed": SEED, "sampler": sampler, "backend": backend}
    assert numerically(check, lambda s: LOSSES[name](s, y, 2, 0.7, **options), scores, backend)


@both_backends
@both_samplers
@both_orders
@pytest.mark.parametrize("shape, dim", [((70, 3), 0), ((2, 70, 2), 1), ((3, 70), -1)])
def test_gradcheck_of_smoothed_value(shape, dim, check, sampler, backend):
    scores = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"seed": SEED, "sampler": sampler, "backend": backend}
    assert numerically(check, lambda s: noised_topk(s, 3, 0.7, 4, dim, **options), scores, backend)


@both_backends
@both_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 5.0])
def test_equals_autograd_through_the_formula(epsilon, dtype, name, backend):
    scores, y = batch(40, 90, dtype, lift=20.0)
    k, n_sample, scale = 5, 7, SCALE[name]
    z = reference.dense_noise(torch.arange(40), 90, n_sample, torch.tensor(SEED)).to(dtype)
    margin = margins_of(scores).to(dtype)[y] if name == "imbalanced" else 1.0

    def formula(s):
        top = reference.smoothed_value(s, z, k + 1, epsilon)
        return reference.loss(top[:, None], s.gather(1, y[:, None])[:, 0], margin, scale)

    options = {"n_sample": n_sample, "seed": SEED, "sampler": "dense", "backend": backend}
    function = partial(LOSSES[name], y=y, k=k, epsilon=epsilon, reduction="none", **options)
    assert torch.equal(function(scores), formula(scores))
    expected = gradient(lambda s: formula(s).sum(), scores)
    assert 10 < (expected != 0).any(1).sum() < 40, "open and closed hinges"
    # Autograd adds up to B terms of scale / B and one of -scale; counting rounds three times. All are below 2 scale.
    bound = (n_sample + 5) * ROUNDOFF[dtype] * 2 * scale
    torch.testing.assert_close(gradient(lambda s: function(s).sum(), scores), expected, rtol=0.0, atol=bound)


@both_backends
@both_samplers
@both_losses
@pytest.mark.parametrize("n_sample", [1, 3, 4, 10])
def test_is_the_count_of_the_classes_found(n_sample, name, sampler, backend):
    """Bit for bit ``(weight * scale) * (count / B)``, from the classes that the search itself reports."""
    scores, y = batch(50, 1000, lift=8.0)
    weight = torch.linspace(-1.0, 2.0, 50)
    options = {"n_sample": n_sample, "seed": SEED, "sampler": sampler, "backend": backend}
    loss = LOSSES[name](scores, y, 5, 0.5, reduction="none", **options)
    classes = noised_topk_candidates(scores, 6, 0.5, **options)[1][..., -1]
    count = torch.zeros(50, 1000).scatter_add(1, classes, torch.ones(50, n_sample))
    count = (count - n_sample * torch.nn.functional.one_hot(y, 1000)) * (loss > 0)[:, None]
    actual = gradient(lambda s: (LOSSES[name](s, y, 5, 0.5, reduction="none", **options) * weight).sum(), scores)
    assert torch.equal(actual, (weight * SCALE[name])[:, None] * (count / n_sample))
    assert (actual != 0).sum(1).max() <= n_sample + 1


@both_backends
@both_samplers
@pytest.mark.parametrize("n_sample", [1, 3, 5, 8, 100])
def test_rows_sum_to_zero(n_sample, sampler, backend):
    """Adding a number to all scores of a row changes nothing.

    An entry is fl(g * fl(count / B)), so at most (2 u + u**2) * |g * count / B| off, and the counts' sizes add up to
    at most 2 B. Where B and g are powers of two nothing is rounded and the sum is 0.
    """
    scores, y = batch(50, 300, lift=8.0)
    options = {"n_sample": n_sample, "reduction": "sum", "seed": SEED, "sampler": sampler, "backend": backend}
    u = ROUNDOFF[torch.float32]
    for name, scale in SCALE.items():
        rows = gradient(lambda s, name=name: LOSSES[name](s, y, 5, 1.0, **options), scores)
        sums = rows.double().sum(1)
        assert rows.any(1).sum() > 20
        bound = 0.0 if name == "balanced" and n_sample in (1, 8) else 2 * scale * (2 * u + u**2)
        assert sums.abs().max() <= bound
        assert (rows != 0).sum(1).max() <= n_sample + 1


@both_backends
@both_samplers
@pytest.mark.parametrize("name, margin", [("balanced", 1.0), ("imbalanced", 0.25)])
def test_hinge_gate(name, margin, sampler, backend):
    """Without noise the pre-activation is exact: below 0, at 0 and just above it."""
    top = 2.0
    scores = torch.full((3, 200), -1.0)
    scores[:, 7] = top
    scores[:, 3] = torch.tensor([4.0, top + margin, math.nextafter(top + margin, 0.0) - 2.0**-21])
    y = torch.full((3,), 3)
    if name == "balanced":
        loss = partial(bal_noised_topk_loss, target=y, k=1, epsilon=0.0)
    else:
        loss = partial(imbal_noised_topk_loss, target=y, k=1, margins=torch.full((200,), margin), epsilon=0.0)
    options = {"reduction": "none", "seed": SEED, "sampler": sampler, "backend": backend}
    values = loss(scores, **options)
    assert values[0] == 0 and values[1] == 0 and values[2] > 0
    rows = gradient(lambda s: loss(s, **options).sum(), scores)
    expected = torch.zeros(3, 200)
    expected[2, 7], expected[2, 3] = (1.0, -1.0) if name == "balanced" else (50.0, -50.0)
    assert torch.equal(rows, expected)


@both_backends
@both_losses
def test_reductions_and_ignored_rows(name, backend):
    scores, y = batch(8, 90)
    y[[1, 4]] = -100
    options = {"seed": SEED, "backend": backend}

    def grad(weigh, **more):
        return gradient(lambda s: weigh(LOSSES[name](s, y, 5, 1.0, **options, **more)), scores)

    weight = torch.linspace(1.0, 3.0, 8)
    each = grad(torch.sum, reduction="none")
    assert not each[[1, 4]].any()
    assert each[[0, 2, 3, 5, 6, 7]].any(1).all()
    assert torch.equal(grad(lambda x: x, reduction="sum"), each)
    assert torch.equal(grad(lambda x: x, reduction="mean"), grad(lambda x: x))
    # weight * scale * count / B: the factor in front may be rounded before or after the scale
    bound = 4 * ROUNDOFF[torch.float32] * SCALE[name]
    mean, weighted = grad(lambda x: x, reduction="mean"), grad(lambda x: (x * weight).sum(), reduction="none")
    torch.testing.assert_close(mean, each / 6, rtol=0.0, atol=bound / 6)
    torch.testing.assert_close(weighted, each * weight[:, None], rtol=0.0, atol=3 * bound)
    other = y.masked_fill(y == -100, 5)
    assert torch.equal(
        gradient(lambda s: LOSSES[name](s, other, 5, 1.0, reduction="sum", ignore_index=5, **options), scores),
        each.masked_fill((other == 5)[:, None], 0.0),
    )


@both_backends
def test_all_rows_ignored_gives_no_gradient(backend):
    scores, y = batch(4, 90)
    loss = partial(bal_noised_topk_loss, target=torch.full_like(y, -100), k=5, seed=SEED, backend=backend)
    assert not gradient(lambda s: loss(s, reduction="sum"), scores).any()


@both_backends
@both_samplers
@both_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_gradient_rounded_once(dtype, name, sampler, backend):
    scores, y = batch(40, 1000, dtype, lift=8.0)
    weight = torch.linspace(0.1, 3.0, 40)
    options = {"n_sample": 7, "reduction": "none", "seed": SEED, "sampler": sampler, "backend": backend}

    def weighted(s):
        return (LOSSES[name](s, y, 5, 1.0, **options) * weight).sum()

    half, single = gradient(weighted, scores), gradient(weighted, scores.float())
    assert half.dtype == dtype
    assert (half.float() != single).any(), "a gradient that half precision holds exactly would not test rounding"
    assert torch.equal(half, single.to(dtype))


@both_backends
@both_samplers
@pytest.mark.parametrize("place", ["true class", "another class", "every class"])
def test_nan_rows_stay_apart(place, sampler, backend):
    scores, y = batch(6, 300)
    options = {"seed": SEED, "sampler": sampler, "backend": backend}
    functions = {
        "loss": lambda s: bal_noised_topk_loss(s, y, 5, **options),
        "smoothed value": lambda s: noised_topk(s, 6, **options).sum(),
    }
    for name, function in functions.items():
        clean = gradient(function, scores)
        bad = scores.clone()
        bad[2, {"true class": int(y[2]), "another class": int(y[2] - 1), "every class": slice(None)}[place]] = math.nan
        actual = gradient(function, bad)
        assert actual[2].isnan().all(), name
        others = torch.arange(6) != 2
        assert torch.equal(actual[others], clean[others]), name


@both_backends
def test_nan_in_an_ignored_row_gives_no_gradient(backend):
    scores, y = batch(4, 90)
    scores[1], y[1] = math.nan, -100
    rows = gradient(lambda s: bal_noised_topk_loss(s, y, 5, seed=SEED, backend=backend), scores)
    assert not rows[1].any()
    assert rows[[0, 2, 3]].isfinite().all()


@both_backends
@both_samplers
def test_masked_classes_get_no_gradient(sampler, backend):
    scores, y = batch(50, 300)
    masked = torch.rand(50, 300, generator=torch.Generator().manual_seed(1)) < 0.7
    masked.scatter_(1, y[:, None], False)
    options = {"n_sample": 10, "seed": SEED, "sampler": sampler, "backend": backend}
    rows = gradient(lambda s: bal_noised_topk_loss(s, y, 5, **options), scores.masked_fill(masked, -math.inf))
    assert rows.any(1).all()
    assert not rows[masked].any()


@both_backends
@pytest.mark.parametrize(
    "n_classes, sampler, top",
    [pytest.param(6, "dense", 0.6, id="few classes"), pytest.param(90, "thinned", 2.6, id="with a background")],
)
@pytest.mark.parametrize("name", ["smoothed value", *LOSSES])
def test_mean_gradient_is_the_slope_of_the_mean(name, n_classes, sampler, top, backend):
    """Gradients of one set of noise against central differences under another: derivatives of one mean.

    The tolerance is 5 standard errors, measured, and the difference's error h**2 / 6 * |third derivative|. The mean
    is smooth for the noise alone: moving a score by h moves the B noises of that class, or for the true class of all
    L others, by h / epsilon, and the third derivative of a mean of slopes of at most ``scale`` is at most
    ``scale * B * L / epsilon**2``.
    """
    n_rows, n_sample, epsilon, h, k = (20_000 if backend == "cpp" else 4000), 3, 0.8, 1e-3, 2
    scale = SCALE.get(name, 1.0)
    one = torch.linspace(2.0, -2.0, n_classes, dtype=torch.float64)
    true = n_classes // 3
    margin = 1.0 if name == "balanced" else float(margins_of(one[None])[true])
    one[true] = top + margin  # ``top`` is about the smoothed value, so hinges open and close by chance
    y = torch.full((n_rows,), true)

    def function(s, seed):
        options = {"n_sample": n_sample, "seed": seed, "sampler": sampler, "backend": backend}
        rows = s.expand(n_rows, -1)
        if name == "smoothed value":
            return noised_topk(rows, k + 1, epsilon, **options)
        return LOSSES[name](rows, y, k, epsilon, reduction="none", **options)

    rows = one.expand(n_rows, -1).clone().requires_grad_()
    (slopes,) = torch.autograd.grad(function(rows, SEED).sum(), rows)
    bias = h**2 / 6 * scale * n_sample * n_classes / epsilon**2
    for j in {0, 1, 2, true, n_classes // 2}:
        step = torch.zeros_like(one).index_fill(0, torch.tensor(j), h)
        differences = (function(one + step, SEED + 1) - function(one - step, SEED + 1)) / (2 * h)
        error = ((slopes[:, j].var() + differences.var()) / n_rows).sqrt()
        off = (slopes[:, j].mean() - differences.mean()).abs()
        assert error < 0.02 * scale
        assert off <= 5 * error + bias, f"class {j}: {float(off)} against a standard error of {float(error)}"
    if name != "smoothed value":
        assert 0.1 < (slopes[:, true] < 0).double().mean() < 0.9, "open and closed hinges"


@pytest.mark.parametrize("n_sample", [1, 5, 128, 129, 300])
def test_classes_are_counted_with_few_samples_and_with_many(n_sample):
    """Two ways, one for each side of 129 samples; ids of -1 are no class's."""
    generator = torch.Generator().manual_seed(n_sample)
    classes = torch.randint(-1, 30, (3, n_sample, 2), generator=generator)
    places = torch.randint(30, (3, 40), generator=generator)
    for row in range(3):
        for rank in range(2):
            counts = torch.bincount(classes[row, :, rank] + 1, minlength=31)[places[row] + 1]
            assert torch.equal(reference.count_occurrences(places, classes)[row, :, rank], counts)


@both_backends
def test_many_samples_of_a_linear_loss_cost_no_table_of_pairs(backend):
    """20 000 samples, whose table of pairs would have 400 million entries; the gradient is that of the logits."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 3, generator=generator), torch.randn(7, 3, generator=generator).requires_grad_()
    y, common = torch.tensor([2]), dict(n_sample=20_000, seed=1, backend=backend)
    (of_linear,) = torch.autograd.grad(linear_sampled_cross_entropy(x, weight, y, **common), weight)
    (of_logits,) = torch.autograd.grad(sampled_cross_entropy(x @ weight.t(), y, **common), weight)
    torch.testing.assert_close(of_linear, of_logits)
