"""What all tests share: backends, kinds of scores, known answers, simple oracles, the comparison of bits, and the noise
contract's functions in C++.
"""

import ctypes
import json
from pathlib import Path

import numpy as np
import torch

from topk_fast import available_backends, noise, reference

ROOT = Path(__file__).resolve().parent.parent
# Tests of all backends run on the fast ones. Triton's are in test_triton.py, because its interpreter takes a second a
# row.
BACKENDS = [name for name in available_backends("cpu") if name != "triton"]
INF, NAN = float("inf"), float("nan")
KNOWN_ANSWERS = json.loads((ROOT / "tests" / "known_answers.json").read_text())
KNOWN = [
    (case, name)
    for case in KNOWN_ANSWERS["row"]["cases"]
    for name in ("thinned", "dense")
    if name in case  # long rows have no dense lists
]
KNOWN_IDS = [f"{name}-{c['noise']}-{c['scores']}-L{c['L']}-k{c['k']}-epsilon{c['epsilon']}" for c, name in KNOWN]


def known_scores(case):
    """The row that a known answer names, made from the contract's own noise."""
    words = noise.philox(torch.arange(case["L"]), 1000, 0, 0, torch.tensor(case["seed"]))
    z = noise.normal(words[0])
    return {
        "normal": lambda: z,
        "flat": lambda: torch.zeros_like(z),
        "ties": lambda: (z * 4).round() * 0.25,
        "masked": lambda: z.masked_fill(words[1] < 0xE0000000, -INF),
        "spiky": lambda: (z * z) * z,
    }[case["scores"]]()


# Searches whose workspace has to be small beside their scores: n_rows, n_classes, dtype, k, n_sample.
LARGE_SEARCHES = [
    (262_144, 1000, torch.float32, 6, 5),
    (8192, 131_072, torch.bfloat16, 6, 16),
    (2048, 1_000_000, torch.bfloat16, 6, 5),
    (1, 1_000_000, torch.float32, 6, 5),
    (4096, 100_000, torch.float32, 100, 16),
]


def bits(x):
    """The raw bits, with one pattern for every NaN: which NaN it is the contract leaves open."""
    if not x.dtype.is_floating_point:
        return x
    x = torch.where(x.isnan(), torch.full_like(x, NAN), x)
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same(given, expected, note=""):
    given = given if isinstance(given, tuple) else (given,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, b in zip(given, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, note
        where = (bits(a) != bits(b)).nonzero()
        assert not where.numel(), f"{note} differs at {where[0].tolist()}: {a[tuple(where[0])]} {b[tuple(where[0])]}"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_with_closed_gates(n_rows, n_classes):
    """Scores and true classes; every other true score is so high that its loss is 0."""
    generator = torch.Generator().manual_seed(n_classes)
    scores = torch.randn(n_rows, n_classes, generator=generator)
    target = torch.randint(n_classes, (n_rows,), generator=generator)
    # The scores of half of the true classes rise above the margin: closed gates too.
    scores[torch.arange(n_rows), target] += torch.arange(n_rows) % 2 * 6.0
    return scores, target


KINDS = {
    "normal": lambda x, u, low: x,
    "zeros": lambda x, u, low: torch.zeros_like(x),
    "minus zeros": lambda x, u, low: torch.full_like(x, -0.0),
    "zeros of both signs": lambda x, u, low: torch.zeros_like(x).copysign(x),
    "large constant": lambda x, u, low: torch.full_like(x, 1000.0),
    "ties": lambda x, u, low: (x * 2).round() / 2,
    "spiky": lambda x, u, low: x**3,
    "falling": lambda x, u, low: x.sort(dim=1, descending=True).values,
    "rising": lambda x, u, low: x.sort(dim=1).values,
    "tiny": lambda x, u, low: x * 1e-40,
    "huge": lambda x, u, low: x * 1e4,
    "half masked": lambda x, u, low: x.masked_fill(u < 0.5, -INF),
    "99 % masked": lambda x, u, low: x.masked_fill(u < 0.99, -INF),
    "all masked": lambda x, u, low: torch.full_like(x, -INF),
    "masked by finfo.min": lambda x, u, low: x.masked_fill(u < 0.9, low),
    "some +inf": lambda x, u, low: x.masked_fill(u < 0.02, INF),
    "half +inf": lambda x, u, low: x.masked_fill(u < 0.5, INF),
    "+inf and -inf": lambda x, u, low: x.masked_fill(u < 0.3, INF).masked_fill(u > 0.7, -INF),
    "rows of many sizes": lambda x, u, low: x * 10.0 ** (torch.arange(len(x)) % 5 - 2.0)[:, None],
    "some NaN": lambda x, u, low: x.masked_fill(u < 0.01, NAN),
    "a NaN in the last class": lambda x, u, low: x.index_fill(1, torch.tensor([x.shape[1] - 1]), NAN),
}


def scores_of(kind, dtype, n_rows, n_classes, data_seed):
    generator = torch.Generator().manual_seed(data_seed)
    x = torch.randn(n_rows, n_classes, generator=generator, dtype=torch.float64)
    u = torch.rand(n_rows, n_classes, generator=generator)
    low = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    return KINDS[kind](x, u, low).to(dtype)


def dense_oracle(scores, k, epsilon, n_sample, seed):
    """All noised scores by the contract's draws, sorted; stable, so the lower class is first among equals."""
    rows = torch.arange(scores.shape[0])
    z = reference.dense_noise(rows, scores.shape[1], n_sample, torch.tensor(seed))
    noised = scores[:, None] + epsilon * z.to(scores.dtype)
    order = (noised + 0.0).sort(dim=2, descending=True, stable=True).indices[..., :k]
    return noised.gather(2, order), order


def merge(parts, k):
    """The k best of candidates of several class slices: value descending, then class ascending, -1 last."""
    values = torch.cat([p[0] for p in parts], dim=2)
    classes = torch.cat([p[1] for p in parts], dim=2)
    order = classes.where(classes >= 0, torch.tensor(2**62)).sort(dim=2, stable=True).indices
    values, classes = values.gather(2, order), classes.gather(2, order)
    order = (values + 0.0).sort(dim=2, descending=True, stable=True).indices[..., :k]
    return values.gather(2, order), classes.gather(2, order)


def equal_scores_under_a_mask(n_classes, k, finite):
    """Zeros at the heads of the groups that the plan looks at, then at their second classes; all else is masked."""
    group, stride, rank = noise.plan(n_classes, k)
    heads = torch.arange(0, n_classes, group * stride)
    scores = torch.full((1, n_classes), -INF)
    scores[0, torch.cat([heads, heads + 1])[:finite]] = 0.0
    assert rank <= finite, "the cut is one of the finite scores"
    return scores


class ContractHooks:
    """The contract's functions as csrc/testing.cpp exposes them, on NumPy arrays; the binary is the one that runs the
    ops.
    """

    def __init__(self):
        from topk_fast import _C  # here, because most tests also run where it is not built

        self._library = ctypes.CDLL(_C.__file__)
        bound = [ctypes.c_float, ctypes.c_double, ctypes.c_int32]  # the score to reach, epsilon, the law's number
        self.normal = self._map("normal", np.uint32, np.float32)
        self.gumbel = self._map("gumbel", np.uint32, np.float32)
        self.gap = self._map("gap", np.uint32, np.int32)
        self.ln = self._map("ln", np.float32, np.float32)
        self.upper_quantile = self._map("upper_quantile", np.float32, np.float32)
        self.hazard_quantile = self._map("hazard_quantile", np.float32, np.float32)
        self.gumbel_level = self._map("gumbel_level", np.float32, np.float32)
        self.widen_half = self._map("widen_half", np.uint16, np.float32)
        self.round_to_half = self._map("round_to_half", np.float32, np.uint16)
        self.word_bound = self._map("word_bound", np.float32, np.int32, bound)
        self.time_bound = self._map("time_bound", np.float32, np.float32, bound)

    def _map(self, name, takes, returns, more=()):
        """The hook of a function of one array, and of the numbers whose ctypes are in ``more``."""
        hook = self._library[f"topk_fast_{name}"]
        hook.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *more]
        hook.restype = None

        def call(x, *numbers):
            x = np.ascontiguousarray(x, takes)
            out = np.empty(x.shape, returns)
            hook(x.ctypes.data, x.size, out.ctypes.data, *numbers)
            return out

        return call

    def philox(self, *counter_and_key):
        out = (ctypes.c_uint32 * 4)()
        self._library.topk_fast_philox((ctypes.c_uint32 * 6)(*counter_and_key), out)
        return tuple(out)

    def plan(self, n_classes, k, law):
        out = (ctypes.c_int64 * 4)()
        self._library.topk_fast_plan(ctypes.c_int64(n_classes), ctypes.c_int64(k), ctypes.c_int32(law), out)
        every_class, *numbers = out
        return None if every_class else tuple(numbers)
