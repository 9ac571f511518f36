"""Contract under test: linear + loss in one is the loss of the linear layer's logits, without the logits.

For equal logits, losses are equal bit for bit: where one chunk holds whole rows with both samplers, in any chunks with
the dense one. Gradients differ by the rounding of their sums.
"""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from testing import BACKENDS, NAN
from topk_fast import BalNoisedTopK, ImbalNoisedTopK, LinearHead, NoisedTopKLoss, NormedLinear, heads, linear_op, ops
from topk_fast import nn as nn_module
from topk_fast.functional import (
    bal_noised_topk_loss,
    class_margins,
    imbal_noised_topk_loss,
    linear_noised_topk_loss,
    linear_topk,
    noised_topk_loss,
)
from topk_fast.request import Labels, Layer, Noise

N, D, L, K = 12, 16, 700, 5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MARGINS = class_margins(range(1, L + 1), 0.5)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KINDS = {  # normalize, bias, margins
    "plain": (False, False, None),
    "with a bias": (False, True, None),
    "cosine logits": (True, False, None),
    "cosine logits, margins and bias": (True, True, MARGINS),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def layer(dtype=torch.float32, n_rows=N, exact=False, seed=0):
    """Features, weight, bias and target; ``exact``: small integers, whose matmul has no rounding in any order."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((n_rows, D), (L, D), (L,)))
    if exact:
        x, weight, bias = ((2 * t).round() for t in (x, weight, bias))
    target = torch.randint(L, (n_rows,), generator=generator)
    target[n_rows // 3 : n_rows // 3 + 1] = -100
    return *(t.to(dtype).requires_grad_() for t in (x, weight, bias)), target


def unfused(x, weight, bias, target, kind, **more):
    normalize, has_bias, margins = KINDS[kind]
    if normalize:  # lengths and quotients in float32 at least
        x, weight = (
            F.normalize(t.double() if t.dtype == torch.float64 else t.float(), dim=-1).to(t.dtype) for t in (x, weight)
        )
    logits = F.linear(x, weight, bias if has_bias else None)
    if logits.dim() > 2:
        logits = logits.movedim(-1, 1)
    if margins is None:
        return bal_noised_topk_loss(logits, target, K, 0.3, seed=3, **more)
    return imbal_noised_topk_loss(logits, target, K, margins, 0.3, 20.0, seed=3, **more)


def fused(x, weight, bias, target, kind, **more):
    normalize, has_bias, margins = KINDS[kind]
    return linear_noised_topk_loss(
        x,
        weight,
        target,
        K,
        0.3,
        linear_bias=bias if has_bias else None,
        margin=1.0 if margins is None else margins,
        scale=1.0 if margins is None else 20.0,
        normalize=normalize,
        seed=3,
        **more,
    )


def gradients(loss, *leaves):
    return torch.autograd.grad(loss.sum(), leaves, allow_unused=True)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# The loss


@every_kind
@every_dtype
@every_backend
@pytest.mark.parametrize("sampler", ["thinned", "dense"])
def test_whole_rows_have_the_bits_of_the_unfused_loss(sampler, backend, dtype, kind):
    args = layer(dtype)
    common = dict(sampler=sampler, backend=backend, reduction="none")
    same(fused(*args, kind, chunk_size=L, **common), unfused(*args, kind, **common))


@every_dtype
@every_backend
@pytest.mark.parametrize("chunk", [1, 7, 350, 699])
def test_chunks_with_the_dense_sampler_have_the_same_bits(chunk, backend, dtype):
    args = layer(dtype, exact=True)
    common = dict(sampler="dense", backend=backend, reduction="none")
    same(fused(*args, "with a bias", chunk_size=chunk, **common), unfused(*args, "with a bias", **common))


@pytest.mark.parametrize("chunk", [90, None])
@pytest.mark.parametrize("sampler", ["thinned", "dense"])
def test_tiles_of_rows_change_nothing(monkeypatch, sampler, chunk):
    args = layer(exact=True)
    expected = fused(*args, "plain", chunk_size=chunk, sampler=sampler, reduction="none")
    monkeypatch.setattr(linear_op, "_ROWS", 5)
    same(fused(*args, "plain", chunk_size=chunk, sampler=sampler, reduction="none"), expected)


def test_chunks_with_the_thinned_sampler_have_the_same_distribution():
    """Many rows alike; classes of the second best noised logit and losses, in five chunks and in one."""
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(1, D, generator=generator).repeat(3000, 1), torch.randn(4000, D, generator=generator) / 4
    target = torch.full((3000,), int((x[:1] @ weight.t()).argmin()))
    found = []
    for seed, chunk in ((1, 800), (2, 4000)):
        bias = torch.zeros(4000, requires_grad=True)
        losses = linear_noised_topk_loss(
            x, weight, target, 1, n_sample=1, linear_bias=bias, seed=seed, chunk_size=chunk, reduction="none"
        )
        losses.sum().backward()
        found.append((losses.detach(), bias.grad))
    p = stats.ks_2samp(*(losses.numpy() for losses, _ in found)).pvalue
    table = torch.stack([counts for _, counts in found])
    table = table[:, (table >= 0).all(0)]  # without the true class, which has all rows less
    often = table.sum(0) >= 20
    table = torch.cat([table[:, often], table[:, ~often].sum(1, keepdim=True)], dim=1)
    q = stats.chi2_contingency(table.numpy()).pvalue
    print(f"KS p = {p:.3g}, chi-square p = {q:.3g} over {table.shape[1]} classes")
    assert table.shape[1] > 20 and min(p, q) > 1e-4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_ignored_rows(reduction):
    x, weight, bias, target = layer(torch.float64)
    target[:4] = 9
    more = dict(reduction=reduction, ignore_index=9)
    target[target == -100] = 3
    args = (x, weight, bias, target)
    given, expected = fused(*args, "plain", **more), unfused(*args, "plain", **more)
    same(given, expected)
    grads = gradients(given, x, weight)
    assert not grads[0][:4].any() and grads[0][4:].any()
    for a, b in zip(grads, gradients(expected, x, weight)):
        torch.testing.assert_close(a, b)


def test_all_rows_ignored():
    x, weight, bias, target = layer()
    loss = fused(x, weight, bias, target.fill_(-100), "with a bias")
    assert loss.isnan()  # the mean of nothing, as in cross_entropy
    for grad in gradients(fused(x, weight, bias, target, "with a bias", reduction="sum"), x, weight, bias):
        assert not grad.any()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_leading_dimensions(reduction, shape):
    _, weight, bias, _ = layer()
    x = torch.randn(*shape, D, requires_grad=True)
    target = torch.randint(L, shape)
    given = fused(x, weight, bias, target, "plain", reduction=reduction)
    assert given.shape == (shape if reduction == "none" else ())
    if len(shape) == 1:
        same(given, unfused(x, weight, bias, target, "plain", reduction=reduction))
    flat = fused(x.reshape(-1, D), weight, bias, target.reshape(-1), "plain", reduction=reduction)
    same(given.reshape(flat.shape), flat)
    grads = gradients(given, x, weight)
    assert grads[0].shape == x.shape and grads[1].shape == weight.shape


# Gradients


@every_kind
@every_dtype
@every_backend
@pytest.mark.parametrize("chunk", [None, 64])
def test_gradients_are_those_of_the_unfused_loss(chunk, backend, dtype, kind):
    """Logits are the same; sums over B + 1 weights and over rows are rounded once to the dtype here, in one matmul
    there.

    Tolerance: a few roundings of the dtype, relative to the largest entry.
    """
    x, weight, bias, target = layer(dtype, exact=KINDS[kind][0] is False)
    leaves = (x, weight, bias) if KINDS[kind][1] else (x, weight)
    common = dict(sampler="dense", backend=backend, reduction="sum")
    given = gradients(fused(x, weight, bias, target, kind, chunk_size=chunk, **common), *leaves)
    expected = gradients(unfused(x, weight, bias, target, kind, **common), *leaves)
    for a, b in zip(given, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and b.any()
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert error <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision_are_float32_ones_rounded_once(dtype):
    """Small integers make logits, and so classes, the same in both; what is left is the last rounding."""
    half, wide = layer(dtype, exact=True), layer(exact=True)
    common = dict(sampler="dense", reduction="sum")
    given = gradients(fused(*half, "with a bias", **common), *half[:3])
    expected = gradients(fused(*wide, "with a bias", **common), *wide[:3])
    for a, b in zip(given, expected, strict=True):
        assert b.any()
        same(a, b.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 11])
def test_gradcheck(chunk, kind):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (L, 3), (L,))
    )
    target = torch.tensor([0, 5, -100, 699])

    def function(x, some_weight, some_bias):
        return fused(
            x,
            torch.cat([some_weight, weight[20:].detach()]),
            torch.cat([some_bias, bias[20:].detach()]),
            target,
            kind,
            chunk_size=chunk,
            reduction="none",
        )

    assert torch.autograd.gradcheck(
        function, (x, weight[:20].detach().requires_grad_(), bias[:20].detach().requires_grad_())
    )


def small_layer():
    """float64, few of the weight's rows free, so that gradgradcheck takes seconds; one ignored row, and equal
    classes.
    """
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (9, 3), (9,))
    )
    return x, weight, bias, torch.tensor([0, 5, -100, 5])


@pytest.mark.parametrize("kind", ["plain", "with a bias", "cosine logits"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_gradgradcheck(chunk, kind):
    normalize, has_bias, _ = KINDS[kind]
    x, weight, bias, target = small_layer()

    def function(x, weight, bias):
        return linear_noised_topk_loss(
            x,
            weight,
            target,
            2,
            0.3,
            linear_bias=bias if has_bias else None,
            normalize=normalize,
            chunk_size=chunk,
            seed=3,
            reduction="none",
        )

    losses = function(x, weight, bias)
    assert (losses > 0).sum() == 3, "a hinge that is closed has no second derivative to check"
    assert torch.autograd.gradgradcheck(function, (x, weight, bias), atol=1e-7)


@every_kind
def test_derivatives_where_the_incoming_gradient_is_zero(kind):
    """As in weights of the rows that are learned and start at 0: the loss after a step depends on them."""
    x, weight, bias, target = layer(torch.float64)
    found = []
    for function in (fused, unfused):
        rows = torch.zeros(N, dtype=torch.float64, requires_grad=True)
        step = torch.autograd.grad(
            (rows * function(x, weight, bias, target, kind, reduction="none")).sum(), (x, weight), create_graph=True
        )
        after = function(x - step[0], weight - step[1], bias, target, kind)
        found.append(torch.autograd.grad(after, rows)[0])
    assert found[1].count_nonzero() > N / 2
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
def test_features_of_ignored_rows_do_not_matter(create_graph):
    """Also where a graph of the derivative holds the entries that are 0."""
    x, weight, bias, target = layer(torch.float64)
    ignored, leaves = target == -100, (weight, bias)
    expected = torch.autograd.grad(fused(x, *leaves, target, "with a bias"), leaves)
    bad = x.detach().masked_fill(ignored[:, None], NAN)
    found = torch.autograd.grad(fused(bad, *leaves, target, "with a bias"), leaves, create_graph=create_graph)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_batches_of_incoming_gradients_say_what_to_do():
    x, weight, bias, target = layer()
    losses = fused(x, weight, bias, target, "plain", reduction="none")
    with pytest.raises(RuntimeError, match="torch.vmap does not batch topk_fast"):
        torch.autograd.grad(losses, x, torch.eye(N), is_grads_batched=True)


def test_features_of_no_length():
    """As of a torch.nn.Linear: the logits are the bias."""
    bias = torch.randn(L, generator=torch.Generator().manual_seed(0))
    target = torch.arange(N)
    options = {"k": 2, "epsilon": 0.5, "seed": 1}
    found = linear_noised_topk_loss(torch.ones(N, 0), torch.ones(L, 0), target, linear_bias=bias, **options)
    assert found == noised_topk_loss(bias.expand(N, L), target, **options)


@every_kind
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_are_those_of_the_unfused_loss(power, kind):
    """A penalty on the gradient: its own gradient with the loss's curvature (power 2) and without, once and thrice
    taken.
    """
    x, weight, bias, target = layer(torch.float64)
    leaves = (x, weight, bias)
    found = []
    for function in (fused, unfused):
        loss = function(*leaves, target, kind) ** power
        first = torch.autograd.grad(loss, (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight), create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), (x, weight))
        found.append((*(g.detach() for g in (*first, *second)), *third))
    assert all(g.any() for g in found[1])
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_second_derivatives_through_torch_func():
    x, weight, bias, target = layer(torch.float64)
    x, weight, bias = (t.detach() for t in (x, weight, bias))

    def penalty(function):
        def of(weight):
            return torch.func.grad(lambda w: function(x, w, bias, target, "plain"))(weight).square().sum()

        return torch.func.grad(of)(weight)

    def crossed(function):
        of_x = lambda w: torch.func.grad(lambda x: function(x, w, bias, target, "plain"))(x).square().sum()  # noqa: E731
        return torch.func.grad(of_x)(weight)

    torch.testing.assert_close(penalty(fused), penalty(unfused))
    torch.testing.assert_close(crossed(fused), crossed(unfused))
    assert crossed(unfused).any()


def test_a_sparse_gradient_has_no_second_derivative():
    x, weight, bias, target = layer()
    loss = fused(x, weight, bias, target, "plain", sparse_grad=True)
    with pytest.raises(RuntimeError, match="neither a second derivative nor one of torch.func: pass sparse_grad"):
        torch.autograd.grad(loss, weight, create_graph=True)


@every_kind
def test_a_sparse_gradient_is_the_dense_one(kind):
    x, weight, bias, target = layer()
    leaves = (x, weight, bias) if KINDS[kind][1] else (x, weight)
    dense = gradients(fused(x, weight, bias, target, kind), *leaves)
    given = gradients(fused(x, weight, bias, target, kind, sparse_grad=True), *leaves)
    same(given[0], dense[0])
    for sparse, whole in zip(given[1:], dense[1:], strict=True):
        assert sparse.is_sparse and sparse.is_coalesced() and sparse.dtype == weight.dtype
        assert 0 < sparse._nnz() <= N * 6 and (sparse.indices()[0].diff() > 0).all()
        same(sparse.to_dense(), whole)
        assert {*whole.nonzero()[:, 0].tolist()} <= {*sparse.indices()[0].tolist()}
    same(given[1].indices()[0], dense[1].any(1).nonzero()[:, 0])  # no row without an entry


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_optimizers_take_sparse_gradients_and_touch_no_other_row(optimizer):
    x, weight, _, target = layer()
    stepped = []
    for sparse in (True, False):
        parameter = nn.Parameter(weight.detach().clone())
        linear_noised_topk_loss(x, parameter, target, k=K, epsilon=0.3, seed=1, sparse_grad=sparse).backward()
        if not sparse:
            parameter.grad = parameter.grad.to_sparse(1)
        optimizer([parameter], lr=0.1).step()
        stepped.append((parameter.detach(), parameter.grad.coalesce()))
    (given, grad), (expected, _) = stepped
    same(given, expected)
    changed = (given != weight).any(1).nonzero()[:, 0]
    assert torch.equal(changed, grad.indices()[0]) and 0 < len(changed) <= N * 6


@pytest.mark.parametrize("bias", [True, False])
def test_sparse_adam_takes_a_whole_head(bias):
    """Its default bias too, whose gradient is as sparse as the weight's."""
    head = LinearHead(D, L, BalNoisedTopK(K, 0.3, seed=1), bias=bias, sparse_grad=True)
    before = [p.detach().clone() for p in head.parameters()]
    x, _, _, target = layer()
    head(x, target).backward()
    torch.optim.SparseAdam(head.parameters(), lr=0.1).step()
    for parameter, old in zip(head.parameters(), before):
        changed = (parameter != old).flatten(1).any(1) if parameter.dim() > 1 else parameter != old
        assert 0 < changed.sum() <= N * 6


def test_sparse_gradients_of_computed_weights():
    """weight_norm makes the weight anew in every forward; its derivative takes dense gradients alone."""
    head = nn.utils.parametrizations.weight_norm(LinearHead(D, L, BalNoisedTopK(K, 0.3), sparse_grad=True))
    x, _, _, target = layer()
    with pytest.raises(
        ValueError, match="sparse_grad=True needs a weight that is a leaf .* computed by .*: pass sparse"
    ):
        head(x, target)
    head.sparse_grad = False
    head(x, target).backward()
    assert all(p.grad.any() for p in head.parameters())


def test_rows_without_loss_touch_nothing():
    x, weight, _, target = layer()
    with torch.no_grad():
        weight[target.clamp(min=0)] += 100 * x  # far ahead of all margins
    losses = linear_noised_topk_loss(x, weight, target, k=K, epsilon=0.1, seed=1, reduction="none", sparse_grad=True)
    assert not losses.any()
    grads = gradients(losses, x, weight)
    assert not grads[0].any() and grads[1]._nnz() == 0


@pytest.mark.parametrize("missing", ["input", "weight", "bias", "all but bias"])
def test_gradients_that_nobody_wants(missing):
    x, weight, bias, target = layer()
    expected = gradients(fused(x, weight, bias, target, "with a bias"), x, weight, bias)
    wanted = {"input": (0, 1, 1), "weight": (1, 0, 1), "bias": (1, 1, 0), "all but bias": (0, 0, 1)}[missing]
    leaves = [t.requires_grad_(bool(on)) for t, on in zip((x, weight, bias), wanted)]
    fused(*leaves, target, "with a bias").backward()
    for leaf, on, grad in zip(leaves, wanted, expected):
        if on:
            same(leaf.grad, grad)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("sparse", [False, True])
def test_repeated_backwards_have_the_same_bits_with_any_number_of_threads(sparse):
    x, weight, bias, target = layer(n_rows=3000)
    target = target % 5  # many rows to add up
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            grads = gradients(
                linear_noised_topk_loss(x, weight, target, K, 0.3, linear_bias=bias, seed=1, sparse_grad=sparse),
                weight,
                bias,
            )
            results.append([g.to_dense() if g.is_sparse else g for g in grads])
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            same(a, b)


# Cosine logits of rows without a direction, and of very long ones


def head_of(form, dtype):
    """Cosine logits' loss as a function of rows and weight: the module's logits, or the linear form."""

    def loss(x, weight):
        if form == "fused":
            target = torch.zeros(len(x), dtype=torch.int64)
            return linear_noised_topk_loss(x, weight, target, k=1, epsilon=0.0, normalize=True, reduction="sum")
        head = NormedLinear(*weight.shape[::-1], dtype=dtype)
        logits = torch.func.functional_call(head, {"weight": weight}, x)
        return bal_noised_topk_loss(logits, torch.zeros(len(x), dtype=torch.int64), 1, 0.0, reduction="sum")

    return loss


every_form = pytest.mark.parametrize("form", ["fused", "module"])


@every_form
@every_dtype
@pytest.mark.parametrize("place", ["input", "weight"])
def test_rows_of_zeros(place, dtype, form):
    """Finite losses, and gradients bounded by the inverse of the shortest length: F.cosine_similarity's, but in
    float16.
    """
    x, weight = torch.eye(3, 4, dtype=dtype), torch.eye(5, 4, dtype=dtype) + 1
    weight[4] = -1
    (x if place == "input" else weight)[0] = 0
    x.requires_grad_(), weight.requires_grad_()
    loss = head_of(form, dtype)(x, weight)
    assert loss.isfinite()
    grads = torch.autograd.grad(loss, (x, weight))
    assert all(g.isfinite().all() for g in grads)
    shortest = max(1e-8, torch.finfo(dtype).tiny)
    worst = float(grads[place == "weight"][0].abs().max())
    assert 0 < worst <= 2 * len(x) / shortest


def test_rows_of_zeros_have_the_gradient_of_cosine_similarity():
    x, weight = torch.zeros(1, 4, requires_grad=True), torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    logits = nn_module.unit_rows(x) @ nn_module.unit_rows(weight).t()
    (given,) = torch.autograd.grad(logits.sum(), x)
    (expected,) = torch.autograd.grad(F.cosine_similarity(x, weight).sum(), x)
    torch.testing.assert_close(given, expected)
    assert given.abs().max() > 1e7


@every_form
def test_long_rows_in_float16(form):
    """Lengths above 65504, the largest float16: the logits, and so the gradient's direction, of rows a thousandth as
    long.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator) for s in ((3, 256), (5, 256)))
    x, weight = (t.to(torch.float16).float() for t in (x, weight))
    results = []
    for factor in (1.0, 8192.0):  # powers of two change no rounding
        leaves = [(t * factor).to(torch.float16).requires_grad_() for t in (x, weight)]
        assert (leaves[0].detach().float().norm(dim=1) > 65504).all() == (factor > 1)
        loss = head_of(form, torch.float16)(*leaves)
        results.append((loss.detach(), *(g.float() * factor for g in torch.autograd.grad(loss * 64, leaves))))
    (loss, *grads), (long_loss, *long_grads) = results
    same(long_loss, loss)
    for given, expected in zip(long_grads, grads):
        assert given.any()
        # The gradients of long rows are float16 subnormals: multiples of 2^-24, here times the factor.
        torch.testing.assert_close(given, expected, rtol=2**-9, atol=8192.0 * 2**-24)


@pytest.mark.parametrize(
    "make",
    [
        lambda **more: NormedLinear(D, L, **more),
        lambda **more: LinearHead(D, L, BalNoisedTopK(K, 0.3), normalize=True, bias=False, **more),
    ],
    ids=["layer", "head"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cosine_heads_start_with_rows_of_length_1(make, dtype):
    torch.manual_seed(0)
    head = make(dtype=dtype)
    for _ in range(2):
        weight = head.weight.detach().double()
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(L).double(), rtol=0, atol=4 * torch.finfo(dtype).eps)
        assert weight.mean().abs() < 0.02 and abs(weight.std() * D**0.5 - 1) < 0.02  # directions uniform on the sphere
        with torch.no_grad():
            head.weight.fill_(3.0)
        head.reset_parameters()


@pytest.mark.parametrize("place", ["input", "weight"])
def test_nan_is_never_hidden(place):
    x, weight, bias, target = layer()
    with torch.no_grad():
        (x if place == "input" else weight)[1, 2] = NAN
    losses = fused(x, weight, bias, target, "with a bias", reduction="none", chunk_size=100)
    bad = torch.arange(N) == 1 if place == "input" else target != -100
    same(losses.isnan(), bad)
    of_x, of_weight, of_bias = gradients(losses, x, weight, bias)
    assert of_x[bad].isnan().all() and not of_x[~bad].isnan().any()
    assert of_weight[target[bad]].isnan().all() and of_bias[target[bad]].isnan().all()


# Memory


class _Largest(TorchDispatchMode):
    """The largest number of bytes of a storage that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("normalize", [False, True])
def test_no_tensor_is_larger_than_a_chunk(normalize):
    """Chunks of 500 of 20 000 classes for 40 rows; with a sparse gradient nothing of the weight's size stands
    either.
    """
    x, weight = torch.randn(40, D, requires_grad=True), torch.randn(20_000, D, requires_grad=True)
    largest = _Largest()
    with largest:
        loss = linear_noised_topk_loss(
            x, weight, torch.arange(40), k=K, epsilon=1.0, normalize=normalize, chunk_size=500, sparse_grad=True
        )
    assert largest.bytes <= 40 * 500 * 4
    with largest:
        loss.backward()
    assert largest.bytes <= 40 * 500 * 4


def test_the_default_chunk_fits_its_budget(monkeypatch):
    x, weight, _, target = layer()
    monkeypatch.setitem(linear_op._BYTES, "cpu", 12 * 50 * 4)
    sizes = []
    kernel = ops.kernel

    def watched(name, backend):
        def call(scores, *args):
            if name == "candidates":
                sizes.append(tuple(scores.shape))
            return kernel(name, backend)(scores, *args)

        return call

    monkeypatch.setattr(ops, "kernel", watched)
    linear_noised_topk_loss(x, weight, target, k=K, epsilon=1.0)
    assert sizes == [(12, 50)] * 14


# Systems


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, kind):
    x, weight, bias, target = layer()
    with torch.autocast("cpu", dtype):
        given = fused(x, weight, bias, target, kind, reduction="none")
        expected = unfused(x, weight, bias, target, kind, reduction="none")
    same(given, expected)
    for a, b in zip(gradients(given, x, weight), gradients(expected, x, weight)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(
            a, b, rtol=8 * torch.finfo(dtype).eps, atol=float(b.abs().max()) * 8 * torch.finfo(dtype).eps
        )


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(normalize, backend):
    x, weight, bias, target = layer()
    op, excess = (ops.kernel(name, backend) for name in ("linear_candidates", "linear_excess"))
    wanted = Noise(torch.tensor(1), [1, 3], 0.5, None, n_sample=2, law=0, dense=False)
    options = Layer(normalize, 200, torch.float32, sparse=False, n_best=2)
    for b, y in ((bias, target), (None, None)):
        tensors = [None if t is None else t.detach() for t in (x, weight, b, y)]
        torch.library.opcheck(op, (*tensors, *wanted, *options, 100))
    for b, exclude_target in ((bias, False), (None, True)):
        ranked = wanted._replace(ranks=[2, 3])
        torch.library.opcheck(excess, (x, weight, b, *ranked, *Labels(target, -100, exclude_target), *options))


def test_one_graph_for_all_seeds():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    x, weight, bias, target = layer()

    def run(seed):
        return linear_noised_topk_loss(
            x, weight, target, K, 0.3, linear_bias=bias, seed=seed, normalize=True, chunk_size=99
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for seed in (1, 2, -3):
        given, expected = compiled(torch.tensor(seed)), run(torch.tensor(seed))
        same(given, expected)
        for a, b in zip(gradients(given, x, weight, bias), gradients(expected, x, weight, bias)):
            same(a, b)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_sparse_gradient_breaks_the_graph_or_says_why():
    x, weight, bias, target = layer()

    def run(weight):
        return linear_noised_topk_loss(x, weight, target, k=K, epsilon=0.3, seed=1, sparse_grad=True) * 2

    expected = gradients(run(weight), weight)[0]
    torch._dynamo.reset()
    given = gradients(torch.compile(run, backend="aot_eager")(weight), weight)[0]
    same(given.to_dense(), expected.to_dense())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="sparse_grad=True makes gradients whose number of rows"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(weight)
    torch._dynamo.reset()


def test_func_grad():
    x, weight, bias, target = layer()
    given = torch.func.grad(lambda w: fused(x.detach(), w, bias.detach(), target, "plain"))(weight.detach())
    same(given, gradients(fused(x, weight, bias, target, "plain"), weight)[0])


def test_without_gradient():
    args = layer()
    with torch.no_grad():
        loss = fused(*args, "plain")
    assert not loss.requires_grad
    same(loss, fused(*args, "plain"))


def test_deterministic_algorithms():
    x, weight, bias, target = layer()
    expected = gradients(fused(x, weight, bias, target, "with a bias"), x, weight, bias)
    torch.use_deterministic_algorithms(True)
    try:
        for a, b in zip(gradients(fused(x, weight, bias, target, "with a bias"), x, weight, bias), expected):
            same(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


# The k best logits


@pytest.mark.parametrize("chunk", [None, 1, 64])
@pytest.mark.parametrize("kind", ["with a bias", "cosine logits"])
@every_backend
def test_topk(backend, kind, chunk):
    x, weight, bias, _ = layer()
    normalize, has_bias, _ = KINDS[kind]
    a, w = (F.normalize(x, dim=-1), F.normalize(weight, dim=-1)) if normalize else (x, weight)
    logits = F.linear(a, w, bias if has_bias else None)
    values, classes = linear_topk(
        x.view(3, 4, D),
        weight,
        9,
        linear_bias=bias if has_bias else None,
        normalize=normalize,
        chunk_size=chunk,
        backend=backend,
    )
    assert values.shape == classes.shape == (3, 4, 9) and not values.requires_grad
    torch.testing.assert_close(values.view(N, 9), logits.topk(9).values)
    assert torch.equal(classes.view(N, 9), logits.topk(9).indices)


def test_topk_of_all_classes_and_of_nan():
    x, weight, _, _ = layer()
    values, classes = linear_topk(x, weight, L, chunk_size=100)
    assert torch.equal(classes.sort().values, torch.arange(L).expand(N, L)) and (values.diff() <= 0).all()
    with torch.no_grad():
        x[0, 0] = NAN
    values, classes = linear_topk(x, weight, 3, chunk_size=100)
    assert values[0].isnan().all() and (classes[0] == -2).all() and not values[1:].isnan().any()


# Hits of the loss's own pass


def head_and_batch(backend="auto", chunk=None, normalize=False, sparse=False, criterion=None, dtype=torch.float32):
    torch.manual_seed(2)
    criterion = criterion or NoisedTopKLoss((1, K), 0.3, seed=3, backend=backend)
    options = dict(normalize=normalize, sparse_grad=sparse, chunk_size=chunk, dtype=dtype)
    head = LinearHead(D, L, criterion, bias=not normalize, **options)
    target = torch.randint(L, (N,))
    weight = head.weight.detach()
    x = weight[target] + 0.8 * weight.std() * torch.randn(N, D).to(dtype)  # some hits of each K, and some misses
    target[3] = -100
    return head, x.requires_grad_(), target


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 1, 64])
@pytest.mark.parametrize("normalize", [False, True])
@every_backend
def test_hits_are_those_of_the_best_logits_and_the_loss_keeps_its_bits(backend, normalize, chunk):
    head, x, target = head_and_batch(backend, chunk, normalize)
    ks = (1, 20, 5, 3)  # in any order, below and above the ranks of the loss
    loss, hits = head(x, target, return_hits=ks)
    expected = torch.stack([(head.topk(x, k)[1] == target[:, None]).any(1) for k in ks], dim=1)
    assert hits.dtype == torch.bool and torch.equal(hits, expected) and not hits[3].any()
    assert (hits.sum(0) != (target >= 0).sum()).any() and hits.any(0).all()
    leaves = (x, head.weight)
    same(loss, head(x, target))
    for a, b in zip(gradients(loss, *leaves), gradients(head(x, target), *leaves)):
        same(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_hits_have_the_shape_of_the_target(sparse, dtype):
    head, x, target = head_and_batch(sparse=sparse, dtype=dtype)
    _, flat = head(x, target, return_hits=[5])
    loss, hits = head(x.view(3, 4, D), target.view(3, 4), return_hits=5)
    assert hits.shape == (3, 4) and flat.shape == (N, 1) and torch.equal(hits.flatten(), flat[:, 0])
    loss.backward()
    assert head.weight.grad.is_sparse == sparse
    assert head(x[:0], target[:0], return_hits=(1, 5))[1].shape == (0, 2)


def test_an_ignored_class_and_a_nan_are_no_hits():
    criterion = BalNoisedTopK(K, 0.3, ignore_index=0)
    head = LinearHead(D, L, criterion)
    with torch.no_grad():
        head.bias[:3] = torch.tensor([30.0, 20.0, 10.0])
    x = torch.zeros(4, D)
    x[3, 0] = NAN
    hits = head(x, torch.tensor([0, 1, 3, 1]), return_hits=(1, 2, L))[1]
    assert hits.tolist() == [[False] * 3, [False, True, True], [False, False, True], [False] * 3]


def test_hits_in_one_graph_with_a_learned_epsilon_and_without():
    """A learned epsilon divides the logits first, which keeps their order."""
    for criterion in (None, BalNoisedTopK(K, nn.Parameter(torch.tensor(0.3)))):
        head, x, target = head_and_batch(criterion=criterion)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, y: head(x, y, return_hits=(1, 5)), backend="aot_eager", fullgraph=True)  # noqa: B023
        loss, hits = compiled(x, target)
        assert torch.equal(hits, head(x, target, return_hits=(1, 5))[1]) and hits.any()
        loss.backward()
        assert x.grad.any()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "ks, error, message",
    [
        (0, ValueError, r"return_hits must be in \[1, L\] = \[1, 700\], got 0"),
        ((1, 701), ValueError, r"return_hits must be in \[1, L\] = \[1, 700\], got 701"),
        ((), ValueError, "return_hits must be an int or a sequence of 1 to 32 ints, got 0 of them"),
        (True, TypeError, "return_hits must be an int, got bool"),
    ],
)
def test_hits_that_there_are_not(ks, error, message):
    head, x, target = head_and_batch()
    with pytest.raises(error, match=message):
        head(x, target, return_hits=ks)


def test_hits_with_an_offset_name_the_remedy():
    criterion = NoisedTopKLoss(K, offset=torch.zeros(L))
    head, x, target = head_and_batch(criterion=criterion)
    with pytest.raises(ValueError, match=r"return_hits does not go with an offset.*: compare head.topk\(features, k\)"):
        head(x, target, return_hits=1)


def test_hits_feed_torchmetrics():
    torchmetrics = pytest.importorskip(
        "torchmetrics", reason="the metric is torchmetrics' own: pip install torchmetrics"
    )
    head, x, target = head_and_batch()
    metric = torchmetrics.MeanMetric()
    for rows in (slice(0, 5), slice(5, N)):
        hits = head(x[rows], target[rows], return_hits=5)[1]
        metric.update(hits.float(), weight=target[rows] != -100)
    known = target != -100
    theirs = torchmetrics.functional.classification.multiclass_accuracy(
        head.logits(x)[known], target[known], num_classes=L, top_k=5, average="micro"
    )
    torch.testing.assert_close(metric.compute(), theirs)
    assert 0 < theirs < 1


# Modules


def test_a_head_is_linear_and_loss():
    torch.manual_seed(1)
    head = LinearHead(D, L, BalNoisedTopK(K, 0.3, seed=3))
    linear = nn.Linear(D, L)
    linear.load_state_dict(head.state_dict())
    x, _, _, target = layer()
    same(head(x, target), bal_noised_topk_loss(linear(x), target, K, 0.3, seed=3))
    assert torch.equal(head.topk(x, 2)[1], linear(x).topk(2).indices)
    same(head.logits(x), linear(x))
    assert head.weight.abs().max() <= D**-0.5 and head.bias.abs().max() <= D**-0.5
    assert abs(head.weight.std() - D**-0.5 / 3**0.5) < 0.01  # nn.Linear's first weights: uniform to 1/sqrt(D)


def test_a_cosine_head_is_normed_linear_and_loss():
    torch.manual_seed(1)
    counts = range(1, L + 1)
    criterion = ImbalNoisedTopK(K, 0.05, 0.4, counts, seed=3)
    head = LinearHead(D, L, criterion, bias=False, normalize=True)
    linear = NormedLinear(D, L)
    linear.load_state_dict({"weight": head.weight})
    x, _, _, target = layer()
    same(head(x, target), imbal_noised_topk_loss(linear(x), target, K, class_margins(counts, 0.4), 0.05, seed=3))
    same(head.logits(x), linear(x))
    assert set(head.state_dict()) == {"weight", "criterion.m_list"} and head.bias is None


def test_first_weights_do_not_depend_on_the_number_of_ranks(monkeypatch):
    """What a rank of three would keep is its part of what one process draws in the same blocks."""

    class Group(torch.distributed.ProcessGroup):
        def __init__(self, rank):
            super().__init__(rank, 3)

    monkeypatch.setattr(heads, "_BLOCK", 100)
    for make in (
        lambda group: LinearHead(D, L, BalNoisedTopK(K, 0.3), process_group=group),
        lambda group: LinearHead(D, L, BalNoisedTopK(K, 0.3), bias=False, normalize=True, process_group=group),
    ):
        parts = []
        for group in (None, Group(0), Group(1), Group(2)):
            torch.manual_seed(5)
            parts.append(make(group))
        assert [p.first_class for p in parts] == [0, 0, 234, 468]
        same(torch.cat([p.weight for p in parts[1:]]), parts[0].weight)
        if parts[0].bias is not None:
            same(torch.cat([p.bias for p in parts[1:]]), parts[0].bias)


# Errors


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(input=[1.0]), TypeError, "input must be a tensor, got list"),
        (
            dict(linear_weight=torch.ones(L, D, dtype=torch.int64)),
            TypeError,
            "linear_weight must be float32, .* got torch.int64",
        ),
        (
            dict(input=torch.ones(N, D + 1)),
            ValueError,
            r"linear_weight \[L, D\], got shapes \[12, 17\] and \[700, 16\]",
        ),
        (dict(linear_weight=torch.ones(D)), ValueError, r"linear_weight \[L, D\], got shapes"),
        (
            dict(linear_weight=torch.ones(L, D).double()),
            TypeError,
            "linear_weight must have input's dtype torch.float32, got torch.float64",
        ),
        (
            dict(linear_bias=torch.ones(L).half()),
            TypeError,
            "linear_bias must have input's dtype torch.float32, got torch.float16",
        ),
        (dict(linear_bias=torch.ones(L - 1)), ValueError, r"linear_bias must have shape \[L\] = \[700\], got \[699\]"),
        (
            dict(linear_weight=torch.ones(L, D, device="meta")),
            ValueError,
            "linear_weight must be on input's device cpu, got meta",
        ),
        (dict(target=torch.zeros(N)), TypeError, "target must hold class indices in int64"),
        (dict(target=torch.zeros(N - 1).long()), ValueError, r"target must have shape \[12\] .* got \[11\]"),
        (dict(target=torch.full((N,), L)), IndexError, r"target must be in \[0, L - 1\] = \[0, 699\] .* got 700"),
        (dict(k=L), ValueError, r"k must be in \[0, L - 1\] = \[0, 699\], got 700"),
        (dict(k=1.0), TypeError, "k must be an int, got float"),
        (dict(epsilon=-1), ValueError, "epsilon must be at least 0"),
        (dict(n_sample=0), ValueError, "n_sample must be in"),
        (dict(scale=0), ValueError, "scale must be positive"),
        (dict(margin=[1.0]), TypeError, "margin must be a number or a tensor .* got list"),
        (dict(margin=torch.ones(3)), ValueError, r"margins must have shape \[L\] = \[700\], got \[3\]"),
        (dict(chunk_size=0), ValueError, "chunk_size must be in"),
        (dict(chunk_size=2.5), TypeError, "chunk_size must be an int, got float"),
        (dict(reduction="max"), ValueError, "reduction must be"),
        (dict(ignore_index=None), TypeError, "ignore_index must be an int"),
        (dict(sampler="sparse"), ValueError, "sampler must be"),
        (dict(backend="cuda"), (RuntimeError, ValueError), "backend 'cuda' (is not available|runs on CUDA tensors)"),
        (dict(seed=1, generator=torch.Generator()), ValueError, "seed and generator exclude each other"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else "",
)
def test_errors(change, error, message):
    x, weight, bias, target = layer()
    arguments = dict(input=x, linear_weight=weight, target=target, linear_bias=bias, k=K, epsilon=0.3) | change
    with pytest.raises(error, match=message):
        linear_noised_topk_loss(**arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(in_features=0), ValueError, r"in_features must be in \[1, 2147483647\], got 0"),
        (dict(n_classes=1), ValueError, r"n_classes must be in \[2, 2147483647\], got 1"),
        (dict(n_classes=1e6), TypeError, "n_classes must be an int, got float"),
        (dict(process_group="gloo"), TypeError, "process_group must be a torch.distributed.ProcessGroup .* got str"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else "",
)
def test_errors_of_modules(change, error, message):
    with pytest.raises(error, match=message):
        LinearHead(**(dict(in_features=D, n_classes=L, criterion=BalNoisedTopK(K, 0.3)) | change))


@pytest.mark.parametrize("k", [0, L + 1])
def test_topk_out_of_range(k):
    x, weight, _, _ = layer()
    with pytest.raises(ValueError, match=r"k must be in \[1, L\] = \[1, 700\]"):
        linear_topk(x, weight, k)
