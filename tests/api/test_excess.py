"""Contract under test: `noised_excess`, of which every loss is made: its definition, its gradients, its arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from testing import BACKENDS
from topk_fast import NoisedTopK, reference
from topk_fast.functional import bal_noised_topk_loss, imbal_noised_topk_loss, noised_excess, noised_topk

N, L, B, SEED = 7, 40, 6, 3
every_backend = pytest.mark.parametrize("backend", BACKENDS)
both_laws = pytest.mark.parametrize("noise", ["normal", "gumbel"])


def batch(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(N, L, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(L, (N,), generator=generator)
    target[2] = -100
    target[3] = scores[3].argmax()  # among the first ones
    return scores, target


def noised(scores, noise):
    """All noised scores [N, B, L] by the contract's draws."""
    law = ["normal", "gumbel"].index(noise)
    z = reference.dense_noise(torch.arange(N), L, B, torch.tensor(SEED), law=law)
    return scores[:, None] + 0.7 * z.to(scores.dtype)


@every_backend
@both_laws
@pytest.mark.parametrize("exclude_target", [False, True])
def test_is_its_definition(exclude_target, noise, backend):
    """By a sort of all noised scores, without the true class where it is excluded; differentiable like that sort."""
    scores, target = batch()
    x, y = (scores.clone().requires_grad_() for _ in range(2))
    ks = [5, 1, 2] if exclude_target else [0, 5, 2]
    common = dict(noise=noise, seed=SEED, sampler="dense", backend=backend)
    given = noised_excess(x, target, ks, 0.7, B, exclude_target=exclude_target, **common)
    ranked, own = noised(y, noise), target.clamp(min=0)
    if exclude_target:
        ranked = ranked.masked_fill(F.one_hot(own, L)[:, None].bool(), -math.inf)
    ranked = ranked.sort(dim=2, descending=True).values
    places = [k - exclude_target for k in ks]
    expected = ranked[:, :, places].mean(1) - y.gather(1, own[:, None])
    expected = expected.masked_fill((target == -100)[:, None], 0.0)
    torch.testing.assert_close(given, expected)
    weights = torch.linspace(-1.0, 2.0, N * len(ks), dtype=torch.float64).view(N, -1)
    (given * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert (x.grad != 0).sum(1).max() <= B * len(ks) + 1 and not x.grad[2].any()


@every_backend
@both_laws
@pytest.mark.parametrize("k, exclude_target", [(0, False), ([0, 3], False), ([1, 4], True)])
def test_gradcheck_of_first_and_second_derivatives(k, exclude_target, noise, backend):
    scores, target = (x[1:5] for x in batch())  # a few rows: of each entry all derivatives are taken
    scores, target = scores[:, :20], torch.where(target < 20, target, 3)
    options = dict(epsilon=0.7, noise=noise, exclude_target=exclude_target, seed=SEED, backend=backend)
    functions = [
        lambda x: noised_excess(x, target, k, **options),
        lambda x: noised_excess(x.tanh(), target, k, **options).square().mean(),
    ]
    for function in functions:
        assert gradcheck(function, scores.clone().requires_grad_())
        assert gradgradcheck(function, scores.clone().requires_grad_())


@every_backend
def test_a_loss_is_a_few_lines_on_it(backend):
    """The balanced and the imbalanced loss, written by hand, have the values and gradients of the functions."""
    scores, target = batch()
    margins, common = torch.rand(L, dtype=torch.float64), dict(seed=SEED, backend=backend)
    valid = target != -100
    for by_hand, function in [
        (lambda e: F.relu(1 + e), lambda x: bal_noised_topk_loss(x, target, 3, **common)),
        (
            lambda e: 7 * F.relu(margins[target.clamp(min=0)] + e),
            lambda x: imbal_noised_topk_loss(x, target, 3, margins, 1.0, 7.0, **common),
        ),
    ]:
        x, y = (scores.clone().requires_grad_() for _ in range(2))
        given, expected = by_hand(noised_excess(x, target, 3, **common))[valid].mean(), function(y)
        torch.testing.assert_close(given, expected)
        given.backward(), expected.backward()
        torch.testing.assert_close(x.grad, y.grad)


@every_backend
def test_gumbel_noise_at_rank_1_is_cross_entropy_on_average(backend):
    """Value and gradient within 5 standard errors; a temperature or a law that is wrong by a tenth is beyond."""
    scores, target = batch(torch.float32)
    n_sample = 4000
    x, y = (scores.clone().requires_grad_() for _ in range(2))
    given = noised_excess(x, target, 0, 1.0, n_sample, noise="gumbel", seed=SEED, backend=backend)
    expected = F.cross_entropy(y, target, reduction="none")
    given.sum().backward(), expected.sum().backward()
    error = math.pi / math.sqrt(6 * n_sample)
    assert (given - expected).abs().max() < 5 * error
    assert (x.grad - y.grad).abs().max() < 5 * 0.5 / math.sqrt(n_sample)
    wrong = noised_excess(scores, target, 0, 1.1, n_sample, noise="gumbel", seed=SEED, backend=backend)
    assert (wrong - expected).abs().max() > 5 * error


@every_backend
def test_several_ranks_are_those_of_single_calls(backend):
    """The dense sampler: the thinned one plans for the longest list, and so draws other noise."""
    scores, target = batch(torch.float32)
    common = dict(seed=SEED, sampler="dense", backend=backend)
    several = noised_excess(scores, target, (2, 0, 2), **common)
    assert several.shape == (N, 3)
    for m, k in enumerate((2, 0, 2)):
        assert torch.equal(several[:, m], noised_excess(scores, target, k, **common))
    values = NoisedTopK([4, 1], **common)(scores)
    assert torch.equal(values[:, 0], noised_topk(scores, 4, **common)) and values.shape == (N, 2)


def test_shapes_follow_the_target():
    scores, target = torch.randn(3, 9, 4, 2), torch.randint(9, (3, 4, 2))
    assert noised_excess(scores, target, 2).shape == (3, 4, 2)
    assert noised_excess(scores, target, [2, 5, 7]).shape == (3, 4, 2, 3)
    assert noised_excess(scores[0, :, 0, 0], target[0, 0, 0], [2]).shape == (1,)
    assert noised_topk(scores, [1, 2], dim=1).shape == (3, 4, 2, 2)
    assert noised_excess(torch.randn(0, 9), torch.zeros(0, dtype=torch.int64), [1, 2]).shape == (0, 2)


@every_backend
def test_an_epsilon_tensor_is_that_number(backend):
    scores, target = batch(torch.float32)
    common = dict(seed=SEED, backend=backend)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = noised_excess(scores, target, 2, torch.tensor(0.25, dtype=dtype), **common)
        assert torch.equal(given, noised_excess(scores, target, 2, 0.25, **common))


def test_a_schedule_of_epsilon_is_one_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    scores, target = batch(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")

    def run(epsilon):
        return bal_noised_topk_loss(scores, target, 3, epsilon, seed=SEED)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for epsilon in (0.1, 0.5, 2.0):
        torch.testing.assert_close(compiled(torch.tensor(epsilon)), run(epsilon), rtol=0, atol=0)
    assert counter.frame_count == 1
    with pytest.raises(RuntimeError, match="epsilon must be in"):
        compiled(torch.tensor(-1.0))


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (dict(k=[]), ValueError, r"k must be an int or a sequence of 1 to 32 ints, got 0 of them"),
        (dict(k=[1] * 33), ValueError, "k must be an int or a sequence of 1 to 32 ints, got 33 of them"),
        (dict(k=[1, L]), ValueError, r"k must be in \[0, L - 1\] = \[0, 39\], got 40"),
        (dict(k=[1, 2.0]), TypeError, "k must be an int, got float"),
        (dict(k="12"), TypeError, "k must be an int, got str"),
        (dict(k=0, exclude_target=True), ValueError, r"k must be in \[1, L - 1\] = \[1, 39\], got 0"),
        (dict(noise="laplace"), ValueError, "noise must be 'normal' or 'gumbel', got 'laplace'"),
        (dict(epsilon=torch.tensor([1.0])), TypeError, "epsilon must be a number or a floating-point tensor without"),
        (dict(epsilon=torch.tensor(1)), TypeError, "epsilon must be a number or a floating-point tensor without"),
        (dict(epsilon=torch.tensor(0.0, requires_grad=True)), ValueError, r"epsilon must be in \(0, 1e\+36\], got 0.0"),
        (dict(epsilon=torch.tensor(1.0, device="meta")), ValueError, "epsilon must be on input's device cpu, got meta"),
        (dict(epsilon=torch.tensor(-0.5)), ValueError, r"epsilon must be in \[0, 1e\+36\], got -0.5"),
        (dict(epsilon=torch.tensor(math.nan)), ValueError, r"epsilon must be in \[0, 1e\+36\], got nan"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else "",
)
def test_errors(bad, error, message):
    scores, target = batch()
    with pytest.raises(error, match=message):
        noised_excess(scores, target, **({"k": 2} | bad))


def test_losses_take_one_k():
    scores, target = batch()
    with pytest.raises(TypeError, match="k must be an int, got list"):
        bal_noised_topk_loss(scores, target, [1, 2])


def test_a_module_keeps_its_epsilon_tensor_and_moves_it():
    module = NoisedTopK(2, torch.tensor(0.5, dtype=torch.float64), seed=SEED)
    scores, _ = batch(torch.float32)
    assert torch.equal(module(scores), noised_topk(scores, 2, 0.5, seed=SEED))
    module.epsilon.fill_(0.25)
    assert torch.equal(module(scores), noised_topk(scores, 2, 0.25, seed=SEED))
    assert module.to("meta").epsilon.is_meta and not module.state_dict()
