"""The noise contract: torch and C++ forms against the known answers, bit for bit.

Contract under test: topk_fast/noise.py. known_answers.json was made by two independent implementations.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from topk_fast import noise, ops

KNOWN = json.loads((Path(__file__).parent / "known_answers.json").read_text())
_C = pytest.importorskip("topk_fast._C", reason="the C++ kernels are not built") if ops.HAS_CPP else None
FORMS = ["torch", "cpp"] if ops.HAS_CPP else ["torch"]


def call(form, name, x):
    """The named function of the contract on a NumPy array, as raw bits."""
    if form == "cpp":
        return getattr(_C, name)(x).view(np.uint32)
    x = torch.from_numpy(x.astype(np.int64) if x.dtype == np.uint32 else x)
    return getattr(noise, name)(x).numpy().view(np.uint32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name, source",
    [
        ("normal", "word"),
        ("gap", "word"),
        ("ln", "x_bits"),
        ("upper_quantile", "p_bits"),
        ("hazard_quantile", "e_bits"),
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
        words = _C.philox(*case["counter"], k0, k1)
    else:
        seed = (k0 | k1 << 32) - (1 << 64 if k1 >> 31 else 0)
        words = [int(w) for w in noise.philox(*case["counter"], torch.tensor(seed))]
    assert list(words) == case["out"]


@pytest.mark.parametrize("form", FORMS)
def test_plan(form):
    function = _C.plan if form == "cpp" else noise.plan
    for case in KNOWN["plan"]:
        expected = None if case["plan"] is None else tuple(case["plan"])
        assert function(case["L"], case["k"]) == expected, case


@pytest.mark.skipif(not ops.HAS_CPP, reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    "name, low, high",
    [("ln", 2.0**-126, 2.0**100), ("upper_quantile", 2.0**-126, 0.5), ("hazard_quantile", 1e-9, 300.0)],
)
def test_torch_equals_cpp_on_a_million_floats(name, low, high):
    bits = np.random.default_rng(0).integers(
        *np.array([low, high], np.float32).view(np.uint32), size=1_000_000, dtype=np.uint32
    )
    np.testing.assert_array_equal(call("torch", name, bits.view(np.float32)), call("cpp", name, bits.view(np.float32)))


@pytest.mark.skipif(not ops.HAS_CPP, reason="the C++ kernels are not built")
@pytest.mark.parametrize("name", ["normal", "gap"])
def test_torch_equals_cpp_on_a_million_words(name):
    words = np.random.default_rng(1).integers(0, 1 << 32, size=1_000_000, dtype=np.uint32)
    np.testing.assert_array_equal(call("torch", name, words), call("cpp", name, words))


def test_accuracy_against_scipy():
    """The contract fixes bits, this that the bits mean what they say: quantiles within 2e-6 of scipy's."""
    from scipy.stats import norm

    p = np.logspace(-13, np.log10(0.5), 20_001).astype(np.float32)
    np.testing.assert_allclose(
        call("torch", "upper_quantile", p).view(np.float32), norm.isf(p.astype(np.float64)), rtol=2e-6, atol=2e-6
    )
    e = np.logspace(-8, 1, 20_001).astype(np.float32)
    expected = norm.ppf(np.exp(-e.astype(np.float64)))
    np.testing.assert_allclose(call("torch", "hazard_quantile", e).view(np.float32), expected, rtol=2e-5, atol=2e-6)
