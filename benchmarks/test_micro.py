"""Micro-benchmarks of the passes of a step, beside those of cross-entropy, and of each op of the CPU backends.

They measure the process CPU time of one thread. `make test` does not collect this file; `make bench` runs it. This runs
one group:

    python -m pytest benchmarks/test_micro.py --benchmark-enable -k "step and 1000"
"""

import itertools
import time

import pytest
import torch
import torch.nn.functional as F

import topk_fast
from benchmarks import harness
from topk_fast import noise, ops
from topk_fast.request import Labels, Noise, Place, Slice

SHAPES = [(128, 100), (128, 1000), (32, 100_000)]
K, N_SAMPLE, EPSILON = 5, 5, 1.0
BACKENDS = [name for name in topk_fast.available_backends("cpu") if name != "triton"]  # that is its interpreter
LOSSES = {
    **{name: topk_fast.BalNoisedTopK(K, EPSILON, N_SAMPLE, backend=name) for name in BACKENDS},
    "cross-entropy": F.cross_entropy,
}
pytestmark = pytest.mark.benchmark(
    timer=time.process_time, max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


@pytest.fixture(scope="module")
def batches():
    """Scores and target by shape, after the gate has found equal bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = {shape: harness.make_scores("normal", *shape, "float32", "cpu") for shape in SHAPES}
    for scores, target in out.values():
        harness.gate(LOSSES, scores, target, K, N_SAMPLE, EPSILON)
    yield out
    torch.set_num_threads(threads)


@shapes
@pytest.mark.parametrize("part", ["forward", "backward", "step"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss(benchmark, batches, part, shape, name):
    benchmark.group = f"{part} {shape[0]} x {shape[1]}"
    (scores, target), loss = batches[shape], LOSSES[name]
    if part == "forward":
        value = benchmark(loss, scores, target)
    elif part == "backward":
        value = loss(scores, target)
        benchmark(torch.autograd.grad, value, scores, retain_graph=True)
    else:
        value = benchmark(harness.take_step, loss, scores, target)
    assert value.isfinite()


@shapes
@pytest.mark.parametrize("op", ["candidates", "excess", "gradient"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_op(benchmark, batches, op, shape, backend):
    benchmark.group = f"op {op} {shape[0]} x {shape[1]}"
    scores, labels = batches[shape][0].detach(), Labels(batches[shape][1])
    seeds = itertools.cycle(torch.arange(64).unbind())

    def other_noise():  # in each round: the CPU would learn the branches of one
        return Noise(next(seeds), (K + 1,), EPSILON, None, N_SAMPLE, noise.NORMAL, dense=False)

    def search_rows():
        return ops.kernel("excess", backend)(scores, *other_noise(), *labels)

    if op == "candidates":
        values, _ = benchmark(lambda: ops.kernel(op, backend)(scores, *other_noise(), *Place()))
        assert values.shape == (shape[0], N_SAMPLE, K + 1)
    elif op == "excess":
        excess, _ = benchmark(search_rows)
        assert excess.shape == (shape[0], 1)
    else:
        excess, classes = search_rows()
        gradient, columns = ops.kernel(op, backend), Slice(0, shape[1], scores.dtype)
        grad = benchmark(gradient, torch.ones_like(excess), classes, labels.target, labels.ignore_index, *columns)
        assert grad.shape == scores.shape
