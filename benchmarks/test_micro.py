"""Micro-benchmarks of each op of the CPU backends, by pytest-benchmark; benchmarks.loss measures whole steps.

They measure the process CPU time of one thread. `make test` does not collect this file; `make bench` runs it. This runs
a part:

    python -m pytest benchmarks/test_micro.py -k "gradient and 1000"
"""

import time

import pytest
import torch

from benchmarks.cases import Case, list_own_backends
from topk_fast import noise, ops
from topk_fast.request import Labels, Noise, Place, Slice

CASES = [Case(*shape, n_sample=5) for shape in ((128, 100), (128, 1000), (32, 100_000))]
pytestmark = pytest.mark.benchmark(
    timer=time.process_time, max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2
)


@pytest.mark.parametrize("op", ["candidates", "excess", "gradient"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.N}x{case.L}")
@pytest.mark.parametrize("backend", list_own_backends("cpu"))
def test_op(benchmark, case, op, backend):
    case.check((), "cpu")
    benchmark.group = f"op {op} {case.N} x {case.L}"
    (scores,), target, _ = case.make_batch("cpu")
    scores, labels = scores.detach(), Labels(target)
    kernel, seeds = ops.kernel(op, backend), iter(range(2**62))

    def other_noise():  # in each round: the CPU would learn the branches of one
        return Noise(torch.tensor(next(seeds)), (case.k + 1,), case.epsilon, None, case.n_sample, noise.NORMAL, False)

    if op == "candidates":
        values, _ = benchmark(lambda: kernel(scores, *other_noise(), *Place()))
        assert values.shape == (case.N, case.n_sample, case.k + 1)
        return
    excess, classes = ops.kernel("excess", backend)(scores, *other_noise(), *labels)
    if op == "excess":
        assert benchmark(lambda: kernel(scores, *other_noise(), *labels))[0].shape == (case.N, 1)
    else:
        slopes, columns = torch.ones_like(excess), Slice(0, case.L, scores.dtype)
        grad = benchmark(kernel, slopes, classes, labels.target, labels.ignore_index, *columns)
        assert grad.shape == scores.shape
