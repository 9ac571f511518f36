"""Forward + backward of the balanced loss against cross-entropy, pytopk and the other losses of peers.py.

harness.py describes how losses are timed, and the checks before. On a GPU, the result also has the share of the copy
bandwidth that a step reaches: the time of reading the scores once and writing the gradients once, at the bandwidth
measured in the same run, over the step's time.

    python -m benchmarks.loss                                # a few cases, in a minute; prints only
    python -m benchmarks.loss --set full                     # all cases; writes results/cpu.json
    python -m benchmarks.loss --set full --device cuda       # writes $OUT/gpu.json (out/ by default)
    ncu ... python -m benchmarks.loss --device cuda --once   # a step of each shape, for a profiler
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import topk_fast
from benchmarks import RESULTS, ROOT, harness, memory
from benchmarks.peers import PEERS, Case, Peer
from examples.machine import environment

# The design's goals by L, as ratios of times: to cross-entropy at n_sample 5, to pytopk at n_sample 10.
GOALS = {100: (4, 1 / 8), 1000: (1.5, 1 / 40), 10_000: (0.6, 1 / 150), 100_000: (0.3, 1 / 300)}
GOAL_SHAPES = [(128, 100), (128, 1000), (64, 10_000), (32, 100_000)]
# N * L of 2**21 to 2**22, as far as a batch of at most 128 rows goes.
LENGTHS = [(128, length) for length in (100, 316, 1000, 3162, 10_000, 31_623)]
LENGTHS += [(32, 100_000), (8, 316_228), (4, 1_000_000)]
SPECIES = (64, 24_271)
GPU_SHAPES = [(1024, 1000), (1024, 10_000)]  # small batches, where launches count
GPU_SHAPES += [(262_144, 1000), (26_624, 10_000), (8192, 32_768), (2048, 131_072), (268, 1_000_000)]  # N * L: 2**28
GPU_VARIANTS = [
    ("length", {}),
    *(("samples", {"n_sample": b}) for b in (5, 32)),
    *(("k", {"k": k}) for k in (1, 20)),
    *(("epsilon", {"epsilon": epsilon}) for epsilon in (0.1, 5.0)),
    ("scores", {"scores": "flat"}),
]
GPU_PEERS = ("cross-entropy", "cross-entropy compiled", "Liger", "pytopk")
BASIC = ("topk_fast", "cross-entropy", "pytopk")
# BASIC, and the losses whose memory does not grow with L as their scores do.
HEAVY = (*BASIC, "smooth top-K SVM", "LapSum")
ALL = tuple(PEERS)
SECONDS = {("cpu", "full"): 0.7, ("cpu", "quick"): 0.3, ("cuda", "full"): 0.1, ("cuda", "quick"): 0.3}
# The peak memory on a CPU leaves this out, since compilation takes more memory than the step.
NO_MEMORY = ("cross-entropy compiled",)


class Entry(NamedTuple):
    """A case, its table or curve, the losses that are timed, and the losses whose peak memory is measured."""

    group: str
    case: Case
    names: tuple[str, ...]
    memory: tuple[str, ...] = ()


def list_entries(which: str, device: str) -> list[Entry]:
    """The cases of a set, "quick" or "full"."""
    if device == "cuda":
        names = (*harness.list_own_backends("cuda"), *GPU_PEERS)
        return [
            Entry(group, Case(n, length, dtype=dtype, **variant), names, names)
            for group, variant in (GPU_VARIANTS[:1] if which == "quick" else GPU_VARIANTS)
            for n, length in GPU_SHAPES
            for dtype in ("float32", "bfloat16")
        ]
    if which == "quick":
        goals = [Entry("goals", Case(n, length, n_sample=5), BASIC) for n, length in GOAL_SHAPES]
        return [*goals, Entry("peers", Case(128, 1000), ALL, HEAVY)]
    goals = [
        Entry("goals", Case(n, length, n_sample=b, epsilon=epsilon), BASIC)
        for n, length in GOAL_SHAPES
        for b in (5, 10)
        for epsilon in (1.0, 0.2)
    ]
    lengths = [Entry("length", Case(n, length), ALL, HEAVY if length >= 1000 else ()) for n, length in LENGTHS]
    samples = [Entry("samples", Case(64, 10_000, n_sample=b), BASIC) for b in (1, 2, 5, 10, 20, 50, 100)]
    ranks = [
        Entry(
            "k", Case(64, 10_000, k=k), tuple(n for n in HEAVY if n != "cross-entropy" and (k <= 20 or "SVM" not in n))
        )
        for k in (1, 3, 5, 10, 20, 50)
    ]
    kinds = [
        Entry("scores", Case(*SPECIES, epsilon=epsilon, scores=kind), BASIC)
        for kind in ("species", "normal", "flat", "spiky")
        for epsilon in (1.0, 0.2)
    ]
    peers = [Entry("peers", Case(n, length), ALL, ALL) for n, length in ((128, 1000), (32, 100_000))]
    narrow = [Entry("dtype", Case(64, 10_000, dtype="bfloat16"), BASIC[:2])]
    return [*goals, *kinds, *peers, *lengths, *samples, *ranks, *narrow]


def list_candidates(device: str) -> dict[str, Peer]:
    """The losses by name, among which each of our backends is one on a GPU."""
    if device == "cpu":
        return PEERS

    def on(backend: str) -> Peer:
        def make(case: Case):
            return topk_fast.BalNoisedTopK(case.k, case.epsilon, case.n_sample, backend=backend)

        return Peer(backend, make, f"this package's balanced loss, backend {backend}")

    return PEERS | {backend: on(backend) for backend in harness.list_own_backends(device)}


def make_loss(name: str, case: Case, device: str):
    loss = list_candidates(device)[name].make(case)
    return loss.to(device) if isinstance(loss, torch.nn.Module) else loss


def make_batch(case: Case, device: str):
    return harness.make_scores(case.scores, case.N, case.L, case.dtype, device)


def make_step(name: str, case: Case, device: str, small: bool):
    """The step whose peak memory is measured."""
    if small:
        case = Case(2, 200, case.k, case.n_sample, case.epsilon, case.dtype)
    return partial(harness.take_step, make_loss(name, case, device), *make_batch(case, device))


def time_losses(entry: Entry, device: str, seconds: float) -> tuple[dict[str, dict], dict[str, str]]:
    """Quartiles of the milliseconds of each loss, and the reasons why some losses are left out."""
    case, left_out, losses = entry.case, {}, {}
    for name in entry.names:
        if reason := list_candidates(device)[name].fits(case, device):
            left_out[name] = reason
        else:
            losses[name] = make_loss(name, case, device)
    scores, target = make_batch(case, device)
    failed, overwriting = harness.gate(losses, scores, target, case.k, case.n_sample, case.epsilon)
    left_out |= failed
    # Losses that overwrite their scores get a private copy; its values decay, but their time does not depend on them.
    private = {name: scores.detach().clone().requires_grad_() for name in overwriting}
    steps = {
        name: [partial(harness.take_step, loss, private.get(name, scores), target)]
        for name, loss in losses.items()
        if name not in left_out
    }
    repeats = 200 if device == "cuda" else 15
    samples, failed = harness.sample_in_turn(steps, device, repeats, seconds, 10 * seconds)
    return {
        name: harness.compute_quartiles([ms for (ms,) in rows]) for name, rows in samples.items()
    }, left_out | failed


def measure(entry: Entry, device: str, seconds: float) -> dict:
    """The entry's part of the result."""
    ms, left_out = time_losses(entry, device, seconds)
    no_memory = NO_MEMORY if device == "cpu" else ()
    peaks = {
        name: memory.measure_peak(make_step, name, entry.case, device, device=device)
        for name in entry.memory
        if name in ms and name not in no_memory
    }
    return {"group": entry.group, **vars(entry.case), "ms": ms, "left_out": left_out, "peak_bytes": peaks}


def describe(result: dict) -> str:
    """A result as text."""
    ms = ", ".join(f"{name} {value['median']:.4g}" for name, value in result["ms"].items())
    case = " ".join(f"{key}={result[key]}" for key in ("N", "L", "k", "n_sample", "epsilon", "dtype", "scores"))
    peaks = ", ".join(f"{name} {value / 2**20:.1f}" for name, value in result["peak_bytes"].items())
    text = f"{result['group']}: {case}\n  ms: {ms}" + (f"\n  peak MiB: {peaks}" if peaks else "")
    if share := result.get("share_of_copy_bandwidth"):
        text += "\n  share of copy bandwidth: " + ", ".join(f"{name} {value:.2f}" for name, value in share.items())
    return text + "".join(f"\n  {name} left out: {reason}" for name, reason in result["left_out"].items())


def run_once(device: str):
    """Runs one step of our backends for each shape and dtype, for a profiler."""
    for n, length in GPU_SHAPES if device == "cuda" else GOAL_SHAPES:
        for dtype in ("float32", "bfloat16"):
            case = Case(n, length, dtype=dtype)
            scores, target = make_batch(case, device)
            for name in harness.list_own_backends(device):
                loss = topk_fast.BalNoisedTopK(case.k, case.epsilon, case.n_sample, backend=name)
                harness.take_step(loss, scores, target)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=["quick", "full"], default="quick", help="few cases, or all; default quick")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help=f"only these: {', '.join(ALL)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--once", action="store_true", help="one step of our backends a shape; no figures")
    parser.add_argument(
        "--seconds", type=float, help="for each loss in a case, warm-up aside; default by set and device"
    )
    parser.add_argument(
        "--out", type=Path, help="where the JSON goes; on CPU only the whole full set writes one by default"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch.cuda sees")
    known = list_candidates(args.device)
    if unknown := set(args.peers or ()) - set(known):
        parser.error(f"unknown peers {sorted(unknown)}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    if args.once:
        return run_once(args.device)
    todo = list_entries(args.set, args.device)
    if any(entry.case.scores == "species" for entry in todo):
        harness.make_scores("species", *SPECIES, "float32", args.device)  # a missing file raises now, not halfway
    path, report = args.out, {"environment": environment(args.device), "goals": GOALS}
    if args.device == "cuda":
        path = path or Path(os.environ.get("OUT", ROOT / "out")) / "gpu.json"
        report["copy_bytes_per_second"] = harness.measure_copy_bandwidth()
    else:
        memory.limit()
        whole = args.set == "full" and not args.peers
        path = path or (RESULTS / "cpu.json" if whole else None)
    report["cases"] = []
    for entry in harness.tqdm(todo, unit="case"):
        if args.peers:
            entry = entry._replace(names=tuple(name for name in entry.names if name in args.peers))
        if args.device == "cuda":
            torch.cuda.empty_cache()
        result = measure(entry, args.device, args.seconds or SECONDS[args.device, args.set])
        if args.device == "cuda":
            floor = 2 * entry.case.N * entry.case.L * getattr(torch, entry.case.dtype).itemsize
            floor_ms = 1e3 * floor / report["copy_bytes_per_second"]
            own = [name for name in harness.list_own_backends("cuda") if name in result["ms"]]
            result["share_of_copy_bandwidth"] = {name: floor_ms / result["ms"][name]["median"] for name in own}
        report["cases"].append(result)
        if path is not None:
            harness.write(path, report)
        harness.tqdm.write(describe(result))


if __name__ == "__main__":
    main()
