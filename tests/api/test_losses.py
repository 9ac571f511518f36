"""Contract under test: the family of losses on excesses: formula, several K, links, weights, offsets, learned epsilon.

Excesses themselves are tested in test_excess.py, the paper's two losses in test_pytopk.py, and the linear forms in
test_linear.py; the sampled cross-entropy's expected value is in tests/law.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from testing import BACKENDS, NAN, assert_same
from topk_fast import BalNoisedTopK, ImbalNoisedTopK, LinearHead, NoisedTopKLoss, SampledCrossEntropy, reference
from topk_fast.functional import (
    bal_noised_topk_loss,
    class_margins,
    class_offsets,
    imbal_noised_topk_loss,
    linear_noised_excess,
    linear_noised_topk_loss,
    linear_sampled_cross_entropy,
    noised_excess,
    noised_topk,
    noised_topk_candidates,
    noised_topk_loss,
    sampled_cross_entropy,
)

N, D, L, B, SEED, EPSILON = 7, 5, 40, 6, 3, 0.7
MARGINS = torch.linspace(0.1, 0.6, L)
WEIGHT = torch.linspace(0.5, 3.0, L)
OFFSET = torch.linspace(-2.0, 1.0, L)
LINKS = {
    "hinge": dict(link="hinge", margin=0.4),
    "scaled hinge with margins": dict(link="hinge", margin=MARGINS, scale=20.0),
    "softplus": dict(link="softplus", margin=0.0),
    "cold softplus with margins": dict(link="softplus", temperature=0.1, margin=MARGINS, scale=3.0),
    "identity": dict(link="identity", margin=-0.5),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_link = pytest.mark.parametrize("name", LINKS)


def batch(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(N, L, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(L, (N,), generator=generator)
    target[2] = -100
    target[3] = scores[3].argmax()  # among the first ones
    return scores.requires_grad_(), target


def layer(dtype=torch.float64, exact=False):
    """Features, weight, bias and target; ``exact``: small integers, whose matmul has no rounding."""
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((N, D), (L, D), (L,)))
    if exact:
        x, weight, bias = ((2 * t).round() for t in (x, weight, bias))
    return *(t.to(dtype).requires_grad_() for t in (x, weight, bias)), batch()[1]


def dense_loss(scores, target, k, law=0, epsilon=EPSILON, **criterion):
    """The reference's loss by a sort of all noised scores, 0 in ignored rows."""
    z = reference.dense_noise(torch.arange(len(scores)), L, B, torch.tensor(SEED), law=law).to(scores.dtype)
    tops = torch.stack([reference.smoothed_value(scores, z, one + 1, epsilon) for one in k], dim=1)
    own = target.clamp(min=0)
    if isinstance(criterion["margin"], torch.Tensor):
        criterion["margin"] = criterion["margin"].to(scores.dtype)[own]
    losses = reference.loss(tops, scores.gather(1, own[:, None])[:, 0], **criterion)
    return losses.masked_fill(target == -100, 0.0)


def common(**more):
    return dict(seed=SEED, sampler="dense", reduction="none") | more


# The formula


@every_link
@every_backend
@pytest.mark.parametrize("k", [(2,), (1, 5), (7, 0, 3)], ids=str)
def test_is_the_formula(k, backend, name):
    """Values and gradients of the reference's loss, which sorts all noised scores."""
    (x, target), (y, _) = batch(), batch()
    given = noised_topk_loss(x, target, k, EPSILON, B, backend=backend, **common(), **LINKS[name])
    expected = dense_loss(y, target, k, **LINKS[name])
    torch.testing.assert_close(given, expected)
    for loss in (given, expected):
        (loss * torch.linspace(-1.0, 2.0, N)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert (x.grad != 0).sum(1).max() <= B * len(k) + 1 and not x.grad[2].any()


@every_backend
def test_one_k_and_a_sequence_of_one_are_the_same(backend):
    x, target = batch(torch.float32)
    one, several = (noised_topk_loss(x, target, k, backend=backend, **common()) for k in (3, (3,)))
    assert_same(one, several)


@every_link
def test_rank_weights(name):
    x, target = batch()
    more = LINKS[name] | common()
    each = torch.stack([noised_topk_loss(x, target, k, EPSILON, B, **more) for k in (1, 4)])
    given = noised_topk_loss(x, target, (1, 4), EPSILON, B, rank_weights=(0.25, 3), **more)
    torch.testing.assert_close(given, 0.25 * each[0] + 3 * each[1])
    (expected,) = torch.autograd.grad((0.25 * each[0] + 3 * each[1]).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(given.sum(), x)[0], expected)


@every_link
@every_backend
@pytest.mark.parametrize("form", ["plain", "linear"])
def test_an_infinite_weight_of_a_class_without_rows_does_not_count(form, backend, name):
    """1 / counts has one where a count is 0, and class 0 is the one whose numbers ignored rows would take."""
    x, weight, _, target = layer()
    target = target.clamp(min=1).index_fill(0, torch.tensor([2]), -100)
    args = (x @ weight.detach().t(),) if form == "plain" else (x, weight)
    function = noised_topk_loss if form == "plain" else linear_noised_topk_loss
    results = []
    for first in (math.inf, 1.0):
        more = dict(weight=WEIGHT.index_fill(0, torch.tensor(0), first), backend=backend, seed=SEED) | LINKS[name]
        loss = function(*args, target, (1, 4), **more)
        results.append((loss.detach(), *torch.autograd.grad(loss, x, retain_graph=True)))
    assert_same(*results)
    assert results[0][0].isfinite()


@every_link
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_classes_are_those_of_cross_entropy(reduction, name):
    x, target = batch()
    plain = noised_topk_loss(x, target, (1, 3), **common(), **LINKS[name])
    given = noised_topk_loss(x, target, (1, 3), weight=WEIGHT, **common(reduction=reduction), **LINKS[name])
    own = WEIGHT.double()[target.clamp(min=0)].masked_fill(target == -100, 0.0)
    expected = {"none": plain * own, "sum": (plain * own).sum(), "mean": (plain * own).sum() / own.sum()}[reduction]
    torch.testing.assert_close(given, expected)
    gradients = [torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in (given, expected)]
    torch.testing.assert_close(*gradients)
    if reduction == "mean":  # nll_loss of the losses as log-probabilities is torch's own rule
        log_p = torch.zeros(N, L, dtype=torch.float64).scatter(
            1, target.clamp(min=0)[:, None], -plain.detach()[:, None]
        )
        torch.testing.assert_close(given.detach(), F.nll_loss(log_p, target, WEIGHT.double()))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_an_offset_is_added_to_the_scores(dtype, backend):
    x, target = batch(dtype)
    given = noised_topk_loss(x, target, (1, 5), offset=OFFSET, backend=backend, **common())
    moved = x + OFFSET.to(dtype)
    assert moved.dtype == dtype
    expected = noised_topk_loss(moved, target, (1, 5), backend=backend, **common())
    assert_same(given, expected)
    assert_same(*(torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in (given, expected)))


def test_presets():
    """The paper's losses and the sampled cross-entropy are cases of the family, to the last bit."""
    x, target = batch(torch.float32)
    assert_same(bal_noised_topk_loss(x, target, 3, 0.5, **common()), noised_topk_loss(x, target, 3, 0.5, **common()))
    assert_same(
        imbal_noised_topk_loss(x, target, 3, MARGINS, 0.5, 20.0, **common()),
        noised_topk_loss(x, target, 3, 0.5, margin=MARGINS, scale=20.0, **common()),
    )
    given = sampled_cross_entropy(x, target, 9, weight=WEIGHT, offset=OFFSET, **common())
    more = dict(link="identity", margin=0.0, noise="gumbel", weight=WEIGHT, offset=OFFSET)
    assert_same(given, noised_topk_loss(x, target, 0, 1.0, 9, **more, **common()))
    excess = noised_excess(x, target, 0, 1.0, 9, noise="gumbel", seed=SEED, sampler="dense")
    assert_same(sampled_cross_entropy(x, target, 9, **common()), excess)
    assert (sampled_cross_entropy(50 * F.one_hot(target.clamp(min=0), L).float(), target, 1, **common()) < 0).any()


def test_the_recommended_loss_keeps_a_gradient_in_every_row():
    """A softplus without the target: also where the true class leads by far; a hinge has none there."""
    x = torch.randn(N, L, generator=torch.Generator().manual_seed(0))
    target = x.argmax(1)
    x = (x + 5 * F.one_hot(target, L)).requires_grad_()
    for link, some in (("softplus", True), ("hinge", False)):
        more = dict(link=link, exclude_target=True, margin=0.0, reduction="sum", seed=SEED)
        (grad,) = torch.autograd.grad(noised_topk_loss(x, target, (1, 5), **more), x)
        assert grad.any(1).all() if some else not grad.any()
        torch.testing.assert_close(grad.sum(1), torch.zeros(N), rtol=0, atol=1e-6)


def test_a_cold_softplus_is_the_hinge_and_a_large_argument_does_not_overflow():
    x, target = batch()
    hinge = noised_topk_loss(x, target, (1, 5), **common())
    cold = noised_topk_loss(x, target, (1, 5), link="softplus", temperature=1e-3, **common())
    torch.testing.assert_close(
        cold, hinge, rtol=0, atol=2 * 1e-3 * math.log(2)
    )  # softplus less hinge: at most tau ln 2
    far = noised_topk_loss(1e4 * x.detach().float(), target, 1, link="softplus", temperature=0.5, **common())
    assert far.isfinite().all() and far.max() > 1e3


@every_link
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_and_dtypes(reduction, name):
    more = dict(weight=WEIGHT, offset=OFFSET, reduction=reduction, seed=SEED) | LINKS[name]
    x, target = batch(torch.bfloat16)
    images = x.detach().view(N, L, 1, 1).expand(N, L, 2, 3), target.view(N, 1, 1).expand(N, 2, 3)
    for inputs, shape in ((images, (N, 2, 3)), ((x[0].detach(), target[0]), ()), ((x, target), (N,))):
        loss = noised_topk_loss(*inputs, (1, 3), **more)
        assert loss.dtype == torch.float32 and loss.shape == (shape if reduction == "none" else ())


@every_link
@every_backend
def test_nan_is_never_hidden(backend, name):
    x, target = batch(torch.float32)
    with torch.no_grad():
        x[4, 7] = NAN
    losses = noised_topk_loss(x, target, (1, 3), weight=WEIGHT, backend=backend, **common(), **LINKS[name])
    assert losses.isnan().tolist() == [i == 4 for i in range(N)]
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert grad[4].isnan().all() and not grad[[0, 1, 2, 3, 5, 6]].isnan().any()


def test_class_offsets():
    prior = torch.tensor([0.7, 0.2, 0.1])
    torch.testing.assert_close(class_offsets([70, 20, 10]), prior.log())
    torch.testing.assert_close(class_offsets(torch.tensor([70, 20, 10]), tau=2.0), 2 * prior.log())
    assert class_offsets([1, 2], tau=0).tolist() == [0.0, 0.0] and class_offsets([5.0]).dtype == torch.float32
    with torch.device("meta"):
        assert class_offsets([1, 2]).is_meta
    with pytest.raises(ValueError, match="tau must be at least 0, got -1.0"):
        class_offsets([1, 2], tau=-1)
    with pytest.raises(ValueError, match="cls_num_list must hold positive counts, got 0 for class 1"):
        class_offsets([1, 0])


# Derivatives


@every_link
@pytest.mark.parametrize("exclude_target", [False, True])
def test_gradcheck(exclude_target, name):
    x, target = batch()
    more = dict(weight=WEIGHT, offset=OFFSET, rank_weights=(1.0, 0.5), exclude_target=exclude_target, seed=SEED)

    def run(x):
        return noised_topk_loss(x, target, (1, 4), EPSILON, 4, reduction="none", **more, **LINKS[name])

    assert gradcheck(run, x)
    assert gradgradcheck(run, x, atol=1e-6)


@pytest.mark.slow
@every_link
@pytest.mark.parametrize("chunk", [None, 9])
def test_gradcheck_of_the_linear_form(chunk, name):
    x, weight, bias, target = layer()
    more = dict(weight=WEIGHT, offset=OFFSET, chunk_size=chunk, seed=SEED, reduction="none") | LINKS[name]

    def run(x, weight, bias):
        return linear_noised_topk_loss(x, weight, target, (1, 4), EPSILON, 4, linear_bias=bias, **more)

    assert gradcheck(run, (x, weight, bias))
    assert gradgradcheck(run, (x, weight, bias), atol=1e-6)


def epsilon_of(value=0.7):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@every_link
@pytest.mark.parametrize("noise", ["normal", "gumbel"])
def test_epsilon_is_learned(noise, name):
    """Gradcheck in epsilon and scores together, and the values of the same number as epsilon."""
    x, target = batch()
    more = dict(noise=noise, weight=WEIGHT, offset=OFFSET, reduction="none", seed=SEED) | LINKS[name]

    def run(x, epsilon):
        return noised_topk_loss(x, target, (1, 4), epsilon, 4, **more)

    assert gradcheck(run, (x, epsilon_of()))
    torch.testing.assert_close(run(x, epsilon_of()), run(x, 0.7))


@pytest.mark.parametrize("normalize", [False, True])
def test_epsilon_is_learned_in_the_linear_form(normalize):
    x, weight, bias, target = layer()

    def run(x, weight, bias, epsilon):
        more = dict(linear_bias=bias, normalize=normalize, offset=OFFSET, seed=SEED, reduction="none")
        return linear_noised_topk_loss(x, weight, target, (1, 4), epsilon, 4, link="softplus", **more)

    assert gradcheck(run, (x, weight, bias, epsilon_of()))
    torch.testing.assert_close(run(x, weight, bias, epsilon_of()), run(x, weight, bias, 0.7))


def test_epsilon_is_learned_in_values_and_excesses():
    x, target = batch()
    assert gradcheck(lambda x, e: noised_topk(x, (1, 3), e, 4, seed=SEED), (x, epsilon_of()))
    assert gradcheck(lambda x, e: noised_excess(x, target, (1, 3), e, 4, seed=SEED), (x, epsilon_of()))
    x, weight, bias, target = layer()
    epsilons = [epsilon_of() for _ in range(2)]
    more = dict(linear_bias=bias, offset=OFFSET, seed=SEED)
    for epsilon, sparse in zip(epsilons, (True, False)):
        linear_noised_topk_loss(x, weight, target, 1, epsilon, sparse_grad=sparse, **more).backward()
    torch.testing.assert_close(*(epsilon.grad for epsilon in epsilons))
    values, _ = noised_topk_candidates(x.detach(), 2, epsilon_of(), seed=SEED)
    assert not values.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.7, 1e-4])
@pytest.mark.parametrize("form", ["plain", "linear"])
def test_a_learned_epsilon_has_the_bits_of_a_number(form, value, dtype):
    x, weight, _, target = layer(dtype)
    args = (x @ weight.t(),) if form == "plain" else (x, weight)
    function = noised_excess if form == "plain" else linear_noised_excess
    epsilon = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    learned = function(*args, target, (1, 4), epsilon, 4, seed=SEED)
    assert_same(learned.detach(), function(*args, target, (1, 4), value, 4, seed=SEED).detach())
    learned.sum().backward()
    assert 0 < epsilon.grad.abs() < 5 * learned.numel()


@pytest.mark.parametrize("form", ["plain", "linear"])
def test_a_learned_epsilon_with_masked_classes_and_ignored_rows(form):
    """Neither scores of -inf nor a NaN in an ignored row reach epsilon's gradient."""
    x, weight, _, target = (t.detach() for t in layer())
    target = torch.arange(len(target)).index_fill(0, torch.tensor([1]), -100)
    x[1] = math.nan
    function = noised_topk_loss if form == "plain" else linear_noised_topk_loss
    for n_classes in (L - 1, 3):  # with the latter an excess is -inf
        epsilon, offset = epsilon_of(), OFFSET.index_fill(0, torch.arange(n_classes, L), -math.inf)
        args = (x @ weight.t(),) if form == "plain" else (x, weight)
        loss = function(*args, target.clamp(max=n_classes - 1), 4, epsilon, offset=offset, seed=SEED)
        loss.backward()
        assert loss.isfinite() and epsilon.grad.isfinite() and (epsilon.grad != 0) == (n_classes > 3)


@every_link
@pytest.mark.parametrize("form", ["plain", "linear"])
def test_epsilon_is_learned_in_compiled_and_exported_code(form, name):
    """One full graph for all values, with the gradients of eager mode; an exported graph trains epsilon too."""
    x, weight, _, target = layer(torch.float32)
    weight = weight.detach()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.epsilon = torch.nn.Parameter(torch.tensor(0.7))

        def forward(self, x, target):
            args = (F.linear(x, weight),) if form == "plain" else (x, weight)
            loss_of = noised_topk_loss if form == "plain" else linear_noised_topk_loss
            return loss_of(*args, target, (1, 4), self.epsilon, 4, seed=SEED, **LINKS[name])

    step = Step()
    exported = torch.export.export(step, (x, target)).module()
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    step(x, target).backward()
    expected = x.grad, step.epsilon.grad
    for run, epsilon in ((compiled, step.epsilon), (exported, exported.epsilon)):
        x.grad = epsilon.grad = None
        run(x, target).backward()
        torch.testing.assert_close((x.grad, epsilon.grad), expected)
    torch._dynamo.reset()


def test_a_module_learns_its_epsilon():
    torch.manual_seed(0)
    criterion = NoisedTopKLoss(epsilon=torch.nn.Parameter(torch.tensor(1.0)))
    x, target = batch(torch.float32)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    criterion(x, target).backward()
    optimizer.step()
    assert criterion.epsilon < 1.0  # the loss grows with epsilon
    assert {*criterion.state_dict()} == {"epsilon"}
    head = LinearHead(D, L, criterion)
    assert "criterion.epsilon" in dict(head.named_parameters())


# The linear forms


@every_link
@every_backend
@pytest.mark.parametrize("chunk", [None, 9])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_plain(has_bias, chunk, backend, name):
    """Bit for bit with the dense sampler where logits have no rounding; an offset of integers joins the bias."""
    x, weight, bias, target = layer(torch.float32, exact=True)
    bias = bias if has_bias else None
    more = dict(offset=OFFSET.round(), weight=WEIGHT, rank_weights=(1.0, 0.5), backend=backend) | common() | LINKS[name]
    given = linear_noised_topk_loss(x, weight, target, (1, 4), linear_bias=bias, chunk_size=chunk, **more)
    assert_same(given, noised_topk_loss(F.linear(x, weight, bias), target, (1, 4), **more))


@every_backend
@pytest.mark.parametrize("chunk", [None, 9])
def test_linear_sampled_cross_entropy_is_plain(chunk, backend):
    x, weight, bias, target = layer(torch.float32, exact=True)
    more = dict(offset=OFFSET.round(), weight=WEIGHT, backend=backend) | common()
    given = linear_sampled_cross_entropy(x, weight, target, 9, linear_bias=bias, chunk_size=chunk, **more)
    expected = sampled_cross_entropy(F.linear(x, weight, bias), target, 9, **more)
    assert_same(given, expected)
    leaves = (x, weight, bias)
    for a, b in zip(*(torch.autograd.grad(loss.sum(), leaves) for loss in (given, expected))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [2, (0, 2, 5)], ids=str)
def test_linear_excess_is_plain(k):
    x, weight, bias, target = layer(torch.float32, exact=True)
    more = dict(noise="gumbel", seed=SEED, sampler="dense")
    given = linear_noised_excess(x, weight, target, k, 0.7, B, linear_bias=bias, chunk_size=9, **more)
    assert_same(given, noised_excess(F.linear(x, weight, bias), target, k, 0.7, B, **more))


def test_sparse_gradients_with_an_offset():
    """The offset joins the bias, whose gradient stays row-sparse, and has at most B + 1 rows for each sample."""
    x, weight, bias, target = layer(torch.float32)
    more = dict(linear_bias=bias, offset=OFFSET, seed=SEED, reduction="sum")
    grads = [
        torch.autograd.grad(linear_sampled_cross_entropy(x, weight, target, 2, sparse_grad=s, **more), (weight, bias))
        for s in (True, False)
    ]
    for sparse, dense in zip(*grads):
        assert sparse.is_sparse and sparse.coalesce().indices().shape[1] <= (N - 1) * (2 + 1)
        torch.testing.assert_close(sparse.to_dense(), dense)


# Modules

MODULES = {
    "sampled": lambda **more: SampledCrossEntropy(9, offset=OFFSET, weight=WEIGHT, **more),
    "family": lambda **more: NoisedTopKLoss(
        (1, 4), link="softplus", margin=MARGINS, offset=OFFSET, weight=WEIGHT, rank_weights=(1.0, 0.5), **more
    ),
    "defaults": lambda **more: NoisedTopKLoss(**more),
    "balanced": lambda **more: BalNoisedTopK(4, 1.0, **more),
    "imbalanced": lambda **more: ImbalNoisedTopK(4, 0.5, 0.3, range(1, L + 1), **more),
}
FUNCTIONS = {
    "sampled": lambda x, y, **more: sampled_cross_entropy(x, y, 9, offset=OFFSET, weight=WEIGHT, **more),
    "family": lambda x, y, **more: noised_topk_loss(
        x, y, (1, 4), link="softplus", margin=MARGINS, offset=OFFSET, weight=WEIGHT, rank_weights=(1.0, 0.5), **more
    ),
    "defaults": noised_topk_loss,
    "balanced": lambda x, y, **more: bal_noised_topk_loss(x, y, 4, 1.0, **more),
    "imbalanced": lambda x, y, **more: imbal_noised_topk_loss(
        x, y, 4, class_margins(range(1, L + 1), 0.3), 0.5, **more
    ),
}
every_module = pytest.mark.parametrize("name", MODULES)


@every_module
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_modules_are_their_functions(reduction, name):
    x, target = batch(torch.float32)
    more = dict(seed=SEED, reduction=reduction, ignore_index=-100, backend="torch")
    assert_same(MODULES[name](**more)(x, target), FUNCTIONS[name](x, target, **more))


@every_module
def test_a_head_takes_every_module(name):
    torch.manual_seed(0)
    head = LinearHead(D, L, MODULES[name](seed=SEED, sampler="dense"))
    x, _, _, target = layer(torch.float32)
    torch.testing.assert_close(head(x, target), head.criterion(head.logits(x), target))
    assert head.logits(x).shape == (N, L)
    assert_same(copy.deepcopy(head)(x, target), head(x, target))
    shaped = head(x.view(1, N, D), target.view(1, N))
    assert_same(shaped, head(x, target))


@every_module
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_leave_the_numbers_of_classes_exact(cast, name):
    module = torch.nn.Sequential(MODULES[name](seed=SEED))
    exact = {key: x.clone() for key, x in module.state_dict().items()}
    assert {*exact} == {
        "sampled": {"0.offset", "0.weight"},
        "family": {"0.offset", "0.weight", "0.margin"},
        "imbalanced": {"0.m_list"},
    }.get(name, set())
    getattr(module, cast)()
    for key, x in module.state_dict().items():
        assert_same(x, exact[key])


# Errors


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (dict(offset=torch.ones(L - 1)), ValueError, r"offset must have shape \[L\] = \[40\], got \[39\]"),
        (dict(offset=[0.0] * L), TypeError, "offset must be a tensor, got list"),
        (dict(offset=torch.ones(L, requires_grad=True)), ValueError, "offset must hold constants, .* offset.detach"),
        (dict(offset=torch.ones(L, device="meta")), ValueError, "offset must be on input's device cpu, got meta"),
        (dict(weight=torch.ones(L + 1)), ValueError, r"weight must have shape \[L\] = \[40\], got \[41\]"),
        (dict(weight=torch.ones(L).long()), TypeError, "weight must be floating point, got torch.int64"),
        (dict(margin=torch.ones(3)), ValueError, r"margins must have shape \[L\] = \[40\], got \[3\]"),
        (dict(link="relu"), ValueError, "link must be 'hinge', 'softplus' or 'identity', got 'relu'"),
        (dict(temperature=0.5), ValueError, "temperature belongs to link='softplus', got 0.5 with link='hinge'"),
        (dict(rank_weights=(1.0,)), ValueError, "rank_weights must have a number for each of the 2 ranks of k, got 1"),
        (dict(rank_weights=(1.0, -1.0)), ValueError, "rank_weights must be at least 0, got -1.0"),
        (dict(rank_weights=torch.ones(2)), TypeError, "rank_weights must be a sequence of numbers, got Tensor"),
        (dict(k=(0, 5), exclude_target=True), ValueError, r"k must be in \[1, L - 1\] = \[1, 39\], got 0"),
        (dict(k=(1, L)), ValueError, r"k must be in \[0, L - 1\] = \[0, 39\], got 40"),
        (dict(target=torch.ones(N, L)), TypeError, "soft targets .* are not supported; mix losses of several index"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else "",
)
def test_errors(bad, error, message):
    x, target = batch()
    with pytest.raises(error, match=message):
        noised_topk_loss(**(dict(input=x, target=target) | bad))


def test_a_head_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match="criterion must be a loss module of topk_fast, .* got CrossEntropyLoss"):
        LinearHead(D, L, torch.nn.CrossEntropyLoss())

    class Halved(SampledCrossEntropy):
        def forward(self, input, target):
            return super().forward(input, target) / 2

    with pytest.raises(TypeError, match="LinearHead does not call its criterion's forward, which Halved overrides"):
        LinearHead(D, L, Halved())
    with pytest.raises(ValueError, match=r"weight must have shape \[L\] = \[39\], got \[40\]"):
        LinearHead(D, L - 1, MODULES["sampled"]())
    with pytest.raises(ValueError, match=r"k must be in \[0, L - 1\] = \[0, 3\], got 5"):
        LinearHead(D, 4, NoisedTopKLoss())
