"""Contract under test: backend "triton" gives the bits of reference.py, for values, classes, excesses and gradients.

On a GPU where there is one; else in Triton's interpreter, which runs the same kernels, one program after another, on
CPU tensors. The kinds of scores are those of test_backends.py. The interpreter takes a second a row, so it gets few
rows of many shapes; a GPU compiles each shape for a second or more, so it gets few shapes, each with every kind of
scores.
"""

import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import torch

from testing import (
    KINDS,
    KNOWN,
    KNOWN_IDS,
    LARGE_SEARCHES,
    ROOT,
    assert_same,
    dense_oracle,
    equal_scores_under_a_mask,
    known_scores,
    merge,
    randn,
    scores_of,
)
from topk_fast import BalNoisedTopK, available_backends, backends, noise, reference
from topk_fast.functional import (
    bal_noised_topk_loss,
    linear_noised_topk_loss,
    noised_excess,
    noised_topk,
    noised_topk_candidates,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif("triton" not in available_backends(DEVICE), reason="Triton is not installed")
only_interpreted = pytest.mark.skipif(
    ON_GPU, reason="a GPU compiles this shape for a second or more, and other shapes show the same there"
)
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: streams, graphs and 4 GiB tensors are not interpreted")
if "triton" in available_backends(DEVICE):
    import triton
    import triton.language as tl
    import triton.runtime.interpreter as interpreted
    from topk_fast.triton_kernels import bounds, collect, launch, layout

    @triton.jit
    def bounds_kernel(scores, words, times, reach, epsilon, LAW: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, N)
        score, epsilon = tl.load(scores + at), tl.cast(epsilon, tl.float32)
        tl.store(words + at, bounds.word_bound(score, reach, epsilon, LAW))
        tl.store(times + at, bounds.time_bound(score, reach, epsilon, LAW))


ORACLE = "torch"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Shape(NamedTuple):
    """What decides which kernels a call compiles."""

    sampler: str
    n_classes: int
    k: int
    n_sample: int
    dtype: torch.dtype
    parts: int = 1  # programs a row in the first launch; the launcher's own choice is by shape
    noise: str = "normal"
    what: str = "excess"  # or "value", or "others", which excludes the target
    several: bool = False  # ranks


GPU_SHAPES = [  # few classes, many samples and large k, whole rows, rows in two parts and in four
    Shape("dense", 15, 6, 5, BF16, noise="gumbel", what="others"),
    Shape("dense", 300, 100, 33, F16),
    Shape("thinned", 1001, 6, 5, F32, what="others", several=True),
    Shape("thinned", 4097, 1, 16, F16, 2, noise="gumbel"),
    Shape("thinned", 20_011, 6, 5, BF16, 4, what="value", several=True),
]
NUMBERS = range(len(GPU_SHAPES) if ON_GPU else 3)


def drawn(draw, number):
    """On a GPU the shape of that number; in the interpreter any that it does in a second or two."""
    if ON_GPU:
        return GPU_SHAPES[number]
    sampler = draw.choice(["thinned", "thinned", "dense"])
    short = draw.choice([draw.randint(2, 300), draw.choice([15, 16, 17, 63, 64, 65, 129, 255, 513, 1000, 2049])])
    return Shape(
        sampler,
        draw.randint(2, 150) if sampler == "dense" else short,
        draw.choice([1, 2, 6, 6, 11, 21]),
        draw.choice([1, 4, 5, 8, 9]),
        draw.choice([F32, BF16, F16]),
        draw.choice([1, 1, 2, 4]),
        draw.choice(["normal", "gumbel"]),
        draw.choice(["value", "excess", "others"]),
        draw.random() < 0.5,
    )


def seed_and_epsilon(draw):
    """A seed, and a noise level that is a number or a schedule's tensor."""
    epsilon = draw.choice([0.0, 1e-40, 0.01, 0.2, 1.0, 5.0])
    return draw.randint(-(2**63), 2**63 - 1), draw.choice([epsilon, torch.tensor(epsilon)])


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Spares the interpreter work that changes no result: it patches the language again in each call of a function,
    and repeats each sum and product of integers in 64 bits for a check that it then leaves out.

    NumPy warns of inf - inf and x / 0, where the kernels mean them and hardware says nothing.
    """
    if not ON_GPU:
        patch, scopes = interpreted._patch_lang, {}

        def patch_once(function):
            module = function.__globals__["__name__"]
            if module not in scopes:
                scopes[module] = patch(function)
            return interpreted._LangPatchScope()

        monkeypatch.setattr(interpreted, "_patch_lang", patch_once)
        options = dataclasses.replace(interpreted.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreted.interpreter_builder, "options", options)
    with np.errstate(all="ignore"):
        yield
    if not ON_GPU:
        for scope in reversed(scopes.values()):
            scope.restore()


def split_rows(monkeypatch, parts):
    """Has ``parts`` programs collect each row."""
    fresh = lru_cache(layout.layout_of.__wrapped__)  # a layout of this number is for this test only
    monkeypatch.setattr(layout, "row_parts", lambda *_: parts)
    monkeypatch.setattr(launch, "layout_of", fresh)


def run(backend, function, scores, *args, grad=None, **more):
    """Outputs of a function, with the gradient where one is asked for, on the CPU; triton on DEVICE."""
    if backend == "triton":
        scores, *args = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in (scores, *args))
    if grad is None:
        out = function(scores, *args, backend=backend, **more)
        return tuple(x.cpu() for x in out) if isinstance(out, tuple) else (out.cpu(),)
    leaf = scores.detach().requires_grad_()
    out = function(leaf, *args, backend=backend, **more)
    out.backward(grad.to(out))
    return out.detach().cpu(), leaf.grad.cpu()


def check(function, *args, note="", **more):
    """Raises unless triton's bits are the oracle's; returns them."""
    expected = run(ORACLE, function, *args, **more)
    assert_same(run("triton", function, *args, **more), expected, note)
    return expected


@pytest.fixture(params=["thinned", pytest.param("dense", marks=only_interpreted)])
def sampler(request):
    return request.param


# Bits


def some_on_gpu(cases, keep):
    """Arguments of a test, of which a GPU runs those that ``keep`` takes."""
    return [pytest.param(*case, marks=() if keep(*case) else only_interpreted) for case in cases]


@pytest.mark.parametrize(
    "case, name",
    some_on_gpu(
        KNOWN, lambda case, name: case["scores"] == "normal" and case["k"] == 6 and case["L"] in (1000, 50_000)
    ),
    ids=KNOWN_IDS,
)
def test_known_answers(case, name):
    if name == "dense" and case["L"] > 1000 and not ON_GPU:
        pytest.skip("the interpreter would take a minute for each")
    values, classes = run(
        "triton",
        noised_topk_candidates,
        known_scores(case)[None],
        case["k"],
        case["epsilon"],
        case["n_sample"],
        noise=case["noise"],
        seed=case["seed"],
        first_row=case["row"],
        sampler=name,
    )
    assert classes[0].tolist() == case[name]["class"]
    assert (values[0].view(torch.int32).to(torch.int64) & 0xFFFFFFFF).tolist() == case[name]["value_bits"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", KINDS)
def test_candidates(monkeypatch, kind, number):
    draw = random.Random(f"candidates {kind} {number}")
    shape = drawn(draw, number)
    scores = scores_of(kind, shape.dtype, draw.randint(1, 2), shape.n_classes, draw.randint(0, 2**31))
    seed, epsilon = seed_and_epsilon(draw)
    split_rows(monkeypatch, shape.parts)
    check(
        noised_topk_candidates,
        scores,
        shape.k,
        epsilon,
        shape.n_sample,
        noise=shape.noise,
        seed=seed,
        sampler=shape.sampler,
        first_row=draw.choice([0, 5, 2**31 - 9 if ON_GPU else 2**31]),
        first_class=draw.choice([0, 1000, 2**30]),
    )


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", KINDS)
def test_excesses_and_gradients(monkeypatch, kind, number):
    """One rank and several, of all classes and of those beside the target, with rows that are ignored and with NaN."""
    draw = random.Random(f"excesses {kind} {number}")
    shape = drawn(draw, number)
    n_rows, n_classes, data_seed = draw.randint(1, 3), shape.n_classes, draw.randint(0, 2**31)
    scores = scores_of(kind, shape.dtype, n_rows, n_classes, data_seed)
    generator = torch.Generator().manual_seed(data_seed)
    target = torch.randint(n_classes, (n_rows,), generator=generator)
    if draw.random() < 0.5:
        target = scores.float().nan_to_num().argmax(1)  # which stands in front of most lists
    target[torch.rand(n_rows, generator=generator) < 0.2] = -100
    least = {"value": 1, "excess": 0, "others": 1}[shape.what]
    k = max(least, min(shape.k, n_classes - 1))
    ks = [k, least, (k + least) // 2] if shape.several else k
    grad = torch.randn((n_rows, 3) if shape.several else (n_rows,), generator=generator)
    if draw.random() < 0.5:
        grad = grad.sign()  # counts show as they are
    seed, epsilon = seed_and_epsilon(draw)
    more = dict(grad=grad, noise=shape.noise, seed=seed, sampler=shape.sampler)
    split_rows(monkeypatch, shape.parts)
    if shape.what == "value":
        check(noised_topk, scores, ks, epsilon, shape.n_sample, **more)
    else:
        more["exclude_target"] = shape.what == "others"
        check(noised_excess, scores, target, ks, epsilon, shape.n_sample, **more)


@pytest.mark.parametrize(
    "n_rows, n_classes, k, n_sample",
    [
        pytest.param(1, 20_011, 6, 10, id="ten thousands", marks=only_interpreted),
        pytest.param(1, 131_072, 6, 5, id="a long row"),
        pytest.param(1, 120, 101, 10, id="all of k, more samples than side by side", marks=only_interpreted),
        pytest.param(1, 3000, 101, 5, id="large k"),
        pytest.param(20, 9, 2, 3, id="rows outnumber programs", marks=only_interpreted),
        pytest.param(1, 129, 128, 1, id="largest k"),
    ],
)
def test_shapes(n_rows, n_classes, k, n_sample):
    check(noised_topk_candidates, randn(n_rows, n_classes), k, 1.0, n_sample, seed=3)


@pytest.mark.parametrize("parts", [1, 4])
def test_more_contenders_than_a_list_holds(monkeypatch, parts):
    """The plan looks at every other group of 8; the classes between are all above the cut, 4500 for some 350 places."""
    split_rows(monkeypatch, parts)
    assert noise.plan(9000, 6)[:2] == (8, 2)
    scores = randn(1, 9000) + (torch.arange(9000) // 8 % 2) * 20.0
    check(noised_topk_candidates, scores, 6, 1.0, 5, seed=3)


ORDERS = {  # rows in which the high scores stand close together
    "sorted": lambda x: x.sort(dim=1, descending=True).values,
    "by Zipf's law": lambda x: x * 0.1 - torch.arange(1.0, x.shape[1] + 1).log(),
    "in a cluster": lambda x: x + (torch.arange(x.shape[1]) // 1500 == 3) * 6.0,
    "ties in a cluster": lambda x: (x * 0.0) + (torch.arange(x.shape[1]) // 700 == 2) * 1.0,
    "a NaN behind a cluster": lambda x: (x + (torch.arange(x.shape[1]) < 2000) * 6.0).index_fill(
        1, torch.tensor([x.shape[1] - 2]), float("nan")
    ),
}


@pytest.mark.parametrize("order", some_on_gpu([(order,) for order in ORDERS], lambda order: order == "in a cluster"))
@pytest.mark.parametrize(
    "parts, law, epsilon, n_sample", [(1, "normal", 1.0, 5), (4, "gumbel", 1.0, 17), (1, "gumbel", 0.0, 3)]
)
def test_rows_whose_high_scores_stand_together(monkeypatch, order, parts, law, epsilon, n_sample):
    """Lists overflow in the middle of a block, for two batches of samples too, and the rest is collected later."""
    split_rows(monkeypatch, parts)
    scores = ORDERS[order](randn(1, 9001, seed=2))
    check(noised_topk_candidates, scores, 6, epsilon, n_sample, noise=law, seed=3)


@only_interpreted
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_parts_share_high_scores_that_stand_together(monkeypatch, dtype):
    """Parts take 128 bytes in turn: none of their lists overflows, though many contenders stand side by side."""
    split_rows(monkeypatch, 16)
    scores, length = randn(1, 100_000), 100_000
    scores[0, 1000:1400] += 6.0
    scores = scores.to(dtype)
    wanted = layout.Wanted((6,), 5, 0, False, False, True)
    how = launch.layout_of((1, length), scores.element_size(), True, wanted, 132)
    parts, capacity, slot = how.lists
    workspace = torch.zeros(slot, dtype=torch.int64)
    numbers = (0, length, 1, length, *how.plan[:3], *how.lists)
    launch.launch(collect.collect_kernel, parts, (scores, workspace), numbers, (how.collecting,), warps=1)
    counts = workspace[1 : 1 + parts]
    assert (counts > 20).all() and (counts <= capacity).all()
    assert counts.sum() == (scores.float() > reference.cut_of(scores.float(), 6)).sum() > 800


@only_interpreted
@pytest.mark.parametrize("aligned", [True, False], ids=["vectors", "one by one"])
def test_a_part_leaves_the_maxima_of_another_part_alone(monkeypatch, aligned):
    """Parts of a row find its cut in the same words, on a device at the same time: here, each looks after the other."""
    split_rows(monkeypatch, 2)
    length = 100_000 if aligned else 100_001
    wanted = layout.Wanted((6,), 5, 0, False, False, True)
    how = launch.layout_of((1, length), 4, True, wanted, 132)
    workspace = torch.zeros(how.lists[2], dtype=torch.int64)
    numbers = (0, length, 1, length, *how.plan[:3], *how.lists)
    seen = []  # the workspace at each barrier
    monkeypatch.setattr(interpreted.InterpreterBuilder, "create_barrier", lambda self: seen.append(workspace.clone()))
    launch.launch(collect.collect_kernel, 2, (randn(1, length), workspace), numbers, (how.collecting,), warps=1)
    prepared, found, *others = (x.view(torch.int32) for x in seen)
    maxima = (prepared != found).nonzero()[:, 0]
    assert maxima.numel() > 500 and len(others) >= 4
    assert all(torch.equal(x[maxima], found[maxima]) for x in others)


@pytest.mark.parametrize("k, finite", [pytest.param(100, 100, marks=only_interpreted), (6, 500)])
@pytest.mark.parametrize("parts", [1, 2])
def test_masked_rows(monkeypatch, parts, k, finite):
    split_rows(monkeypatch, parts)
    check(noised_topk_candidates, equal_scores_under_a_mask(20_000, k, finite), k, 1.0, 2, seed=5)


@only_interpreted
@pytest.mark.parametrize("epsilon", [1e-44, 1e-40])
def test_a_subnormal_epsilon(epsilon):
    """Noised scores are then rounded by more than the bounds' slack of a smaller epsilon, and tie."""
    for seed in range(6, 10):
        check(noised_topk_candidates, torch.zeros(2, 40), 6, epsilon, 8, seed=seed)


@pytest.mark.parametrize("kind", ["normal", "zeros of both signs", "ties"])
def test_dense_is_a_sort_of_all_noised_scores(kind):
    scores = scores_of(kind, torch.float32, 2, 129, 1)
    given = run("triton", noised_topk_candidates, scores, 5, 0.5, 9, seed=3, sampler="dense")
    assert_same(given, dense_oracle(scores, 5, 0.5, 9, 3))


@pytest.mark.parametrize(
    "bounds", some_on_gpu([((1, 100),), ((3, 4, 5),), ((128,),)], lambda bounds: len(bounds) == 3), ids=str
)
def test_dense_class_slices_merge_to_the_whole(bounds):
    scores, edges = scores_of("ties", torch.float32, 2, 200, 3), [0, *bounds, 200]
    more = dict(seed=11, first_row=7, sampler="dense")
    parts = [
        run("triton", noised_topk_candidates, scores[:, a:b], 21, 1.0, 5, first_class=a, **more)
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    assert_same(merge(parts, 21), run("triton", noised_topk_candidates, scores, 21, 1.0, 5, **more))


def test_row_slices_equal_the_whole(sampler):
    scores, first = randn(2, 300), 2**31 - 1
    whole = run("triton", noised_topk_candidates, scores, 6, 1.0, 5, seed=-5, first_row=first, sampler=sampler)
    for n in range(2):
        part = run(
            "triton",
            noised_topk_candidates,
            scores[n : n + 1],
            6,
            1.0,
            5,
            seed=-5,
            first_row=first + n,
            sampler=sampler,
        )
        assert_same(part, tuple(x[n : n + 1] for x in whole), f"row {n}")


def test_the_last_classes_that_int32_can_name(sampler):
    check(noised_topk_candidates, randn(2, 300), 6, 0.5, 5, seed=1, first_class=2**31 - 301, sampler=sampler)


@pytest.mark.parametrize("seed", [0, 2**32 + 7, 2**63 - 1, -1, -(2**63)])
def test_seeds(seed):
    check(noised_topk_candidates, randn(1, 300), 3, 1.0, 5, seed=seed)


LAYOUTS = {
    "row slices": lambda x: x[::2],
    "class slices, unaligned": lambda x: x[:, 3:1203],
    "offset by one": lambda x: x.flatten()[1:-1299].view(-1, 1300),
    "transposed": lambda x: x.t().contiguous().t(),
    "every third class": lambda x: x[:, ::3],
    "one row expanded": lambda x: x[:1].expand(3, -1),
    "one score expanded": lambda x: x[:1, :1].expand(2, 500),
}


@pytest.mark.parametrize(
    "layout, dtype",
    some_on_gpu(
        itertools.product(LAYOUTS, [F32, BF16]),  # on a GPU the dtypes in turn
        lambda layout, dtype: list(LAYOUTS).index(layout) % 2 == (dtype == BF16),
    ),
    ids=str,
)
def test_strided_scores_are_read_in_place(monkeypatch, layout, dtype):
    scores = LAYOUTS[layout](randn(4, 1300).to(dtype).to(DEVICE))
    expected = run(ORACLE, noised_topk_candidates, scores.cpu().contiguous(), 4, 1.0, 5, seed=4)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: pytest.fail("a copy of the scores"))
    assert_same(run("triton", noised_topk_candidates, scores, 4, 1.0, 5, seed=4), expected)


def test_strided_gradients_and_labels():
    scores, target = randn(3, 300), torch.tensor([5, 0, 7, 0, 299])[::2]
    grad = torch.ones(1).expand(3)
    check(bal_noised_topk_loss, scores, target, 5, 1.0, 5, grad=grad, seed=4, reduction="none")
    out = bal_noised_topk_loss(scores.to(DEVICE).requires_grad_(), target.to(DEVICE), 5, seed=4, backend="triton")
    out.backward()  # an expanded gradient of the mean


@pytest.mark.parametrize(
    "n_rows, n_classes, dtype",
    some_on_gpu(
        [
            (3, 4096, F32),
            (3, 4096, BF16),
            (3, 4096, F16),
            (5, 1365, F32),
            (2, 12_000, BF16),
            (300, 7, F16),
            (1, 1, F32),
        ],
        lambda n_rows, *_: n_rows not in (1, 3),
    ),
    ids=str,
)
def test_gradient_across_blocks_and_rows(n_rows, n_classes, dtype):
    """The op by itself, at block edges: classes that repeat, true classes among them or not, ignored rows, NaN rows."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(n_classes, (n_rows, 36, 2), generator=generator)
    classes[:, :20, 0] = classes[:, :1, 0]
    classes[:, 30:, 1] = classes[:, 1:2, 0]  # one class at both ranks
    classes[0, 5], classes[-1, 6] = 0, n_classes - 1
    target = classes[:, 25, 1].clone()
    target[n_rows // 4] = -100
    classes[n_rows // 3] = -1  # no list of a masked row reaches its ranks
    classes[n_rows // 2] = -2
    grad = torch.randn(n_rows, 2, generator=generator)
    for y, n_ranks in ((target, 2), (None, 2), (target, 1)):
        args = (grad[:, :n_ranks], classes[..., :n_ranks], y)
        expected = torch.ops.topk_fast.gradient_torch(*args, -100, 0, n_classes, dtype)
        on_device = [None if x is None else x.to(DEVICE) for x in args]
        given = torch.ops.topk_fast.gradient_triton(*on_device, -100, 0, n_classes, dtype)
        assert_same(given.cpu(), expected)
        if y is not None and (n_rows < 100 or ON_GPU):
            first, width = n_classes // 3, (n_classes + 1) // 2  # a slice of the classes
            given = torch.ops.topk_fast.gradient_triton(*on_device, -100, first, width, dtype)
            assert_same(given.cpu(), expected[:, first : first + width])


def test_ignored_rows_and_reductions():
    scores, target = randn(12, 30), torch.arange(12)
    target[::3] = -7
    for reduction in ("none", "sum", "mean"):
        check(
            bal_noised_topk_loss,
            scores,
            target,
            3,
            seed=2,
            ignore_index=-7,
            reduction=reduction,
            grad=torch.ones(12) if reduction == "none" else torch.ones(()),
        )
    target.fill_(-7)
    losses, grad = run(
        "triton", bal_noised_topk_loss, scores, target, 3, seed=2, ignore_index=-7, reduction="sum", grad=torch.ones(())
    )
    assert losses == 0 and (grad == 0).all()


def test_empty_batch():
    x, y = torch.empty(0, 9, device=DEVICE).requires_grad_(), torch.empty(0, dtype=torch.int64, device=DEVICE)
    out = bal_noised_topk_loss(x, y, 2, reduction="sum", backend="triton")
    out.backward()
    assert out == 0 and x.grad.shape == (0, 9)
    assert bal_noised_topk_loss(x, y, 2, backend="triton").isnan()
    values, classes = noised_topk_candidates(x, 3, backend="triton")
    assert values.shape == classes.shape == (0, 5, 3)


@pytest.mark.parametrize("law", range(2), ids=["normal", "gumbel"])
@pytest.mark.parametrize("size, epsilon", [(1.0, 1.0), (1.0, 0.01), (1000.0, 1.0), (1.0, 0.0), (1e-37, 1e-40)])
def test_what_lies_beyond_a_bound_does_not_reach(size, epsilon, law):
    """For words, the first that a bound rules out has the largest draw; for arrivals, the first the highest level."""
    reach = np.float32(0.7 * size)
    distance = torch.linspace(-3.0, 9.0, 1024) * (epsilon or size)
    scores = (reach - distance).float().to(DEVICE)
    words, times = torch.empty_like(scores, dtype=torch.int32), torch.empty_like(scores)
    bounds_kernel[1,](scores, words, times, float(reach), epsilon, law, 1024, enable_fp_fusion=False)
    scores, words, times = scores.cpu(), words.cpu().long(), times.cpu()
    for bounded, noise_of, argument in (
        (words < (1 << 24) - 1, noise.LAWS[law].draw, (words + 1) << 8),
        (times.isfinite(), noise.LAWS[law].level, times.nextafter(torch.tensor(1.0))),
    ):
        assert 0.4 < bounded.float().mean() < 0.8, "some are ruled out, none where the score exceeds what is reached"
        value = scores[bounded] + noise_of(argument[bounded]) * torch.tensor(epsilon, dtype=torch.float32)
        assert (value < reach).all()


# Systems, on rows of one length, whose kernels they share


def test_opcheck():
    scores, target = randn(2, 300).to(DEVICE), torch.tensor([3, -100], device=DEVICE)
    seed, schedule = torch.tensor(3, device=DEVICE), torch.tensor(0.5, dtype=torch.float64, device=DEVICE)

    def check_op(op, *args):
        torch.library.opcheck(getattr(torch.ops.topk_fast, op + "_triton").default, args)

    check_op("candidates", scores, seed, [5], 1.0, None, 4, 0, False, 2, 1000)
    check_op("excess", scores.to(torch.bfloat16), seed, [5], 1.0, None, 4, 1, False, None, -100, False)
    noise_and_labels = (seed, [5, 2], 1.0, schedule, 4, 0, False, target, -100, True)
    check_op("excess", scores, *noise_and_labels)
    _, classes = torch.ops.topk_fast.excess_triton(scores, *noise_and_labels)
    check_op("gradient", torch.ones(2, 2, device=DEVICE), classes, target, -100, 0, 300, torch.bfloat16)


def test_a_tensor_on_another_device_is_named():
    """Kernels would follow its address; torch's dispatcher takes any device beside the scores'."""
    scores, seed = randn(2, 9).to(DEVICE), torch.tensor(1, device=DEVICE)
    target = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    level = torch.tensor(1.0, dtype=torch.float64, device="meta")

    def excess(seed, schedule, target):
        launch.excess(scores, seed, [2], 1.0, schedule, 3, 0, False, target, -100, False)

    with pytest.raises(RuntimeError, match=f"seed must be on {scores.device}, .* got seed on meta"):
        excess(seed.to("meta"), None, target)
    with pytest.raises(RuntimeError, match="schedule must be on"):
        excess(seed, level, target)
    with pytest.raises(RuntimeError, match="target must be on"):
        excess(seed, None, target.to("meta"))
    for name in ("classes", "target"):
        tensors = {"classes": torch.zeros(2, 3, 1, dtype=torch.int64, device=DEVICE), "target": target}
        tensors[name] = tensors[name].to("meta")
        with pytest.raises(RuntimeError, match=f"{name} must be on {scores.device}"):
            launch.gradient(torch.ones(2, 1, device=DEVICE), *tensors.values(), -100, 0, 9, F32)


def test_one_graph_for_all_seeds():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, y, seed):
        return bal_noised_topk_loss(x * 2, y, 5, seed=seed, backend="triton")

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    x, y = randn(2, 300).to(DEVICE), torch.tensor([3, 4], device=DEVICE)
    for seed in (0, -5):
        seed = torch.tensor(seed, device=DEVICE)
        results = []
        for function in (compiled, step):
            leaf = x.clone().requires_grad_()
            out = function(leaf, y, seed)
            out.backward()
            results.append((out.detach(), leaf.grad))
        assert_same(*results)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_func_grad():
    x, y = randn(2, 300).to(DEVICE), torch.tensor([3, 4], device=DEVICE)
    step = lambda x: bal_noised_topk_loss(x, y, 5, seed=2, backend="triton")  # noqa: E731
    leaf = x.clone().requires_grad_()
    step(leaf).backward()
    assert_same(torch.func.grad(step)(x), leaf.grad)


def test_autocast_and_determinism():
    torch.manual_seed(0)
    layer, y = torch.nn.Linear(16, 300).to(DEVICE), torch.tensor([3, 4], device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = layer(torch.ones(2, 16, device=DEVICE))
            loss = BalNoisedTopK(5, 1.0, seed=1, backend="triton")(logits, y)
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert_same(loss.detach().cpu(), run(ORACLE, bal_noised_topk_loss, logits.detach().cpu(), y.cpu(), 5, seed=1)[0])
    assert layer.weight.grad.count_nonzero() > 0


@on_gpu
def test_no_wait_and_no_memory_beyond_a_share_of_the_scores():
    scores, target = torch.randn(4096, 32_768, device=DEVICE), torch.arange(4096, device=DEVICE)
    seed = torch.tensor(1, device=DEVICE)
    step = lambda: bal_noised_topk_loss(scores, target, 5, 1.0, 10, seed=seed)  # noqa: E731
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < scores.numel() * 4 / 10


@on_gpu
def test_cuda_graph_with_a_seed_that_changes():
    scores, target = torch.randn(64, 300, device=DEVICE).requires_grad_(), torch.arange(64, device=DEVICE)
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    step = lambda: bal_noised_topk_loss(scores, target, 5, seed=seed, backend="triton")  # noqa: E731
    step().backward()
    graph = torch.cuda.CUDAGraph()
    scores.grad = None
    with torch.cuda.graph(graph):
        out = step()
        (grad,) = torch.autograd.grad(out, scores)
    for value in (1, -2):
        seed.fill_(value)
        graph.replay()
        expected = step()
        assert_same((out.detach(), grad), (expected.detach(), torch.autograd.grad(expected, scores)[0]))


@on_gpu
def test_another_stream():
    scores = torch.randn(64, 5000, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = scores * 2
        given = noised_topk(late, 5, seed=1, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(given.cpu(), noised_topk(scores.cpu() * 2, 5, seed=1))


@on_gpu
def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    scores = torch.randn(8, 5000)
    assert_same(noised_topk(scores.to("cuda:1"), 5, seed=1, backend="triton").cpu(), noised_topk(scores, 5, seed=1))


@on_gpu
@pytest.mark.parametrize("backend", [name for name in ("triton", "cuda") if name in available_backends(DEVICE)])
def test_more_than_two_to_the_31_scores(backend):
    n_rows, n_classes = 2200, 1_000_003
    scores = torch.randn(n_rows, n_classes, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    target = torch.arange(n_rows, device=DEVICE)
    losses = bal_noised_topk_loss(scores, target, 5, seed=1, reduction="none", backend=backend)
    losses.sum().backward()
    for n in (0, n_rows - 1):
        values, classes = noised_topk_candidates(scores.detach()[n : n + 1].cpu(), 6, first_row=n, seed=1)
        top = values[0, :, -1]
        expected = ((sum(top[1:], start=top[0]) * 0.2 - scores[n, n].detach().cpu().float()) + 1).relu()
        assert_same(losses[n].detach().cpu(), expected)
        filled = scores.grad[n].nonzero().flatten().cpu()
        assert set(filled.tolist()) == (set(classes[0, :, -1].tolist()) | {n})


# What is compiled, without a GPU


@pytest.mark.host
def test_compiled_code_keeps_the_contract_and_its_budget():
    """sm_80, sm_90, gfx942: no fused or approximate step, on NVIDIA at most 128 registers and 1 KiB of stack; the
    gradient has 96 and none."""
    kernels = json.loads(python("-m", "benchmarks.triton_static", "--quick"))
    assert {k["target"] for k in kernels} == {"sm_80", "sm_90", "gfx942"}
    assert {k["kernel"] for k in kernels} == {"search_kernel", "collect_kernel", "gradient_kernel"}
    for kernel in kernels:
        assert kernel["forbidden"] == [], kernel
        if kernel["target"] == "gfx942":
            assert kernel["spilled_registers"] <= 4, kernel
        else:
            assert kernel["registers"] <= 128 and kernel["stack_bytes"] <= 1024, kernel
        if kernel["kernel"] == "gradient_kernel" and kernel["target"] != "gfx942":
            assert kernel["stores_of_16_bytes"] > 0 and kernel["registers"] <= 96 and not kernel["stack_bytes"], kernel


@pytest.mark.host
def test_new_numbers_compile_nothing():
    """Rows, classes, seed, K, noise level, samples and the place of a slice vary without a recompilation.

    The launcher's look-up tells as many kernels apart as Triton's, which knows more of the arguments.
    """
    code = (
        "import torch\n"
        "from benchmarks import triton_static as t\n"
        "def calls(n, n_classes, k, n_sample, ignore_index, place):\n"
        "    scores, target = torch.empty(n, n_classes), torch.zeros(n, dtype=torch.int64)\n"
        "    noise = (torch.zeros(3, dtype=torch.int64)[n % 3], 1.0 / k, None, n_sample, 0, False)\n"
        "    take = lambda ranks: (noise[0], ranks, *noise[1:])\n"
        "    t.launch.candidates(scores, *take([k]), *place)\n"
        "    for ranks in ([k], [k, k - 1]):\n"
        "        _, classes = t.launch.excess(scores, *take(ranks), target, ignore_index, False)\n"
        "        grad = torch.zeros(n, len(ranks))\n"
        "        t.launch.gradient(grad, classes, target, ignore_index, place[1], n_classes, torch.float32)\n"
        "numbers = [\n"
        "    (4, 1000, 6, 6, -100, (5, 9)), (2, 1001, 3, 5, 1, (2**32 - 1, 0)), (7, 64, 4, 7, -(2**40), (1, 16)),\n"
        "    (3000, 16, 2, 1, 2**31, (2**31, 2**31 - 100)), (1, 2, 2, 1, 0, (0, 0)), (16, 2**16, 8, 4, 16, (16, 1))\n"
        "]\n"
        "run = lambda some: t.variants([lambda one=one: calls(*one) for one in some])\n"
        "print(*run(numbers[:1]), *run(numbers[:5]), *run(numbers))\n"
        "print(all(len(set(t.variants(list(calls())))) == 1 for calls in t.VARIANTS.values()))"
    )
    *counts, agree = python("-c", code).split()
    assert counts[:4] == ["4"] * 4, "candidates, one rank, two ranks, and the gradient"
    assert counts[4:] == ["5"] * 2, "and the collection of the last call's rows, which are few and long"
    assert agree == "True"


def test_workspace_is_a_fiftieth_of_the_scores():
    """On an H100's multiprocessors; it belongs to the programs that run at a time."""
    for n_rows, n_classes, dtype, k, n_sample in LARGE_SEARCHES:
        for law in range(2):
            wanted = layout.Wanted((k,), n_sample, law, False, False, False)
            how = layout.layout_of((n_rows, n_classes), dtype.itemsize, True, wanted, 132)
            assert how.programs == n_rows or how.programs == 16 * 132
            assert how.programs * how.lists[2] * 8 <= n_rows * n_classes * dtype.itemsize / 50


# Availability and errors


def test_auto_choice():
    names = available_backends(DEVICE)
    assert backends.resolve("auto", randn(2, 9).to(DEVICE), 3) == names[0]
    if ON_GPU:
        assert names[-2:] == ["triton", "torch"]
        expected = "cuda" if "cuda" in names else "torch"
        assert backends.resolve("auto", randn(2, 9).double().to(DEVICE), 3) == expected


def test_what_it_does_not_take():
    with pytest.raises(ValueError, match="'triton' takes float32, bfloat16 or float16 input, got torch.float64"):
        noised_topk(randn(2, 9).double().to(DEVICE), 3, backend="triton")
    with pytest.raises(ValueError, match=r"'triton' searches for up to 128 scores \(K \+ 1 for the losses\), got 129"):
        bal_noised_topk_loss(
            randn(1, 2000).to(DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE), 128, backend="triton"
        )
    scores = torch.zeros(1, 1, device=DEVICE).expand(1, 2**31 - 2)
    with pytest.raises(ValueError, match="'triton' takes up to 2147352576 classes, got 2147483646"):
        noised_topk(scores, 3, backend="triton")


@pytest.mark.skipif(ON_GPU, reason="a wrong label stops the device for good, as it does in torch's own losses")
def test_wrong_labels_are_named():
    with pytest.raises(IndexError, match=r"target must be in \[0, L - 1\] = \[0, 8\] or ignore_index = -100, got 9"):
        bal_noised_topk_loss(randn(2, 9), torch.tensor([1, 9]), 3, backend="triton")


def python(*arguments):
    """Runs Python in a new process, where TRITON_INTERPRET is not set, and returns its output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.host
def test_cpu_tensors_without_the_interpreter():
    code = (
        "import torch, topk_fast\n"
        "try: topk_fast.NoisedTopK(2, backend='triton')(torch.randn(2, 9))\n"
        "except ValueError as error: print(error)"
    )
    said = python("-c", code)
    assert "runs on CUDA and HIP tensors (with TRITON_INTERPRET=1" in said and "got input on cpu" in said


@pytest.mark.host
def test_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, topk_fast\n"
        "assert 'triton' not in topk_fast.available_backends('cuda') and topk_fast.build_info()['triton'] is None\n"
        "topk_fast.NoisedTopK(2)(torch.randn(2, 9))\n"
        "try: topk_fast.NoisedTopK(2, backend='triton')(torch.randn(2, 9))\n"
        "except RuntimeError as error: print(error)"
    )
    assert "backend 'triton' is not available: Triton is not installed; run `pip install triton`" in python("-c", code)


@pytest.mark.host
def test_import_leaves_triton_alone():
    python("-c", "import sys, topk_fast; assert 'triton' not in sys.modules, 'imported before its first use'")


def test_linear_loss():
    """The walk over the weight on these kernels: chunks of classes, each with its `first_class`."""
    x, weight, target = randn(3, 8).to(DEVICE), randn(500, 8, seed=1).to(DEVICE), torch.tensor([3, 499, 250])
    found = []
    for backend, device in (("triton", DEVICE), ("torch", DEVICE)):
        w = weight.clone().requires_grad_()
        losses = linear_noised_topk_loss(
            x,
            w,
            target.to(device),
            k=3,
            epsilon=0.5,
            n_sample=2,
            seed=1,
            chunk_size=300,
            reduction="none",
            backend=backend,
        )
        losses.sum().backward()
        found.append((losses.detach(), w.grad))
    assert_same(*found)
