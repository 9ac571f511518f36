"""The parts that all benchmarks share: scores, the gate, clocks, and results as JSON.

Nothing is timed before the gate has passed: equal bits on all backends, pytopk's mean loss, finite peers. The
candidates then run in turn, so that a drift of the machine affects all of them equally, and medians with quartiles are
reported. On a CPU, the time is the process CPU time of one thread; on a GPU, events measure it, and the L2 cache is
emptied before each step.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import topk_fast
from benchmarks import ROOT
from benchmarks.memory import attempt
from topk_fast.functional import bal_noised_topk_loss

try:
    from tqdm import tqdm
except ImportError:  # a GPU machine may have little besides torch; cases are then printed without a progress bar

    def tqdm(cases, unit):
        return cases

    tqdm.write = print

SPECIES = ROOT / "data" / "species_logits.pt"
SPECIES_COMMAND = "python examples/all_species.py --losses cross-entropy --save-logits data/species_logits.pt"
PEAKS = 8  # large scores in a "spiky" row; the true class has one of them
FEWEST = 3  # samples of every candidate, even if a step takes long
BRIEF = 0.1  # seconds; a shorter step would feel the caches of the previous candidate, and is repeated for this long
DRAWS = 8  # losses of each package whose means are compared


def make_scores(kind: str, n: int, length: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """Scores [n, length], a leaf that requires a gradient, and a target [n]; the same in every call.

    Args:
        kind: "normal" is N(0, 1). "flat" scores are all equal, as a layer that starts at zero computes them. "spiky" is
            N(0, 0.1) except for PEAKS scores of 3 to 6 a row, one of them the true class's. "species" are logits of a
            model of examples/all_species.py.

    Raises:
        ValueError: if the kind is unknown, or the file of "species" has fewer rows or another number of classes.
        FileNotFoundError: if there is no such file.
    """
    generator = torch.Generator(device).manual_seed(0)
    common = dict(dtype=getattr(torch, dtype), device=device)
    if kind == "species":
        if not SPECIES.exists():
            raise FileNotFoundError(f"{SPECIES} is missing; make it with: {SPECIES_COMMAND}")
        saved = torch.load(SPECIES, weights_only=True)
        rows, columns = saved["logits"].shape
        if length != columns or n > rows:
            raise ValueError(f"{SPECIES} has {rows} rows of {columns} classes, asked for {n} of {length}")
        return saved["logits"][:n].to(**common).requires_grad_(), saved["target"][:n].to(device)
    if kind not in ("normal", "flat", "spiky"):
        raise ValueError(f"kind must be 'normal', 'flat', 'spiky' or 'species', got {kind!r}")
    scores = torch.randn(n, length, generator=generator, **common)
    target = torch.randint(length, (n,), generator=generator, device=device)
    if kind == "flat":
        scores.zero_()
    if kind == "spiky":
        at = torch.randint(length, (n, PEAKS), generator=generator, device=device)
        at[:, 0] = target
        peaks = 3 + 3 * torch.rand(n, PEAKS, generator=generator, **common)
        scores.mul_(0.1).scatter_(1, at, peaks)
    return scores.requires_grad_(), target


def take_step(loss: Callable, scores: Tensor, target: Tensor) -> Tensor:
    """Forward and backward; earlier gradients are dropped."""
    scores.grad = None
    value = loss(scores, target)
    value.backward()
    return value


def list_own_backends(device: str) -> list[str]:
    """Our backends that are worth timing there: no interpreter, and the reference only if there is no other."""
    names = topk_fast.available_backends(device)
    return [name for name in names if name != "torch" and (device, name) != ("cpu", "triton")] or ["torch"]


def gate(
    losses: dict[str, Callable], scores: Tensor, target: Tensor, k: int, n_sample: int, epsilon: float
) -> tuple[dict[str, str], set[str]]:
    """Checks that the losses are right before they are timed.

    * Losses and gradients of every backend have the reference's bits, in as many rows as the reference does quickly.
    * Each loss and its gradient are finite. This step also warms up and compiles. A peer that fails is left out.
    * The means of pytopk's loss and of ours agree within 5 standard errors, in as many rows as pytopk does quickly.

    Returns:
        The reasons why peers are left out, by name, and the names of the losses that overwrite their scores.

    Raises:
        SystemExit: if a check fails.
    """
    some = 2**18 // scores.shape[1]
    few, fewer = slice(max(8, some)), slice(max(2, some))
    _check_equality(scores.detach()[few], target[few], k, n_sample, epsilon)
    left_out, overwriting, before = {}, set(), scores.detach().clone()
    for name, loss in losses.items():
        try:
            value, reason = attempt(take_step, loss, scores, target)
        except Exception as error:
            if name.startswith("topk_fast") or name in list_own_backends(scores.device.type):
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if reason:
            left_out[name] = reason
        elif not (value.isfinite() and scores.grad.isfinite().all()):
            raise SystemExit(f"{name} has a loss or gradient that is not finite: nothing was timed")
        if not torch.equal(scores.detach(), before):
            overwriting.add(name)
            scores.data.copy_(before)
    scores.grad = None
    if "pytopk" in losses and "pytopk" not in left_out:
        loss = topk_fast.BalNoisedTopK(k, epsilon, n_sample)
        _check_mean(losses["pytopk"], loss, scores.detach()[fewer], target[fewer])
    return left_out, overwriting


def _check_equality(scores, target, k, n_sample, epsilon):
    device, results = scores.device.type, {}
    places = [("cpu", name) for name in ("torch", *list_own_backends("cpu"))]
    places += [(device, name) for name in list_own_backends(device)]
    for place, backend in places:
        leaf = scores.to(place, copy=True).requires_grad_()
        value = bal_noised_topk_loss(
            leaf, target.to(place), k, epsilon, n_sample, seed=1, reduction="none", backend=backend
        )
        value.sum().backward()
        results[place, backend] = value.detach().cpu(), leaf.grad.cpu()
    for backend, result in results.items():
        if not all(torch.equal(a, b) for a, b in zip(result, results["cpu", "torch"])):
            case = (list(scores.shape), scores.dtype, k, n_sample, epsilon)
            raise SystemExit(f"{backend} and the reference differ at {case}: nothing was timed")


def _check_mean(pytopk, loss, scores, target):
    torch.manual_seed(0)
    theirs, own = (torch.stack([f(scores, target) for _ in range(DRAWS)]).double() for f in (pytopk, loss))
    error = ((theirs.var() + own.var()) / DRAWS).sqrt() + 1e-6 * theirs.mean().abs()  # float32 sums round
    if not (theirs.mean() - own.mean()).abs() <= 5 * error:
        raise SystemExit(f"mean losses {own.mean():.5f} and pytopk's {theirs.mean():.5f} differ: nothing was timed")


@lru_cache
def make_large_buffer() -> Tensor:
    """A tensor larger than the GPU's L2 cache, which is empty of other data once this is overwritten."""
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


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


def sample_in_turn(
    candidates: dict[str, list[Callable]],
    device: str,
    repeats: int,
    seconds: float = math.inf,
    case_seconds: float = math.inf,
    clock: Callable[[], float] = time.process_time,
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """Samples the candidates in turn, after all of them have run before.

    On a CPU, a sample of a brief step follows an untimed step, in which the allocator, caches and branch predictors
    adapt to the candidate. It repeats the step up to 200 times, since clocks are coarse; a candidate of several passes,
    which need each other, runs once.

    Args:
        candidates: The passes of each candidate.
        seconds, case_seconds: Time limits of one candidate, and of all together by the wall clock. FEWEST samples are
            taken in any case.

    Returns:
        By candidate, its samples, each of them the milliseconds of its passes; and the reasons why some are left out.
    """
    samples, plans, left_out = {}, {}, {}
    for name, passes in candidates.items():
        ms, reason = attempt(time_passes, passes, device, 1, clock)
        if reason:
            left_out[name] = reason
            continue
        took = max(sum(ms) / 1e3, 1e-9)
        inner = min(200, min(BRIEF, seconds / repeats) / took) if device == "cpu" and len(passes) == 1 else 1
        plans[name] = max(FEWEST, min(repeats, seconds / took)), max(1, int(inner)), device == "cpu" and took < BRIEF
        samples[name] = []
    start, turn = time.monotonic(), 0
    while turn < repeats and (turn < FEWEST or time.monotonic() - start < case_seconds):
        turn += 1
        for name, (turns, inner, again) in plans.items():
            if turn <= turns:
                if again:
                    time_passes(candidates[name], device, 1, clock)
                samples[name].append(time_passes(candidates[name], device, inner, clock))
    return samples, left_out


def compute_quartiles(values: list[float]) -> dict:
    """Lower quartile, median, upper quartile, and the number of values."""
    return dict(zip(("lower", "median", "upper"), statistics.quantiles(values, n=4))) | {"repeats": len(values)}


def measure_copy_bandwidth() -> float:
    """Bytes that a copy of 2 GiB on the GPU reads and writes in a second."""
    x = torch.empty(2**29, device="cuda")
    y = torch.empty_like(x)
    times = [time_passes([lambda: y.copy_(x)], "cuda")[0] for _ in range(23)]
    return 2 * x.numel() * 4 / (statistics.median(times[3:]) * 1e-3)


def write(path: Path, report: dict):
    """Writes the report as JSON, whole or not at all.

    Benchmarks call it after each case, so that a run which is cut short keeps its results.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)
