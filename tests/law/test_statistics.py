"""The law of the noise: thinned against dense sampler against plain ``torch.randn``, and against closed forms.

Contract under test: the k best of ``s + epsilon * Z``, Z of either law, have the same joint law from both samplers, and
are independent over rows, samples and seeds. Values are compared by Kolmogorov-Smirnov, classes by chi-square.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from testing import BACKENDS
from topk_fast import reference
from topk_fast.functional import noised_topk, noised_topk_candidates

# A right sampler falls below this in about one of 10,000 p-values. The tests look at some 1200, so the chance that
# fixed seeds meet one by accident is 12 %, once and for all: what passed stays passed. The power checks at the end
# show that errors as small as a noise 5 % too wide give p-values many orders of magnitude lower.
LEVEL = 1e-4

needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="too slow without the C++ kernels")
ROWS = 40  # the samples of a case come from so many rows of equal scores


def make_scores(kind, n_classes):
    generator = torch.Generator().manual_seed(n_classes)
    scores = torch.randn(n_classes, generator=generator)
    order = torch.randperm(n_classes, generator=generator)
    if kind == "flat":
        scores = torch.full_like(scores, 0.5)
    elif kind == "ties":
        scores = (2.0 * scores).round()
    elif kind == "spiky":
        scores = (0.1 * scores).index_put((order[:5],), torch.tensor([4.0, 4.2, 4.4, 5.0, 6.0]))
    elif kind == "sorted":
        scores = torch.linspace(3.0, -3.0, n_classes)
    elif kind == "masked":
        scores[order[: n_classes * 9 // 10]] = -math.inf
    elif kind == "nearly all masked":
        scores[order[25:]] = -math.inf
    return scores


def search(scores, k, epsilon, n, seed, **options):
    """``n`` samples of the k best: values [n, k] and classes [n, k]."""
    rows = scores.expand(ROWS, -1).contiguous()
    values, classes = noised_topk_candidates(rows, k, epsilon, n // ROWS, seed=seed, **options)
    return values.flatten(0, 1), classes.flatten(0, 1)


def plain(scores, k, epsilon, n, seed=0, noise="normal"):
    """The same by definition: noise for every class, from torch's own generator."""
    generator = torch.Generator().manual_seed(seed)
    parts, step = [], max(1, 2**21 // len(scores))
    for start in range(0, n, step):
        shape = (min(step, n - start), len(scores))
        if noise == "gumbel":
            z = -torch.empty(shape, dtype=torch.float64).exponential_(generator=generator).log() - np.euler_gamma
        else:
            z = torch.randn(shape, generator=generator)
        parts.append((scores + epsilon * z.float()).topk(k))
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def homogeneity(first, second, scores):
    """Chi-square p-value of two samples of classes having the same law.

    Classes are taken in the order of their scores and joined until a cell expects 5 in either sample.
    """
    place = scores.argsort(descending=True, stable=True).argsort()
    counts = np.stack([torch.bincount(place[c], minlength=len(scores)).numpy() for c in (first, second)])
    expected = counts.sum(0) * (counts.sum(1).min() / counts.sum())
    starts, room = [0], 0.0
    for i in np.flatnonzero(expected):
        if room >= 5 and expected[i:].sum() >= 5:
            starts.append(i)
            room = 0.0
        room += expected[i]
    cells = np.add.reduceat(counts, starts, axis=1)
    return stats.chi2_contingency(cells, correction=False).pvalue if len(starts) > 1 else 1.0


def compare(first, second, scores):
    """p-values of two samples of the k best having one law: the k-th, the largest, the gap between, the classes."""
    (v, c), (w, d) = first, second
    p = {"k-th value": stats.ks_2samp(v[:, -1], w[:, -1], method="asymp").pvalue}
    p["k-th class"] = homogeneity(c[:, -1], d[:, -1], scores)
    if v.shape[1] > 1:
        p["largest value"] = stats.ks_2samp(v[:, 0], w[:, 0], method="asymp").pvalue
        p["largest class"] = homogeneity(c[:, 0], d[:, 0], scores)
        p["gap"] = stats.ks_2samp(v[:, 0] - v[:, -1], w[:, 0] - w[:, -1], method="asymp").pvalue
    return p


def check(p):
    print({name: float(f"{value:.3g}") for name, value in p.items()})
    worst = min(p, key=p.get)
    assert p[worst] > LEVEL, f"{worst}: p = {p[worst]:.3g}, all: {p}"


def two_sided(deviations):
    """p-value of a number of standard errors."""
    return 2.0 * stats.norm.sf(abs(float(deviations)))


CASES = [
    ("normal", 150, 21, 1.0, "too short for a cut"),
    ("normal", 300, 1, 1.0, "short"),
    ("normal", 300, 21, 0.3, "a third of the classes are contenders"),
    ("normal", 1000, 6, 0.01, "noise far below the scores"),
    ("normal", 1000, 6, 0.3, "noise below the scores"),
    ("normal", 1000, 6, 1.0, "noise as wide as the scores"),
    ("normal", 1000, 6, 10.0, "noise far above the scores"),
    ("normal", 5000, 1, 1.0, "groups of several classes"),
    ("normal", 10_000, 1, 1.0, "long, maximum"),
    ("normal", 10_000, 6, 0.01, "long, noise far below the scores"),
    ("normal", 10_000, 6, 10.0, "long, noise far above the scores"),
    ("normal", 10_000, 21, 1.0, "long, large k"),
    ("flat", 300, 1, 1.0, "no contenders"),
    ("flat", 1000, 6, 10.0, "no contenders, wide noise"),
    ("flat", 5000, 6, 0.01, "no contenders, narrow noise"),
    ("flat", 10_000, 21, 1.0, "no contenders, long"),
    ("ties", 300, 6, 1.0, "cut within a tie"),
    ("ties", 5000, 21, 0.3, "cut within a tie, large k"),
    ("ties", 10_000, 1, 1.0, "cut within a tie, long"),
    ("spiky", 1000, 5, 1.0, "the k-th is the lowest spike"),
    ("spiky", 1000, 6, 0.1, "the k-th is the first below the spikes"),
    ("spiky", 10_000, 6, 1.0, "spikes within reach of the noise"),
    ("sorted", 5000, 6, 1.0, "contenders side by side"),
    ("masked", 1000, 6, 1.0, "a tenth is finite"),
    ("masked", 10_000, 21, 0.3, "a tenth is finite, long"),
    ("nearly all masked", 1000, 21, 1.0, "fewer finite scores than contenders wanted"),
]
IDS = [f"{kind} L={n_classes} k={k} eps={epsilon}: {reason}" for kind, n_classes, k, epsilon, reason in CASES]


def three_ways(kind, n_classes, k, epsilon, n, **options):
    scores = make_scores(kind, n_classes)
    thinned = search(scores, k, epsilon, n, seed=1, sampler="thinned", **options)
    dense = search(scores, k, epsilon, n, seed=2, sampler="dense", **options)
    oracle = plain(scores, k, epsilon, n, seed=3, noise=options["noise"])
    named = {"thinned-plain": (thinned, oracle), "dense-plain": (dense, oracle), "thinned-dense": (thinned, dense)}
    return {f"{pair} {name}": p for pair, ab in named.items() for name, p in compare(*ab, scores).items()}


both_laws = pytest.mark.parametrize("noise", ["normal", "gumbel"])


@needs_cpp
@both_laws
@pytest.mark.parametrize("kind, n_classes, k, epsilon, reason", CASES, ids=IDS)
def test_thinned_dense_and_plain_agree(kind, n_classes, k, epsilon, reason, noise):
    n = max(4000, min(20_000, 20_000_000 // n_classes // ROWS * ROWS))
    check(three_ways(kind, n_classes, k, epsilon, n, backend="cpp", noise=noise))


@both_laws
@pytest.mark.parametrize(
    "kind, k, epsilon", [("normal", 6, 1.0), ("flat", 1, 1.0), ("ties", 21, 0.3), ("masked", 6, 10)]
)
def test_torch_thinned_dense_and_plain_agree(kind, k, epsilon, noise):
    check(three_ways(kind, 300, k, epsilon, 4000, backend="torch", noise=noise))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampler", ["thinned", "dense"])
@pytest.mark.parametrize(
    "kind, n_classes, epsilon", [("normal", 300, 1.0), ("flat", 300, 0.5), ("spiky", 1000, 2.0), ("masked", 1000, 1.0)]
)
def test_gumbel_noise_at_rank_1_is_softmax(kind, n_classes, epsilon, sampler, backend):
    """Gumbel (1954): the largest of s + epsilon * Z is epsilon * logsumexp(s / epsilon) + epsilon * Z, its class
    softmax.
    """
    scores, n = make_scores(kind, n_classes), 20_000 if backend == "cpp" else 4000
    values, classes = search(scores, 1, epsilon, n, seed=13, noise="gumbel", sampler=sampler, backend=backend)
    scaled = scores.double() / epsilon
    z = values[:, 0].double() / epsilon - scaled.logsumexp(0)
    p = {"mean": two_sided(z.mean() / (math.pi / math.sqrt(6 * n)))}
    p["law"] = stats.kstest(z.numpy() + np.euler_gamma, "gumbel_r").pvalue
    share = scaled.softmax(0)
    order = share.argsort(descending=True)
    expected = share[order].numpy() * n
    counts = torch.bincount(classes[:, 0], minlength=n_classes)[order].numpy()
    likely = expected >= 5  # rarer classes make one cell
    cells = [np.append(x[likely], x[~likely].sum()) for x in (counts, expected)]
    cells = [x[:-1] if cells[1][-1] == 0 else x for x in cells]
    assert cells[0].sum() == n
    p["classes"] = stats.chisquare(*cells).pvalue
    p["classes do not depend on values"] = stats.spearmanr(scores[classes[:, 0]] + classes[:, 0] * 1e-6, z).pvalue
    check(p)


@pytest.mark.parametrize("sampler", ["thinned", "dense"])
def test_gumbel_frequencies_of_a_wrong_temperature_are_found(sampler):
    scores, n = make_scores("normal", 300), 20_000 if "cpp" in BACKENDS else 4000
    _, classes = search(scores, 1, 1.1, n, seed=13, noise="gumbel", sampler=sampler)
    counts = torch.bincount(classes[:, 0], minlength=300).numpy()
    assert stats.chisquare(counts, scores.double().softmax(0).numpy() * n).pvalue < LEVEL


@pytest.mark.parametrize("level", [math.inf, 2.0, 0.0, -2.0], ids=["no contenders", "few", "half", "nearly all"])
def test_any_cut_gives_the_same_law(level, monkeypatch):
    scores = make_scores("normal", 300)
    level = torch.tensor(level).clamp(max=scores.max())
    monkeypatch.setattr(reference, "cut_of", lambda rows, k, law: level.expand(rows.shape[0]))
    thinned = search(scores, 6, 1.0, 4000, seed=4, sampler="thinned", backend="torch")
    check(compare(thinned, plain(scores, 6, 1.0, 20_000), scores))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["normal", "flat"])
def test_merged_slices_have_the_law_of_the_whole(kind, backend):
    scores = make_scores(kind, 1000)
    found, first_class = [], 0
    for part in scores.split([120, 500, 380]):
        found.append(search(part, 6, 1.0, 4000, seed=5, first_class=first_class, backend=backend))
        first_class += len(part)
    values, places = torch.cat([v for v, _ in found], 1).topk(6)
    merged = values, torch.cat([c for _, c in found], 1).gather(1, places)
    check(compare(merged, plain(scores, 6, 1.0, 20_000), scores))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows strided in memory", "rows in memory order"])
def test_smoothed_value_has_the_law_of_a_mean(dim, backend):
    scores = make_scores("normal", 300)
    rows = scores.expand(4000, -1) if dim else scores[:, None].expand(-1, 4000)
    top = noised_topk(rows, 6, 1.0, 5, dim, seed=6, backend=backend)
    expected = plain(scores, 6, 1.0, 20_000)[0][:, -1].unflatten(0, (4000, 5)).mean(1)
    check({"smoothed value": stats.ks_2samp(top, expected, method="asymp").pvalue})


def independence(grid, others):
    """p-values of values [N, B] being independent over rows, samples and the grids of other seeds."""
    shifts = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 8), (1, 0), (2, 0), (4, 0), (1, 1), (1, 4)]
    rows, samples = grid.shape
    pairs = {f"seed {name}": (grid, other) for name, other in others.items()}
    for n, b in shifts:
        pairs[f"{n} rows and {b} samples apart"] = grid[: rows - n, : samples - b], grid[n:, b:]
    p = {name: stats.spearmanr(x.flatten(), y.flatten()).pvalue for name, (x, y) in pairs.items()}
    # What a row or a sample index shares with itself would spread the mean ranks, what it balances would narrow them.
    for name, groups in (("within rows", grid), ("within samples", grid.T)):
        one_sided = stats.kruskal(*groups).pvalue
        p[name] = 2.0 * min(one_sided, 1.0 - one_sided)
    return p


@cache
def grids(kind, sampler, backend):
    """The k-th values [N, 100] for seeds that differ in one place: low word, high word, sign."""
    n_rows = 40 if (backend, sampler) == ("torch", "dense") else 200  # that one takes 50 us a value
    rows = make_scores(kind, 300).expand(n_rows, -1).contiguous()
    seeds = {"7": 7, "8": 8, "7 + 2**32": 7 + 2**32, "7 + 2**63": 7 + 2**63, "-7": -7}
    options = {"sampler": sampler, "backend": backend}
    return {
        name: noised_topk_candidates(rows, 6, 1.0, 100, seed=seed, **options)[0][..., -1].numpy()
        for name, seed in seeds.items()
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampler", ["thinned", "dense"])
@pytest.mark.parametrize("kind", ["normal", "flat"], ids=["contenders and arrivals", "arrivals alone"])
def test_rows_samples_and_seeds_are_independent(kind, sampler, backend):
    others = dict(grids(kind, sampler, backend))
    check(independence(others.pop("7"), others))


@pytest.mark.parametrize("sampler", ["thinned", "dense"])
@pytest.mark.parametrize("n_classes, k", [(300, 1), (1000, 6), (5000, 21)])
def test_equal_scores_give_gaussian_order_statistics(n_classes, k, sampler):
    n, epsilon = (20_000 if "cpp" in BACKENDS else 4000), 0.5
    values, classes = search(make_scores("flat", n_classes), k, epsilon, n, seed=9, sampler=sampler)
    z = (values.double().numpy() - 0.5) / epsilon
    law = stats.beta(k, n_classes - k + 1)  # of the k-th smallest of L uniforms, 1 - Phi(z)
    density = lambda x: law.pdf(stats.norm.sf(x)) * stats.norm.pdf(x)  # noqa: E731
    peak = stats.norm.isf(k / n_classes)
    moments = [integrate.quad(lambda x, m=m: x**m * density(x), peak - 4, peak + 6, limit=200)[0] for m in range(3)]
    assert moments[0] == pytest.approx(1.0, abs=1e-6)
    error = math.sqrt((moments[2] - moments[1] ** 2) / n)
    p = {"mean": two_sided((z[:, -1].mean() - moments[1]) / error)}
    p["law"] = stats.kstest(stats.norm.sf(z[:, -1]), law.cdf).pvalue
    # Renyi: -ln Phi(z) are the lowest of L exponentials, whose spacings times the classes left are independent Exp(1).
    spacings = np.diff(-stats.norm.logcdf(z), axis=1, prepend=0.0) * (n_classes - np.arange(k))
    p["joint law"] = stats.kstest(spacings.ravel(), "expon").pvalue
    p["uniform classes"] = stats.chisquare(np.bincount(classes.flatten() * 100 // n_classes, minlength=100)).pvalue
    for name, edge in (("first class", 0), ("last class", n_classes - 1)):  # where an index that is off by one shows
        p[name] = stats.binomtest(int((classes == edge).sum()), n, k / n_classes).pvalue
    p["classes do not depend on values"] = stats.spearmanr(classes[:, -1], z[:, -1]).pvalue
    if k > 1:
        p["spacings are independent"] = stats.spearmanr(spacings[:, 0], spacings[:, 1]).pvalue
        p["classes are independent"] = two_sided(((classes[:, 0] < classes[:, 1]).double().mean() - 0.5) * 2 * n**0.5)
    check(p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("others, n_classes", [(None, 2), (-math.inf, 1000), (-20.0, 1000)])
@pytest.mark.parametrize("mu, epsilon", [((0.0, 0.0), 1.0), ((0.5, -0.5), 1.0), ((3.0, 1.0), 0.7), ((-1.0, 4.0), 2.0)])
def test_maximum_of_two_classes(mu, epsilon, others, n_classes, backend):
    """Clark (1961): moments of the larger of two normals; other classes are masked or out of reach."""
    scores = torch.full((n_classes,), 0.0 if others is None else others)
    scores[[0, -1]] = torch.tensor(mu)
    n = 20_000 if backend == "cpp" else 4000
    values, classes = search(scores, 1, epsilon, n, seed=10, backend=backend)
    theta = epsilon * math.sqrt(2.0)
    a = (mu[0] - mu[1]) / theta
    share, phi = stats.norm.cdf(a), stats.norm.pdf(a)
    mean = mu[0] * share + mu[1] * (1 - share) + theta * phi
    square = (mu[0] ** 2 + epsilon**2) * share + (mu[1] ** 2 + epsilon**2) * (1 - share) + (mu[0] + mu[1]) * theta * phi
    error = math.sqrt((square - mean**2) / n)
    first = int((classes == 0).sum())
    assert first + int((classes == n_classes - 1).sum()) == n
    p = {"mean": two_sided((values.double().mean() - mean) / error)}
    p["share of the first class"] = stats.binomtest(first, n, share).pvalue
    check(p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampler", ["thinned", "dense"])
@pytest.mark.parametrize("kind", ["normal", "flat", "ties", "spiky", "sorted", "masked", "nearly all masked"])
def test_no_noise_gives_the_k_largest(kind, sampler, backend):
    rows = torch.stack([make_scores(kind, 1000), make_scores(kind, 1001)[:1000]])
    for k in (1, 6, 21):
        expected = rows.topk(k).values
        options = {"seed": 11, "sampler": sampler, "backend": backend}
        values, classes = noised_topk_candidates(rows, k, 0.0, 3, **options)
        assert torch.equal(values, expected[:, None].expand(-1, 3, -1))
        assert torch.equal(rows[:, None].expand(-1, 3, -1).gather(2, classes), values)
        top = noised_topk(rows, k, 0.0, 2, **options)  # the mean of two equal numbers is exact
        assert torch.equal(top, expected[:, -1])


def background_forgotten(scores):
    return scores.masked_fill(scores <= reference.cut_of(scores[None], 6), -math.inf)


def one_class_on(scores, n):
    values, classes = search(scores, 6, 1.0, n, 12)
    return values, (classes + 1) % len(scores)


def last_bits_lost(scores, n):
    values, classes = search(scores, 6, 1.0, n, 12)
    return values, classes & ~3


WRONG = [
    ("normal", "noise 5 % too wide", lambda s, n: search(s, 6, 1.05, n, 12)),
    ("flat", "noise 5 % too wide", lambda s, n: search(s, 6, 1.05, n, 12)),
    ("ties", "noise 5 % too narrow", lambda s, n: search(s, 6, 0.95, n, 12)),
    ("normal", "background forgotten", lambda s, n: search(background_forgotten(s), 6, 1.0, n, 12)),
    ("flat", "one class in a hundred forgotten", lambda s, n: search(s[:297], 6, 1.0, n, 12)),
    ("normal", "uniform noise of variance 1", lambda s, n: (s + (torch.rand(n, 300) - 0.5) * 12**0.5).topk(6)),
    ("normal", "classes shifted by one", one_class_on),  # not to be seen where all scores are equal
    ("normal", "last bits of classes lost", last_bits_lost),
    ("flat", "last bits of classes lost", last_bits_lost),
]


@pytest.mark.parametrize("kind, error, wrong", WRONG, ids=[f"{kind}: {error}" for kind, error, _ in WRONG])
def test_a_wrong_sampler_is_found(kind, error, wrong):
    torch.manual_seed(0)
    scores = make_scores(kind, 300)
    p = compare(wrong(scores, 20_000), plain(scores, 6, 1.0, 20_000), scores)
    with pytest.raises(AssertionError, match="p = "):
        check(p)


def test_contenders_drawn_twice_are_found():
    scores = make_scores("normal", 1000)
    twice = torch.cat([scores, scores[scores > reference.cut_of(scores[None], 6)]])
    values, _ = search(twice, 6, 1.0, 4000, seed=12)
    p = stats.ks_2samp(values[:, -1], plain(scores, 6, 1.0, 4000)[0][:, -1], method="asymp").pvalue
    assert p < LEVEL, f"p = {p:.3g}"


@pytest.mark.parametrize("error", ["repeated samples", "repeated rows", "rows share an offset"])
def test_dependence_is_found(error):
    grid = grids("normal", "thinned", BACKENDS[0])["7"].copy()
    if error == "repeated samples":
        grid[:, 4::8] = grid[:, :-4:8]  # one sample in eight is that of four before
    elif error == "repeated rows":
        grid[1::8] = grid[:-1:8]
    else:
        grid += 0.1 * grid.std() * np.random.default_rng(0).standard_normal((len(grid), 1))
    with pytest.raises(AssertionError, match="p = "):
        check(independence(grid, {}))
