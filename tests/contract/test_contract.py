"""The noise contract: torch, C++ and Triton forms against the known answers, bit for bit; and the bounds on it.

Contract under test: topk_fast/noise.py; known_answers.json was made by two independent implementations. csrc/bounds.h:
what a bound drops cannot matter, and a bound is not much wider than it must be.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from testing import KNOWN_ANSWERS, ContractHooks
from topk_fast import available_backends, noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KNOWN = KNOWN_ANSWERS
HAS_CPP = "cpp" in available_backends("cpu")
TORCH, CPP = (pytest.param(form, marks=pytest.mark.host) for form in ("torch", "cpp"))
TRITON = ["triton"] * ("triton" in available_backends(DEVICE))
FORMS = [TORCH] + [CPP] * HAS_CPP + TRITON

if HAS_CPP:
    contract_hooks = ContractHooks()

if TRITON:
    import triton
    import triton.language as tl
    from topk_fast.triton_kernels import noise as triton_noise

    @triton.jit(do_not_specialize=["n"])
    def map_kernel(x, out, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        bits = tl.load(x + at, mask=at < n, other=0x3F000000)
        if NAME == "normal":
            result = triton_noise.normal(bits.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)
        elif NAME == "gumbel":
            result = triton_noise.gumbel(bits.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)
        elif NAME == "gumbel_level":
            result = triton_noise.gumbel_level(bits.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        elif NAME == "gap":
            result = triton_noise.gap(bits.to(tl.uint32, bitcast=True))
        elif NAME == "ln":
            result = triton_noise.ln(bits.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        elif NAME == "upper_quantile":
            result = triton_noise.upper_quantile(bits.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        else:
            result = triton_noise.hazard_quantile(bits.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        tl.store(out + at, result, mask=at < n)

    @triton.jit
    def philox_kernel(counter, seed, out):
        c = counter + tl.arange(0, 1)
        w0, w1, w2, w3 = triton_noise.philox(
            tl.load(c).to(tl.uint32),
            tl.load(c + 1).to(tl.uint32),
            tl.load(c + 2).to(tl.uint32),
            tl.load(c + 3).to(tl.uint32),
            tl.load(seed),
        )
        to = out + tl.arange(0, 1)
        tl.store(to, w0.to(tl.int64))
        tl.store(to + 1, w1.to(tl.int64))
        tl.store(to + 2, w2.to(tl.int64))
        tl.store(to + 3, w3.to(tl.int64))


def call(form, name, x):
    """The named function of the contract on a NumPy array, as raw bits."""
    if form == "cpp":
        return getattr(contract_hooks, name)(x).view(np.uint32)
    if form == "triton":
        bits = torch.from_numpy(x.view(np.int32)).to(DEVICE)
        out = torch.empty_like(bits)
        grid = (triton.cdiv(len(x), 4096),)
        map_kernel[grid](bits, out, len(x), NAME=name, BLOCK=4096, enable_fp_fusion=False)
        return out.cpu().numpy().view(np.uint32)
    x = torch.from_numpy(x.astype(np.int64) if x.dtype == np.uint32 else x)
    return getattr(noise, name)(x).numpy().view(np.uint32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name, source",
    [
        ("normal", "word"),
        ("gumbel", "word"),
        ("gap", "word"),
        ("ln", "x_bits"),
        ("upper_quantile", "p_bits"),
        ("hazard_quantile", "e_bits"),
        ("gumbel_level", "e_bits"),
    ],
)
def test_function(form, name, source):
    known = KNOWN[name]
    words = np.array(known[source], np.uint32)
    x = words if source == "word" else words.view(np.float32)
    expected = (
        np.array(known["out_bits"], np.uint32)
        if "out_bits" in known
        else np.array(known["out"], np.int32).view(np.uint32)
    )
    np.testing.assert_array_equal(call(form, name, x), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", KNOWN["philox"], ids=["zeros", "ones", "pi"])
def test_philox(form, case):
    k0, k1 = case["key"]
    if form == "cpp":
        words = contract_hooks.philox(*case["counter"], k0, k1)
    else:
        seed = torch.tensor((k0 | k1 << 32) - (1 << 64 if k1 >> 31 else 0), device=DEVICE)
        counter = torch.tensor(case["counter"], device=DEVICE)
        if form == "torch":
            words = [int(w) for w in noise.philox(*counter, seed)]
        else:
            words = torch.empty(4, dtype=torch.int64, device=DEVICE)
            philox_kernel[(1,)](counter, seed, words)
            words = words.tolist()
    assert list(words) == case["out"]


@pytest.mark.parametrize("form", FORMS)
def test_plan(form):
    module = noise if form == "torch" else contract_hooks if form == "cpp" else triton_noise
    for case in KNOWN["plan"]:
        expected = None if case["plan"] is None else tuple(case["plan"])
        law = [law.name for law in noise.LAWS].index(case["noise"])
        assert module.plan(case["L"], case["k"], law) == expected, case


@pytest.mark.skipif(not HAS_CPP, reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    "name, low, high",
    [
        ("ln", 2.0**-126, 2.0**100),
        ("upper_quantile", 2.0**-126, 0.5),
        ("hazard_quantile", 1e-9, 300.0),
        ("gumbel_level", 2.0**-100, 300.0),
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("form", [TORCH, *TRITON])
def test_a_million_floats_as_in_cpp(form, name, low, high):
    bits = np.random.default_rng(0).integers(
        *np.array([low, high], np.float32).view(np.uint32), size=1_000_000, dtype=np.uint32
    )
    np.testing.assert_array_equal(call(form, name, bits.view(np.float32)), call("cpp", name, bits.view(np.float32)))


@pytest.mark.skipif(not HAS_CPP, reason="the C++ kernels are not built")
@pytest.mark.parametrize("name", ["normal", "gumbel", "gap"])
@pytest.mark.slow
@pytest.mark.parametrize("form", [TORCH, *TRITON])
def test_a_million_words_as_in_cpp(form, name):
    words = np.random.default_rng(1).integers(0, 1 << 32, size=1_000_000, dtype=np.uint32)
    np.testing.assert_array_equal(call(form, name, words), call("cpp", name, words))


@pytest.mark.host
def test_accuracy_against_scipy():
    """The contract fixes bits, this that the bits mean what they say: quantiles within 2e-6 of scipy's."""
    p = np.logspace(-13, np.log10(0.5), 20_001).astype(np.float32)
    np.testing.assert_allclose(
        call("torch", "upper_quantile", p).view(np.float32), stats.norm.isf(p.astype(np.float64)), rtol=2e-6, atol=2e-6
    )
    e = np.logspace(-8, 1, 20_001).astype(np.float32)
    expected = stats.norm.ppf(np.exp(-e.astype(np.float64)))
    np.testing.assert_allclose(call("torch", "hazard_quantile", e).view(np.float32), expected, rtol=2e-5, atol=2e-6)


# Scores, a level to reach, and epsilon, from ordinary ones to those whose rounding is as large as the noise.
SIZES = [(1.0, 1.0), (1.0, 0.01), (1e3, 0.01), (1e4, 0.01), (1e-3, 5.0), (1e30, 1e28), (1e-39, 1e-40), (1.0, 0.0)]


def near(reach, epsilon, dtype):
    """Scores from which `reach` is up to six draws' standard deviations away, some of them above it."""
    t = np.random.default_rng(2).uniform(-2, 6, 20_000)
    return (float(reach) - t * (epsilon or float(reach))).astype(dtype)


needs_bounds = pytest.mark.skipif(not HAS_CPP, reason="the C++ kernels are not built")


# By law: the draw and the level of the contract, 1 - F and -ln F by scipy, and how loose the bounds may be.
LAWS = {
    "normal": ("normal", "hazard_quantile", stats.norm.sf, lambda x: -stats.norm.logcdf(x), 1.07, 1.2),
    "gumbel": (
        "gumbel",
        "gumbel_level",
        lambda x: stats.gumbel_r.sf(x + np.euler_gamma),
        lambda x: np.exp(-(x + np.euler_gamma)),
        1.6,  # exp(-x) for 1 - exp(-exp(-x))
        1.001,
    ),
}
both_laws = pytest.mark.parametrize("law", LAWS)


@pytest.mark.host
@needs_bounds
@both_laws
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size, epsilon", SIZES)
def test_no_word_beyond_its_bound_reaches(size, epsilon, dtype, law):
    draw, _, upper, _, loose, _ = LAWS[law]
    reach = dtype(0.7 * size)
    x = near(reach, epsilon, dtype)
    bound = contract_hooks.word_bound(x.astype(np.float32), float(reach), epsilon, [*LAWS].index(law))
    dropped = bound < (1 << 24) - 1  # the others drop no word
    assert 0.4 < dropped.mean() < 0.8
    best = ((bound[dropped].astype(np.int64) + 1) << 8).astype(np.uint32)  # of those dropped: draws fall with words
    z = getattr(contract_hooks, draw)(best).astype(dtype)
    assert (x[dropped] + dtype(epsilon) * z < reach).all()
    if 1e-3 <= size <= 1 and epsilon:
        share = upper((float(reach) - x[dropped].astype(np.float64)) / epsilon)
        assert (bound[dropped] <= loose * share * 2**24 + 3).all()


@pytest.mark.host
@needs_bounds
@both_laws
@pytest.mark.parametrize("size, epsilon", SIZES)
def test_no_arrival_beyond_its_bound_reaches(size, epsilon, law):
    _, level, _, hazard, _, loose = LAWS[law]
    reach = np.float32(0.7 * size)
    x = near(reach, epsilon, np.float32)
    bound = contract_hooks.time_bound(x, float(reach), epsilon, [*LAWS].index(law))
    bounded = np.isfinite(bound)
    assert 0.4 < bounded.mean() < 0.8
    z = getattr(contract_hooks, level)(np.nextafter(bound[bounded], np.float32(1), dtype=np.float32))
    assert (x[bounded] + np.float32(epsilon) * z < reach).all()
    if 1e-3 <= size <= 1 and epsilon:
        time = hazard((float(reach) - x[bounded].astype(np.float64)) / epsilon)
        assert (bound[bounded] <= loose * time + 4e-14).all()


@pytest.mark.host
@needs_bounds
def test_rare_arrivals_are_never_bounded_away():
    """Beyond 7.5 the contract's quantile is larger than the true one: arrivals up to there are always looked at."""
    bound = float(contract_hooks.time_bound(np.zeros(1, np.float32), 8.2, 1.0, 0)[0])
    assert bound > 3e-14
    assert float(contract_hooks.hazard_quantile(np.array([bound], np.float32))[0]) < 8.2


@pytest.mark.host
def test_gumbel_against_scipy():
    """The draws of Gumbel's law and its levels are within 2e-6 of its quantiles."""
    words = np.random.default_rng(4).integers(0, 1 << 32, size=200_000, dtype=np.uint32)
    upper = words < 1 << 31
    tail = (np.where(upper, words, ~words) + 0.5) * 2.0**-32
    expected = np.where(upper, stats.gumbel_r.isf(tail), stats.gumbel_r.ppf(tail)) - np.euler_gamma
    np.testing.assert_allclose(call("torch", "gumbel", words).view(np.float32), expected, rtol=1e-6, atol=2e-6)
    e = np.logspace(-12, 2, 20_001).astype(np.float32)
    expected = -np.log(e.astype(np.float64)) - np.euler_gamma
    np.testing.assert_allclose(call("torch", "gumbel_level", e).view(np.float32), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.host
@needs_bounds
def test_halves_are_widened_exactly_and_rounded_to_the_nearest():
    every = np.arange(1 << 16, dtype=np.uint16)
    halves = every.view(np.float16)
    np.testing.assert_array_equal(contract_hooks.widen_half(every), halves.astype(np.float32))
    wide = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    between = (wide[1:].astype(np.float64) + wide[:-1]) / 2  # exact in float32, and ties
    x = np.concatenate([between.astype(np.float32), wide, [65519.0, 65520.0, 1e9, -1e9, np.inf, -np.inf, 1e-9]])
    with np.errstate(over="ignore"):
        x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
        x = x.astype(np.float32)
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(contract_hooks.round_to_half(x), expected.view(np.uint16))
    assert np.isnan(contract_hooks.round_to_half(np.array([np.nan], np.float32)).view(np.float16)[0])
