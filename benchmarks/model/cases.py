"""The cases that the model is asked about, and the share of each that is run here.

A case is run as on a smaller GPU: with so few multiprocessors, and as many fewer rows, that each of them has the work
and the layout that it has in the case itself.
"""

from typing import NamedTuple

import torch

from topk_fast import ops
from topk_fast.backends import available_backends
from topk_fast.request import Labels, Noise, Slice

from .gpus import Gpu
from .launches import Calls, Shape, aligned

ITEMS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
LAWS = ("normal", "gumbel")
SIZES = [
    (128, 100, "float32"),
    (1024, 1000, "float32"),
    (8192, 32_768, "bfloat16"),
    (2048, 131_072, "bfloat16"),
    (256, 1_000_000, "float32"),
]
FEWEST, SCORES = 24, 4 << 20  # rows that are run for their statistics, as far as they have not more scores than this


class Case(NamedTuple):
    """A search for the excess of rank k, or the gradient of it; epsilon is 1 and scores are standard normal."""

    n_rows: int
    n_classes: int
    dtype: str
    law: str
    n_sample: int
    k: int
    step: str = "forward"

    @property
    def bytes(self) -> int:
        return self.n_rows * self.n_classes * ITEMS[self.dtype].itemsize

    def __str__(self):
        laws = "" if self.step == "backward" else f" {self.law}"
        return f"({self.n_rows}, {self.n_classes}) {self.dtype}{laws} B={self.n_sample} k={self.k} {self.step}"


def all_cases() -> list[Case]:
    out = []
    for size in SIZES:
        for k in (1, 6):
            for n_sample in (5, 16):
                out += [Case(*size, law, n_sample, k) for law in LAWS]
        out += [Case(*size, "normal", n_sample, 6, "backward") for n_sample in (5, 16)]
    return out


class Problem:
    """Tensors of a case with ``n_rows`` rows. Without ``content`` only their shapes count, and no launch may run."""

    def __init__(self, case: Case, n_rows: int, content: bool = True, device: str = "cpu"):
        self.case, dtype = case, ITEMS[case.dtype]
        there = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
        if content:
            self.scores = torch.randn(n_rows, case.n_classes, dtype=dtype, **there)
            if device == "cpu":
                self.scores = aligned(self.scores)
        else:
            self.scores = torch.zeros(1, case.n_classes, dtype=dtype, device=device).expand(n_rows, -1)
        law, seed = LAWS.index(case.law), torch.tensor(5, device=device)
        self.noise = Noise(seed, (case.k,), 1.0, None, case.n_sample, law, False)
        self.labels = Labels(torch.randint(case.n_classes, (n_rows,), **there))
        self.slice = Slice(0, case.n_classes, dtype)
        if case.step == "backward":
            self.grad = torch.full((n_rows, 1), 1 / n_rows, device=device)
            self.classes = torch.zeros(n_rows, case.n_sample, 1, dtype=torch.int64, device=device)
            if content:
                self.classes = self._op("excess")(self.scores, *self.noise, *self.labels)[1]

    def _op(self, name: str):
        device = self.scores.device.type
        backend = "cuda" if device == "cuda" else "cpp" if "cpp" in available_backends("cpu") else "torch"
        return ops.kernel(name, backend)

    def results(self) -> tuple:
        """What the kernels of the tensors' device make of it."""
        if self.case.step == "forward":
            return self._op("excess")(self.scores, *self.noise, *self.labels)
        labels = (self.labels.target, self.labels.ignore_index)
        return (self._op("gradient")(self.grad, self.classes, *labels, *self.slice),)

    def call(self, calls: Calls, gpu: Gpu, take, processors: int) -> tuple:
        """The same of csrc/cuda's launchers, each of whose launches ``take`` gets."""
        cache = gpu.l2_bytes * processors // gpu.processors
        there = {"processors": processors, "shared_memory": gpu.shared_bytes, "cache": cache}
        there |= {"take": take, "has_slow_memory": gpu.has_slow_memory}
        if self.case.step == "forward":
            return calls("excess", self.scores, self.noise, self.labels, **there)
        return (calls("gradient", self.grad, self.classes, self.labels, self.slice, **there),)


def shapes(case: Case, n_rows: int, calls: Calls, gpu: Gpu, processors: int) -> list[Shape]:
    """The launches of a case with ``n_rows`` rows on so many multiprocessors; nothing runs."""
    found: list[Shape] = []
    Problem(case, n_rows, content=False).call(calls, gpu, lambda shape, argument: found.append(shape), processors)
    return found


def same_layout(some: list[Shape], n_some: int, others: list[Shape], n_others: int) -> bool:
    """Whether launches differ only in the number of their blocks, which is proportional to that of the rows."""
    return [s._replace(grid=0) for s in some] == [s._replace(grid=0) for s in others] and all(
        abs(a.grid * n_others / (b.grid * n_some) - 1) < 0.1 for a, b in zip(some, others)
    )


def share(case: Case, calls: Calls, gpu: Gpu) -> tuple[list[Shape], int, int, bool]:
    """The launches of the whole case; rows and multiprocessors of the share to run; whether its layout is the same."""
    whole = shapes(case, case.n_rows, calls, gpu, gpu.processors)
    fewest = min(case.n_rows, FEWEST, max(2, SCORES // case.n_classes))
    for processors in range(1, gpu.processors + 1):
        exact = case.n_rows * processors / gpu.processors
        for n_rows in sorted({max(1, int(exact)), -(-case.n_rows * processors // gpu.processors)}):
            if n_rows >= fewest and same_layout(
                shapes(case, n_rows, calls, gpu, processors), n_rows, whole, case.n_rows
            ):
                return whole, n_rows, processors, True
    return whole, min(case.n_rows, 4 * fewest), gpu.processors, False
