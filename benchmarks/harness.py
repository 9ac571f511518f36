"""`measure`, which all benchmarks share: a gate, candidates that run in turn, quartiles, peak memory, JSON.

Nothing is timed before the case's gate has passed and each candidate has run once, with a finite loss and gradient. The
candidates then run in turn, so that a drift of the machine affects all of them equally, and medians with quartiles are
reported. On a CPU, the time is the process CPU time of one thread; on a GPU, events measure it, and the L2 cache is
emptied before each step.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import RESULTS, ROOT
from examples.machine import environment, measure_peak
from examples.report import table, write

FEWEST = 3  # samples of every candidate, even if a step takes long
BRIEF = 0.1  # seconds; a shorter step would feel the caches of the previous candidate, and is repeated for this long


class Candidate(NamedTuple):
    """A loss in a comparison: ``make(case)`` returns a function of (*leaves, target)."""

    make: Callable[[Any], Callable[..., Tensor]]
    compared: str = ""  # what it is, in words
    own: bool = False  # this package's
    sparse: bool = False  # its gradient is row-sparse


class Batch(NamedTuple):
    """What the candidates of a case share; of the optimizers the first takes dense gradients, the other sparse ones."""

    leaves: tuple[Tensor, ...]
    target: Tensor
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer] | None = None


class Entry(NamedTuple):
    """A case, its table or curve, and the candidates that are measured.

    A case is a NamedTuple with ``check(names, device)``, which raises SystemExit if a loss is wrong, and with
    ``make_batch(device)``.
    """

    group: str
    case: Any
    names: tuple[str, ...]


class Effort(NamedTuple):
    """Samples of a candidate, and the seconds after which it gets no further sample."""

    repeats: int
    seconds: float = math.inf


class Step:
    """A training step: forward and backward in one pass, or in two passes and the optimizer's step as the third."""

    def __init__(self, candidate: Candidate, case, batch: Batch, device: str):
        loss = candidate.make(case)
        self.loss = loss.to(device) if isinstance(loss, torch.nn.Module) else loss
        self.leaves, self.target, self.value = batch.leaves, batch.target, None
        self.passes = [self.run]
        if batch.optimizers:
            self.passes = [self.forward, self.backward, batch.optimizers[candidate.sparse].step]

    def forward(self):
        self.drop()
        self.value = self.loss(*self.leaves, self.target)

    def backward(self):
        self.value.backward()

    def run(self):
        self.forward()
        self.backward()

    def is_finite(self) -> bool:
        grads = [leaf.grad.coalesce().values() if leaf.grad.is_sparse else leaf.grad for leaf in self.leaves]
        return all(bool(t.isfinite().all()) for t in (self.value, *grads))

    def peak_bytes(self) -> int:
        """Bytes that a run takes at its peak beyond its inputs, gradients included."""
        self.drop()
        peak = measure_peak(self.run, self.target.device.type)
        self.drop()
        return peak

    def drop(self):
        """Releases the loss and the gradients."""
        self.value = None
        for leaf in self.leaves:
            leaf.grad = None


def measure(
    entries: list[Entry],
    candidates: dict[str, Candidate],
    device: str,
    effort: Effort,
    report: dict,
    path: Path | None,
) -> None:
    """Appends the result of each entry to the report's cases, writes the report to `path`, and prints the result."""
    for entry in entries:
        case, steps, left_out = entry.case, {}, {}
        case.check(entry.names, device)
        batch = case.make_batch(device)
        for name in entry.names:
            found = try_out(name, candidates[name], case, batch, device)
            (left_out if isinstance(found, str) else steps)[name] = found
        samples = sample_in_turn({name: step.passes for name, step in steps.items()}, device, effort)
        peaks = {name: step.peak_bytes() for name, step in steps.items()}
        times = {name: summarize(values) for name, values in samples.items()}
        result = {"group": entry.group, **case._asdict(), "ms": times, "left_out": left_out, "peak_bytes": peaks}
        report["cases"].append(result)
        if path is not None:
            write(path, report)
        print(describe(result), flush=True)


def try_out(name: str, candidate: Candidate, case, batch: Batch, device: str) -> Step | str:
    """The step of a candidate after its first run, which warms up and compiles; or the reason why it is left out.

    A peer that raises is left out, where its package is missing for instance. What a loss of this package raises is an
    error, unless the memory does not suffice.
    """
    try:
        step = Step(candidate, case, batch, device)
        for run in step.passes:
            run()
    except Exception as error:
        if candidate.own and not isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if not step.is_finite():
        raise SystemExit(f"{name} has a loss or gradient that is not finite: nothing was timed")
    return step


def time_passes(passes: list[Callable], device: str, inner: int = 1, clock=time.process_time) -> list[float]:
    """Milliseconds of each function, one after the other; each is the mean of ``inner`` runs in a row."""
    if device == "cuda":
        make_large_buffer().zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(passes) + 1)]
        events[0].record()
        for run, event in zip(passes, events[1:]):
            run()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:])]
    stamps = [clock()]
    for run in passes:
        for _ in range(inner):
            run()
        stamps.append(clock())
    return [1e3 * (b - a) / inner for a, b in zip(stamps, stamps[1:])]


@lru_cache
def make_large_buffer() -> Tensor:
    """A tensor larger than the GPU's L2 cache, which is empty of other data once this is overwritten."""
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def sample_in_turn(
    candidates: dict[str, list[Callable]], device: str, effort: Effort, clock: Callable[[], float] = time.process_time
) -> dict[str, list[list[float]]]:
    """By candidate, its samples, each of them the milliseconds of its passes; FEWEST are taken in any case.

    On a CPU, a sample of a brief step follows an untimed step, in which the allocator, caches and branch predictors
    adapt to the candidate. It repeats the step up to 200 times, since clocks are coarse; a candidate of several passes,
    which need each other, runs once.
    """
    samples, plans = {name: [] for name in candidates}, {}
    for name, passes in candidates.items():
        took = max(sum(time_passes(passes, device, 1, clock)) / 1e3, 1e-9)
        brief, inner = device == "cpu" and took < BRIEF, min(200, min(BRIEF, effort.seconds / effort.repeats) / took)
        turns = int(max(FEWEST, min(effort.repeats, effort.seconds / took)))
        its_turns = {i * effort.repeats // turns for i in range(turns)}  # spread over all
        plans[name] = its_turns, brief, max(1, int(inner)) if brief and len(passes) == 1 else 1
    for turn in range(effort.repeats):
        for name, (its_turns, brief, inner) in plans.items():
            if turn in its_turns:
                if brief:
                    time_passes(candidates[name], device, 1, clock)
                samples[name].append(time_passes(candidates[name], device, inner, clock))
    return samples


def summarize(samples: list[list[float]]) -> dict:
    """Quartiles of a step; of one with an optimizer those of its passes, by name."""
    if len(samples[0]) == 1:
        return compute_quartiles([ms for (ms,) in samples])
    series = dict(zip(("forward", "backward", "optimizer"), zip(*samples)))
    series["both"] = [sum(ms[:2]) for ms in samples]
    return {part: compute_quartiles(values) for part, values in series.items()}


def compute_quartiles(values: list[float]) -> dict:
    """Lower quartile, median, upper quartile, and the number of values."""
    return dict(zip(("lower", "median", "upper"), statistics.quantiles(values, n=4))) | {"repeats": len(values)}


def describe(result: dict) -> str:
    """A result as text: the medians in milliseconds, and the peaks of memory."""
    rows = {}
    for name, ms in result["ms"].items():
        parts = {"step": ms} if "median" in ms else ms
        rows[name] = {f"{part}, ms": quartiles["median"] for part, quartiles in parts.items()}
        rows[name]["peak MiB"] = result["peak_bytes"][name] / 2**20
    facts = (f"{key}={value}" for key, value in result.items() if key not in ("group", "ms", "left_out", "peak_bytes"))
    left_out = (f"{name} left out: {reason}" for name, reason in result["left_out"].items())
    return "\n".join([f"{result['group']}: {' '.join(facts)}", table(rows, unit=1, digits=3), *left_out])


def make_parser(doc: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases with few samples; on a CPU it prints only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default results/ or, on a GPU, $OUT (out/)")
    return parser


def begin(args: argparse.Namespace, prefix: str = "") -> tuple[dict, Path | None]:
    """An empty report, and where it is written, if it is; the process is made ready to measure.

    Raises:
        SystemExit: if the device is missing.
    """
    torch.set_num_threads(1)
    report = {"environment": environment(args.device)}
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda needs a GPU that torch.cuda sees")
        path = Path(os.environ.get("OUT", ROOT / "out")) / f"{prefix}gpu.json"
    else:
        path = None if args.quick else RESULTS / f"{prefix}cpu.json"
    return report | {"cases": []}, args.out or path
