"""Contract under test: same seed, same bits, on every backend, instruction set, thread count, chunk and layout."""

import re
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testing import (
    BACKENDS,
    INF,
    KINDS,
    KNOWN,
    KNOWN_IDS,
    NAN,
    ROOT,
    assert_same,
    dense_oracle,
    equal_scores_under_a_mask,
    known_scores,
    merge,
    randn,
    scores_of,
)
from topk_fast import ops, reference
from topk_fast.criterion import REDUCTIONS, Criterion
from topk_fast.functional import (
    bal_noised_topk_loss,
    noised_excess,
    noised_topk,
    noised_topk_candidates,
)
from topk_fast.request import Labels, Slice

if "cpp" in BACKENDS:
    from topk_fast import _C

FORMS = [f"cpp:{isa}" for isa in _C.isas()] + ["torch"] if "cpp" in BACKENDS else ["torch"]
NEEDS_CPP = pytest.mark.skipif(
    "cpp" not in BACKENDS, reason="two backends are compared and the C++ kernels are not built"
)
SEARCH = dict(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@contextmanager
def running(form):
    """The backend that a form names, with its instruction set chosen; the best one is chosen again afterwards."""
    backend, _, isa = form.partition(":")
    if isa:
        _C.use_isa(isa)
    try:
        yield backend
    finally:
        if isa:
            _C.use_isa(_C.isas()[0])


@pytest.fixture(params=FORMS)
def form(request):
    with running(request.param) as backend:
        yield backend


@pytest.fixture(params=["thinned", "dense"])
def sampler(request):
    return request.param


# Lengths around the widths of vectors, of tiles and of the plan's steps, and anything between.
LENGTHS = st.one_of(
    st.integers(1, 300),
    st.sampled_from([1, 15, 16, 17, 63, 64, 65, 127, 129, 255, 257, 511, 513, 1000, 1023, 2049]),
    st.sampled_from([4097, 5000, 20_011]),
)
RANKS = st.one_of(st.integers(1, 22), st.integers(1, 130))
EPSILONS = st.sampled_from([0.0, 0.01, 0.2, 1.0, 5.0])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SEEDS = st.integers(-(2**63), 2**63 - 1)
SAMPLERS = st.sampled_from(["thinned", "thinned", "dense"])
LAWS = st.sampled_from(["normal", "gumbel"])


def affordable(n_rows, n_classes, k, n_sample):
    """Rows, rank and samples as the torch backend does them in some 50 ms; short rows are searched many together."""
    if n_classes > 3000:
        return n_rows, min(k, 21), min(n_sample, 5)
    return n_rows * (11 if n_classes <= 300 and n_rows * n_sample < 40 else 1), k, n_sample


@pytest.mark.parametrize("case, name", KNOWN, ids=KNOWN_IDS)
def test_known_answers(form, case, name):
    values, found = noised_topk_candidates(
        known_scores(case)[None],
        case["k"],
        case["epsilon"],
        case["n_sample"],
        noise=case["noise"],
        seed=case["seed"],
        first_row=case["row"],
        sampler=name,
        backend=form,
    )
    assert found[0].tolist() == case[name]["class"]
    assert (values[0].view(torch.int32).to(torch.int64) & 0xFFFFFFFF).tolist() == case[name]["value_bits"]


@NEEDS_CPP
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, **SEARCH)
@given(
    n_rows=st.integers(1, 3),
    n_classes=LENGTHS,
    k=RANKS,
    n_sample=st.integers(1, 33),
    epsilon=EPSILONS,
    dtype=DTYPES,
    noise=LAWS,
    name=SAMPLERS,
    seed=SEEDS,
    first=st.tuples(st.sampled_from([0, 5, 2**31 - 1, 2**31]), st.sampled_from([0, 1, 1000, 2**30])),
    data_seed=st.integers(0, 2**31),
)
def test_candidates_agree(kind, n_rows, n_classes, k, n_sample, epsilon, dtype, noise, name, seed, first, data_seed):
    n_rows, k, n_sample = affordable(n_rows, n_classes, k, n_sample)
    scores = scores_of(kind, dtype, n_rows, n_classes, data_seed)
    common = dict(noise=noise, seed=seed, first_row=first[0], first_class=first[1], sampler=name)
    found = {}
    for one in FORMS:
        with running(one) as backend:
            found[one] = noised_topk_candidates(scores, k, epsilon, n_sample, backend=backend, **common)
    for one in FORMS[:-1]:
        assert_same(found[one], found["torch"], one)


@NEEDS_CPP
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, **SEARCH)
@given(
    n_rows=st.integers(1, 4),
    n_classes=LENGTHS,
    ks=st.lists(st.integers(0, 130), min_size=1, max_size=4),
    n_sample=st.integers(1, 33),
    epsilon=EPSILONS,
    scheduled=st.booleans(),
    dtype=DTYPES,
    noise=LAWS,
    name=SAMPLERS,
    seed=SEEDS,
    data_seed=st.integers(0, 2**31),
    what=st.sampled_from(["value", "excess", "excess of the others"]),
    coarse_grad=st.booleans(),
)
def test_excesses_and_gradients_agree(
    kind, n_rows, n_classes, ks, n_sample, epsilon, scheduled, dtype, noise, name, seed, data_seed, what, coarse_grad
):
    n_classes, least = max(2, n_classes), 1 if what == "excess of the others" else 0
    n_rows, most, n_sample = affordable(n_rows, n_classes, min(max(ks), n_classes - 1), n_sample)
    ks = [min(max(one, least), max(most, least)) for one in ks]
    scores = scores_of(kind, dtype, n_rows, n_classes, data_seed)
    generator = torch.Generator().manual_seed(data_seed)
    target = torch.randint(n_classes, (n_rows,), generator=generator)
    target[torch.rand(n_rows, generator=generator) < 0.2] = -100
    grad = torch.randn(n_rows, len(ks), generator=generator, dtype=torch.float64)
    grad = grad.sign() if coarse_grad else grad  # +-1: counts show as they are
    common = dict(n_sample=n_sample, noise=noise, seed=seed, sampler=name)
    common["epsilon"] = torch.tensor(epsilon, dtype=torch.float64) if scheduled else epsilon
    results = {}
    for one in FORMS:
        x = scores.clone().requires_grad_()
        with running(one) as backend:
            if what == "value":
                out = noised_topk(x, [one + 1 for one in ks], backend=backend, **common)
            else:
                out = noised_excess(x, target, ks, exclude_target=bool(least), backend=backend, **common)
            out.backward(grad.to(out.dtype))
        results[one] = (out.detach(), x.grad)
    for one in FORMS[:-1]:
        assert_same(results[one], results["torch"], f"{one} {what}")


@pytest.mark.parametrize("kind", ["normal", "zeros of both signs", "ties", "spiky", "some +inf"])
@pytest.mark.parametrize("n_classes", [7, 129, 2000])
def test_dense_is_a_sort_of_all_noised_scores(form, kind, n_classes):
    scores = scores_of(kind, torch.float32, 3, n_classes, 1)
    given = noised_topk_candidates(scores, 5, 0.5, 9, seed=3, sampler="dense", backend=form)
    assert_same(given, dense_oracle(scores, 5, 0.5, 9, 3))


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros of both signs", "falling", "rising", "some +inf", "huge"])
@pytest.mark.parametrize("n_classes", [7, 129, 2000, 20_011])
def test_no_noise_is_a_sort_of_the_scores(form, sampler, kind, n_classes):
    scores = scores_of(kind, torch.float32, 2, n_classes, 2)
    values, classes = noised_topk_candidates(scores, 6, 0.0, 3, seed=3, sampler=sampler, backend=form)
    order = scores.add(0.0).sort(dim=1, descending=True, stable=True).indices[:, :6]
    assert torch.equal(values, scores.gather(1, order)[:, None].expand(-1, 3, -1))
    if kind == "zeros of both signs" and sampler == "thinned":
        # All scores equal the cut: arrivals name the classes, which are any six different ones in their order.
        assert torch.equal(scores[:, None].expand(-1, 3, -1).gather(2, classes), values)
        assert (classes.diff(dim=2) > 0).all()
    else:
        assert torch.equal(classes, order[:, None].expand(-1, 3, -1))


@pytest.mark.parametrize(
    "n_rows, n_classes, n_sample",
    [(1, 10_000, 40), (1, 100, 33), (2, 3000, 17), (3, 70_000, 5), (64, 500, 5), (1, 200_000, 1)],
    ids=["one row, many samples", "one short row", "two rows", "rows fewer than threads", "many rows", "one long row"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_thread_counts(backend, sampler, n_rows, n_classes, n_sample):
    n_classes = min(n_classes, 3000) if sampler == "dense" else n_classes
    scores, target = randn(n_rows, n_classes), torch.arange(n_rows)
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            x = scores.clone().requires_grad_()
            common = dict(seed=1, sampler=sampler, backend=backend)
            found = noised_topk_candidates(x, 6, 1.0, n_sample, **common)
            losses = bal_noised_topk_loss(x, target, 5, 1.0, n_sample, reduction="none", **common)
            losses.sum().backward()
            results.append((*found, losses.detach(), x.grad))
    finally:
        torch.set_num_threads(1)
    assert_same(results[1], results[0], "2 threads")
    assert_same(results[2], results[0], "4 threads")


@pytest.mark.parametrize("step", [1, 3, 4])
def test_row_slices_equal_the_whole(form, sampler, step):
    scores, first = randn(10, 700), 2**31 - 4
    common = dict(seed=-5, sampler=sampler, backend=form)
    whole = noised_topk_candidates(scores, 6, 1.0, 5, first_row=first, **common)
    parts = [
        noised_topk_candidates(scores[n : n + step], 6, 1.0, 5, first_row=first + n, **common)
        for n in range(0, 10, step)
    ]
    assert_same(tuple(torch.cat(part) for part in zip(*parts, strict=True)), whole)


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros of both signs", "half masked", "99 % masked", "some +inf"])
@pytest.mark.parametrize("bounds", [(1, 500), (3, 4, 5), (256, 512, 768), (990,)], ids=str)
def test_dense_class_slices_merge_to_the_whole(form, kind, bounds):
    scores = scores_of(kind, torch.float32, 3, 1000, 3)
    common = dict(seed=11, first_row=7, sampler="dense", backend=form)
    edges = [0, *bounds, 1000]
    parts = [
        noised_topk_candidates(scores[:, a:b], 21, 1.0, 5, first_class=a, **common)
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    assert_same(merge(parts, 21), noised_topk_candidates(scores, 21, 1.0, 5, **common))


@pytest.mark.parametrize("name", ["thinned", "dense"])
def test_a_slice_shifts_its_classes(form, name):
    scores = randn(2, 900)
    values, classes = noised_topk_candidates(scores, 6, 0.0, 2, first_class=2**31 - 901, sampler=name, backend=form)
    assert torch.equal(classes - (2**31 - 901), scores.topk(6).indices[:, None].expand(-1, 2, -1))
    assert torch.equal(values, scores.topk(6).values[:, None].expand(-1, 2, -1))


@pytest.mark.parametrize("budget", [1, 100, 5000])
@pytest.mark.parametrize("kind", ["normal", "ties", "99 % masked", "some NaN"])
def test_chunks_of_the_torch_backend_change_nothing(monkeypatch, sampler, kind, budget):
    def run():
        x = scores_of(kind, torch.float32, 5, 300, 4).requires_grad_()
        common = dict(seed=2, sampler=sampler, backend="torch")
        found = noised_topk_candidates(x, 4, 1.0, 5, first_row=2, **common)
        losses = bal_noised_topk_loss(x, torch.arange(5), 3, 1.0, 5, reduction="none", **common)
        losses.backward(torch.arange(5.0))
        return (*found, losses.detach(), x.grad)

    expected = run()
    monkeypatch.setattr(reference, "_BUDGET", budget)
    assert_same(run(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("n_ranks", [1, 3])
def test_gradient_of_a_class_slice_is_the_slice_of_the_gradient(n_ranks, with_target, backend, dtype):
    """Rows with classes that repeat, none at all, a NaN, the true class alone, and a target that is ignored."""
    rows = [[3, 3, 8], [-1, -1, -1], [-2, -2, -2], [5, 5, 5], [1, 2, 3], [4, 4, 4]]
    classes = torch.tensor(rows)[:, :, None].repeat(1, 1, n_ranks)
    classes[0, 1:, 1:] = 0  # ranks with classes of their own
    target = torch.tensor([3, 2, 9, 5, -100, 0]) if with_target else None
    grad = torch.arange(1.0, 6 * n_ranks + 1, dtype=reference.arithmetic(dtype)).view(6, n_ranks) / 3
    op = ops.kernel("gradient", backend)

    def gradient(first, end):
        return op(grad, classes, target, -100, first, end - first, dtype)

    whole = gradient(0, 10)
    for n, row in enumerate(rows):
        if row[0] == -2:
            assert whole[n].isnan().all()
            continue
        expected = torch.zeros(10, dtype=torch.float64)
        for m in range(n_ranks):
            for c in classes[n, :, m].tolist():
                expected[c] += float(grad[n, m]) / 3 if c >= 0 else 0.0
        if with_target and row[0] == 1:
            expected.zero_()
        elif with_target:
            expected[target[n]] -= grad[n].double().sum()
        torch.testing.assert_close(whole[n].double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=1e-6)
    for first, end in [(0, 1), (1, 5), (3, 4), (5, 10), (9, 10), (4, 4)]:
        assert_same(gradient(first, end), whole[:, first:end])


@NEEDS_CPP
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "criterion",
    [
        Criterion(),
        Criterion(margin=torch.linspace(0.01, 0.3, 40), scale=50.0),
        Criterion(margin=-0.3, scale=0.7, rank_weights=(0.3, 2.0, 1.1)),
        Criterion("identity", margin=0.0),
    ],
    ids=["hinge", "margins", "several ranks", "identity"],
)
def test_the_cpp_link_has_torchs_bits(criterion, dtype, reduction):
    if isinstance(criterion.margin, torch.Tensor):
        criterion = criterion._replace(margin=criterion.margin.to(dtype))
    criterion, generator = criterion._replace(reduction=reduction), torch.Generator().manual_seed(1)
    n_ranks = len(criterion.rank_weights or [1])
    for n_rows in (0, 1, 7, 3000):
        excess = torch.randn(n_rows, n_ranks, generator=generator, dtype=dtype)
        excess[2::50] = NAN
        labels = Labels(torch.randint(40, (n_rows,), generator=generator))
        labels.target[1::3], excess[1::3] = -100, 0.0
        wanted, slope, divisor = criterion.evaluated(excess, labels)
        given = ops.kernel("link", "cpp")(excess, *labels[:2], *criterion.arguments(n_ranks))
        assert_same(given[0], wanted)
        known = ~excess.isnan()  # the gradient of a row with a NaN does not look at its slope
        assert_same(given[1][known], slope[known])
        assert_same(given[2], torch.ones((), dtype=dtype) if divisor is None else divisor.to(dtype))


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_cpp_gradient_of_a_link_is_that_of_the_product(dtype):
    generator = torch.Generator().manual_seed(3)
    classes = torch.randint(-1, 30, (9, 5, 2), generator=generator)
    classes[4] = -2
    target, of = torch.tensor([3, -100, 0, 29, 5, 5, -100, 7, 1]), Slice(2, 25, dtype)
    slope = torch.randn(9, 2, generator=generator, dtype=reference.arithmetic(dtype))
    divisor = slope.new_tensor(7.0)
    for grad in (slope.new_tensor(-0.3), slope.new_tensor(range(9)) / 3, slope.new_tensor(0.5).expand(9)):
        given = ops.kernel("linked_gradient", "cpp")(grad, slope, divisor, classes, target, -100, *of)
        wanted = (grad / divisor).expand(9)[:, None] * slope
        assert_same(given, ops.kernel("gradient", "torch")(wanted, classes, target, -100, *of))


@NEEDS_CPP
def test_the_cpp_link_refuses_labels_beyond_its_numbers():
    for numbers in (dict(margin=torch.zeros(3)), dict(weight=torch.ones(3))):
        for label in (-1, 3):
            arguments = Criterion(**numbers).arguments(1)
            with pytest.raises(RuntimeError, match="target out of bounds"):
                ops.kernel("link", "cpp")(torch.zeros(1, 1), torch.tensor([label]), -100, *arguments)


@NEEDS_CPP
def test_the_cpp_link_leaves_a_softplus_to_torch():
    with pytest.raises(RuntimeError, match="a softplus of the CPU's excesses is left to torch"):
        ops.kernel("link", "cpp")(torch.zeros(1, 1), torch.tensor([0]), -100, *Criterion("softplus").arguments(1))


@NEEDS_CPP
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm, which lists symbols")
def test_the_cpp_kernels_call_no_function_of_libm():
    """Their bits would be the system's, and a wheel would need its glibc: exp and log have had new versions since."""
    (file,) = (ROOT / "topk_fast").glob("_C.*so")
    listed = subprocess.run(["nm", "-D", "--undefined-only", file], capture_output=True, text=True, check=True).stdout
    called = set(re.findall(r" U (\w+)", listed))
    assert called
    functions = ["exp", "exp2", "expm1", "log", "log2", "log1p", "pow", "sqrt", "erf"]
    assert not called & {name + suffix for name in functions for suffix in ("", "f")}


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "an odd offset": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "every second class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "a middle dimension": lambda x: x[:, :, None].repeat(1, 1, 3)[:, :, 1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_strided_rows_equal_contiguous_ones(form, dtype, layout):
    x = randn(4, 777).to(dtype)
    y = LAYOUTS[layout](x)
    assert torch.equal(x, y) and not y.is_contiguous()
    target = torch.arange(4).repeat_interleave(2)[::2]  # strided as well
    results = []
    for scores, labels in ((x, target.contiguous()), (y, target)):
        leaf = scores.detach().requires_grad_()
        found = noised_topk_candidates(leaf, 6, 1.0, 5, seed=4, backend=form)
        losses = bal_noised_topk_loss(leaf, labels, 5, seed=4, reduction="none", backend=form)
        tops = noised_topk(leaf, 5, seed=4, backend=form)
        (losses + tops).backward(torch.ones(1, dtype=losses.dtype).expand(4))  # a gradient of stride 0
        results.append((*found, losses.detach(), tops.detach(), leaf.grad))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("n_classes", [1, 40, 3000])
def test_expanded_rows_equal_repeated_ones(form, sampler, n_classes):
    row = randn(1, n_classes)
    common = dict(seed=4, sampler=sampler, backend=form)
    given = noised_topk_candidates(row.expand(5, -1), 3, 1.0, 5, **common)
    assert_same(given, noised_topk_candidates(row.repeat(5, 1), 3, 1.0, 5, **common))
    constant = noised_topk_candidates(torch.zeros(1, 1).expand(5, n_classes), 3, 1.0, 5, **common)  # stride 0 twice
    assert_same(constant, noised_topk_candidates(torch.zeros(5, n_classes), 3, 1.0, 5, **common))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 7, 2**63 - 1, -1, -(2**31), -(2**63)])
def test_a_seed_has_three_spellings(form, seed):
    scores = randn(2, 500)

    def call(seed):
        return noised_topk_candidates(scores, 3, 1.0, 5, seed=seed, backend=form)

    expected = call(torch.tensor(seed))
    assert_same(call(seed), expected, "int")
    assert_same(call(seed % 2**64), expected, "two's complement")


def test_both_words_of_the_seed_and_the_row_count(form):
    scores = torch.zeros(1, 64)
    values = {
        (seed, row): noised_topk_candidates(scores, 1, 1.0, 1, seed=seed, first_row=row, backend=form)[0].item()
        for seed in (0, 1, 2**32, 2**63, -1)
        for row in (0, 1, 2**31)
    }
    assert len(set(values.values())) == len(values)


@pytest.mark.parametrize("finite", [0, 1, 4])
@pytest.mark.parametrize("n_classes", [4, 30, 5000])
def test_short_lists_end_in_minus_inf_and_minus_one(form, sampler, n_classes, finite):
    scores = torch.full((2, n_classes), -INF)
    kept = torch.tensor([n_classes - 1, 0, n_classes // 2, 1])[:finite]
    scores[:, kept] = randn(2, finite)
    values, classes = noised_topk_candidates(scores, 6, 1.0, 5, seed=5, sampler=sampler, backend=form)
    assert (values[..., finite:] == -INF).all() and (classes[..., finite:] == -1).all()
    assert torch.isfinite(values[..., :finite]).all()
    assert torch.equal(classes[..., :finite].sort(dim=2).values, kept.sort().values.expand(2, 5, -1))


@pytest.mark.parametrize(
    "k, finite",
    [(200, 100), (100, 100), (6, 100), (6, 500)],
    ids=["fewer than k", "just k", "few", "as many as groups"],
)
def test_few_finite_scores_all_contend(form, k, finite):
    """The walk over classes of which most are masked would take long, or for ever: all finite ones get draws."""
    scores = equal_scores_under_a_mask(200_000, k, finite)
    thinned = noised_topk_candidates(scores, k, 1.0, 2, seed=5, backend=form)
    assert_same(thinned, noised_topk_candidates(scores, k, 1.0, 2, seed=5, sampler="dense", backend=form))
    assert (thinned[1] >= 0).sum(2).eq(min(k, finite)).all()


@NEEDS_CPP
def test_a_walk_among_masked_classes_agrees():
    scores = equal_scores_under_a_mask(200_000, 6, 1000)
    found = {}
    for one in FORMS:
        with running(one) as backend:
            found[one] = noised_topk_candidates(scores, 6, 1.0, 2, seed=5, backend=backend)
    assert (found["torch"][1] >= 0).all()
    for one in FORMS[:-1]:
        assert_same(found[one], found["torch"], one)


@pytest.mark.parametrize("n_classes", [3, 50, 300, 5000])
def test_plus_inf_comes_first_in_class_order(form, sampler, n_classes):
    scores = randn(2, n_classes)
    scores[:, [0, n_classes - 1]] = INF
    values, classes = noised_topk_candidates(scores, 3, 1.0, 5, seed=5, sampler=sampler, backend=form)
    assert (values[..., :2] == INF).all() and torch.isfinite(values[..., 2]).all()
    assert (classes[..., 0] == 0).all() and (classes[..., 1] == n_classes - 1).all()


@pytest.mark.parametrize("n_classes", [2, 33, 300, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nan_anywhere_spoils_its_row_alone(form, sampler, dtype, n_classes):
    at = [0, n_classes // 2, n_classes - 1]
    clean = randn(2 * len(at), n_classes).to(dtype)
    scores = clean.clone()
    for n, j in enumerate(at):
        scores[2 * n, j] = NAN
        scores[2 * n, (j + 1) % n_classes] = INF
    common = dict(seed=6, sampler=sampler, backend=form)
    values, classes = noised_topk_candidates(scores, 2, 1.0, 3, **common)
    assert values[::2].isnan().all() and (classes[::2] == -2).all()
    expected = noised_topk_candidates(clean, 2, 1.0, 3, **common)
    assert_same((values[1::2], classes[1::2]), (expected[0][1::2], expected[1][1::2]))
    x = scores.requires_grad_()
    losses = bal_noised_topk_loss(x, torch.ones(len(scores), dtype=torch.int64), 1, reduction="none", **common)
    (losses.sum() + noised_topk(x, 1, **common).sum()).backward()
    assert losses[::2].isnan().all() and not losses[1::2].isnan().any()
    assert x.grad[::2].isnan().all() and not x.grad[1::2].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_two_to_the_31_elements(backend):
    """64-bit offsets: three rows, the last ones past 2**31; their pages alone are touched."""
    stride, n_classes = 2**30 + 2**10, 1000
    try:
        base = torch.empty(2 * stride + n_classes, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 4 GiB of virtual memory here")
    scores = base.as_strided((3, n_classes), (stride, 1))
    scores.copy_(randn(3, n_classes))
    packed, target = scores.clone(), torch.tensor([0, 999, 500])
    common = dict(seed=7, backend=backend)
    given = noised_topk_candidates(scores, 6, 1.0, 5, **common)
    assert_same(given, noised_topk_candidates(packed, 6, 1.0, 5, **common))
    given = bal_noised_topk_loss(scores, target, 5, reduction="none", **common)
    assert_same(given, bal_noised_topk_loss(packed, target, 5, reduction="none", **common))


@NEEDS_CPP
def test_more_than_two_to_the_31_scores():
    """N * L > 2**31 as 2200 times the same row, which is not materialised; rows differ by their noise alone."""
    n_rows, n_classes = 2200, 1_000_003
    row = randn(1, n_classes).to(torch.bfloat16)
    row[0, 999_999] = 30.0
    scores = row.expand(n_rows, -1)
    assert scores.numel() > 2**31
    common = dict(seed=8, backend="cpp")
    _, classes = noised_topk_candidates(scores, 1, 1.0, 1, **common)
    assert (classes == 999_999).all()


EXCESS = dict(
    scores=torch.zeros(2, 9),
    seed=torch.tensor(1),
    ranks=[3],
    epsilon=1.0,
    schedule=None,
    n_sample=4,
    law=0,
    dense=False,
    target=torch.tensor([1, 2]),
    ignore_index=-100,
    exclude_target=True,
)
CANDIDATES = {name: EXCESS[name] for name in list(EXCESS)[:8]} | dict(first_row=0, first_class=0)
GRADIENT = dict(
    grad=torch.zeros(2, 1),
    classes=torch.zeros(2, 4, 1, dtype=torch.int64),
    target=None,
    ignore_index=-100,
    first_class=0,
    n_classes=9,
    dtype=torch.float32,
)


@NEEDS_CPP
@pytest.mark.parametrize(
    "name, good, bad, message",
    [
        ("excess", EXCESS, dict(scores=torch.zeros(9)), r"scores must be \[N, L\] .* got \[9\]"),
        ("excess", EXCESS, dict(scores=torch.zeros(2, 0)), r"scores must be \[N, L\] .* got \[2, 0\]"),
        (
            "excess",
            EXCESS,
            dict(scores=torch.zeros(2, 9).int()),
            "scores must be float32, float64, bfloat16 or float16",
        ),
        (
            "excess",
            EXCESS,
            dict(seed=torch.tensor([1, 2])),
            r"seed must be Long of shape \[\], got Long of shape \[2\]",
        ),
        ("excess", EXCESS, dict(seed=torch.tensor(1.0)), r"seed must be Long of shape \[\], got Float of shape \[\]"),
        ("excess", EXCESS, dict(schedule=torch.tensor(1.0)), r"schedule must be Double of shape \[\], got Float"),
        ("excess", EXCESS, dict(ranks=[]), "there must be 1 to 32 ranks, got 0"),
        ("excess", EXCESS, dict(ranks=[2] * 33), "there must be 1 to 32 ranks, got 33"),
        ("excess", EXCESS, dict(ranks=[0]), "ranks must be positive, got 0"),
        ("excess", EXCESS, dict(ranks=[3, 1]), "ranks must be at least 2 without the true class, got 1"),
        ("excess", EXCESS, dict(n_sample=0), "n_sample must be positive, got 0"),
        ("excess", EXCESS, dict(law=2), "the law must be 0 .* or 1 .*, got 2"),
        (
            "excess",
            EXCESS,
            dict(target=torch.tensor([1])),
            r"target must be Long of shape \[2\], got Long of shape \[1\]",
        ),
        ("excess", EXCESS, dict(target=torch.tensor([1, 9])), "target out of bounds"),
        ("candidates", CANDIDATES, dict(first_class=-1), r"class ids must be in \[0, 2\*\*31 - 1\), got -1"),
        (
            "candidates",
            CANDIDATES,
            dict(first_class=2**31 - 9),
            "class ids must be in .* got 2147483639 for the first of 9",
        ),
        ("gradient", GRADIENT, dict(classes=torch.zeros(2, 4).long()), r"classes must be .* got \[2, 4\]"),
        ("gradient", GRADIENT, dict(classes=torch.zeros(2, 0, 1).long()), r"classes must be .* got \[2, 0, 1\]"),
        ("gradient", GRADIENT, dict(classes=torch.zeros(2, 4, 33).long()), r"with M in \[1, 32\], got \[2, 4, 33\]"),
        (
            "gradient",
            GRADIENT,
            dict(grad=torch.zeros(2, 2)),
            r"grad must be Float of shape \[2, 1\], got Float of shape",
        ),
        ("gradient", GRADIENT, dict(dtype=torch.float64), r"grad must be Double of shape \[2, 1\], got Float of shape"),
        (
            "gradient",
            GRADIENT,
            dict(target=torch.tensor([1])),
            r"target must be Long of shape \[2\], got Long of shape",
        ),
        ("gradient", GRADIENT, dict(n_classes=-1), "the slice of classes must not be negative, got -1 from 0 on"),
    ],
)
def test_the_cpp_ops_refuse_what_they_could_not_read_safely(name, good, bad, message):
    op = ops.kernel(name, "cpp")
    op(**good)
    with pytest.raises(RuntimeError, match=message):
        op(**good | bad)


@NEEDS_CPP
@pytest.mark.parametrize("isa", _C.isas() if "cpp" in BACKENDS else [])
@pytest.mark.parametrize(
    "dtype, size", [(torch.float32, 1e-40), (torch.bfloat16, 1e-39), (torch.float64, 1e-310)], ids=str
)
def test_flushing_of_subnormals_changes_nothing(dtype, size, isa):
    """torch.set_flush_denormal reaches the calling thread only: the bits of a row would depend on its thread."""
    scores = (torch.randn(64, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size).to(dtype)
    target, threads = torch.arange(64), torch.get_num_threads()
    incoming = torch.full((64, 2), 3 * size, dtype=reference.arithmetic(dtype))
    criterion = Criterion("identity", margin=0.0, scale=0.5, reduction="none")

    def step():
        leaf = scores.clone().requires_grad_()
        excess = noised_excess(leaf, target, (1, 5), epsilon=size, n_sample=5, seed=3, backend="cpp")
        excess.backward(incoming)
        one = noised_excess(scores[:1], target[:1], 5, epsilon=size, n_sample=40, seed=3, backend="cpp")  # many threads
        labels = Labels(target)
        losses, slope, _ = ops.kernel("link", "cpp")(excess.detach(), *labels[:2], *criterion.arguments(2))
        return excess.detach(), leaf.grad, one, losses, slope

    with running(f"cpp:{isa}"):
        expected = step()
        assert expected[0].count_nonzero() == expected[0].numel() and expected[1].any()
        try:
            for n in (1, 2):
                torch.set_num_threads(n)
                assert torch.set_flush_denormal(True)
                found = step()
                torch.set_flush_denormal(False)
                for ours, exact in zip(found, expected):
                    assert_same(ours, exact)
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)
