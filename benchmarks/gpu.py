"""Forward + backward of BalNoisedTopK's GPU backends against cross-entropy (eager, compiled), Liger-Kernel and pytopk.

Time by CUDA events, candidates in turn, medians with quartiles; peak memory beyond scores and target; and the share of
the copy bandwidth measured in the same run: scores read once and gradients written once, over the time of a step.
Equality comes first: losses and gradients of the first rows must be the CPU kernel's, bit for bit.

    python benchmarks/gpu.py                  # all cases, results to $OUT/gpu.json (out/ by default)
    python benchmarks/gpu.py --quick          # one value of B, K and epsilon a shape
    ncu ... python benchmarks/gpu.py --once   # a step of each shape, for a profiler
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import topk_fast
from topk_fast.functional import bal_noised_topk_loss

ROOT = Path(__file__).resolve().parent.parent
# N * L of about 2**28, and the small batches where launches count.
SHAPES = [
    (1024, 1000),
    (1024, 10_000),
    (262_144, 1000),
    (26_624, 10_000),
    (8192, 32_768),
    (2048, 131_072),
    (268, 1_000_000),
]
BASE = dict(n_sample=10, k=5, epsilon=1.0, scores="normal")
VARIANTS = [
    {},
    {"n_sample": 5},
    {"n_sample": 32},
    {"k": 1},
    {"k": 20},
    {"epsilon": 0.1},
    {"epsilon": 5.0},
    {"scores": "flat"},
]
OURS = [name for name in topk_fast.available_backends("cuda") if name != "torch"]
PYTOPK_ENTRIES = 2**30  # pytopk makes tensors of N * L * B; larger cases are left out, and say so


def losses(k: int, n_sample: int, epsilon: float, n_scores: int) -> dict:
    """The candidates that are installed and fit, by name."""
    out = {
        **{name: topk_fast.BalNoisedTopK(k, epsilon, n_sample, backend=name) for name in OURS},
        "cross_entropy": F.cross_entropy,
        "cross_entropy_compiled": torch.compile(F.cross_entropy),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        out["liger"] = LigerCrossEntropyLoss()
    if importlib.util.find_spec("pytopk") and n_scores * n_sample <= PYTOPK_ENTRIES:
        import pytopk

        out["pytopk"] = pytopk.BalNoisedTopK(k, epsilon, n_sample)
    return out


def batch(n: int, length: int, dtype: torch.dtype, kind: str):
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.randn(n, length, device="cuda", dtype=dtype, generator=generator)
    if kind == "flat":
        scores.zero_()
    return scores.requires_grad_(), torch.randint(length, (n,), device="cuda", generator=generator)


def check_equality(scores, target, k, n_sample, epsilon):
    """Raises unless the first rows' losses and gradients have the bits of the CPU kernel."""
    results = []
    for rows, backend in ((scores[:8].detach().cpu(), "cpp"), *((scores[:8].detach(), name) for name in OURS)):
        leaf = rows.clone().requires_grad_()
        out = bal_noised_topk_loss(
            leaf, target[:8].to(rows.device), k, epsilon, n_sample, seed=1, reduction="none", backend=backend
        )
        out.sum().backward()
        results.append((out.detach().cpu(), leaf.grad.cpu()))
    if not all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other)):
        raise SystemExit(f"{OURS} and cpp disagree at {(list(scores.shape), k, n_sample, epsilon)}: nothing was timed")


def step(loss, scores, target):
    scores.grad = None
    loss(scores, target).backward()


@lru_cache
def larger_than_the_cache() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def timed(function, repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` runs, the L2 cache emptied before each."""
    times = []
    for _ in range(repeats):
        larger_than_the_cache().zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    x = torch.empty(2**29, device="cuda")
    y = torch.empty_like(x)
    timed(lambda: y.copy_(x), 3)
    return 2 * x.numel() * 4 / (statistics.median(timed(lambda: y.copy_(x), 20)) * 1e-3)


def measure(n, length, dtype, variant, seconds):
    case = BASE | variant
    scores, target = batch(n, length, dtype, case["scores"])
    candidates = losses(case["k"], case["n_sample"], case["epsilon"], n * length)
    check_equality(scores, target, case["k"], case["n_sample"], case["epsilon"])
    out = {"N": n, "L": length, "dtype": str(dtype).removeprefix("torch."), **case, "ms": {}, "peak_bytes": {}}
    times = {name: [] for name in candidates}
    for name, loss in candidates.items():
        step(loss, scores, target)  # compiles
        scores.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, scores, target)
        out["peak_bytes"][name] = torch.cuda.max_memory_allocated() - before
    start = time.monotonic()
    while len(times[OURS[0]]) < 10 or (time.monotonic() - start < seconds and len(times[OURS[0]]) < 200):
        for name, loss in candidates.items():
            times[name] += timed(lambda loss=loss: step(loss, scores, target), 1)
    for name, values in times.items():
        out["ms"][name] = dict(zip(("lower", "median", "upper"), statistics.quantiles(values, n=4)))
    if "pytopk" not in candidates:
        out["pytopk"] = "not installed, or N * L * B is too large for its memory"
    return out


def environment() -> dict:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver.stdout.strip(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **topk_fast.build_info(),
        "commit": os.environ.get("COMMIT") or commit.stdout.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one value of B, K and epsilon a shape")
    parser.add_argument(
        "--once", action="store_true", help="one step of our backends a shape, for a profiler; no figures"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case, compilation aside")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU that torch.cuda sees; on a CPU run benchmarks/cpu.py")
    if arguments.once:
        for n, length in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                scores, target = batch(n, length, dtype, "normal")
                for name in OURS:
                    step(topk_fast.BalNoisedTopK(BASE["k"], 1.0, BASE["n_sample"], backend=name), scores, target)
        return
    bandwidth = copy_bandwidth()
    report = {"environment": environment(), "copy_bytes_per_second": bandwidth, "cases": []}
    path = Path(os.environ.get("OUT", ROOT / "out")) / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = [
        (n, length, dtype, variant)
        for variant in (VARIANTS[:1] if arguments.quick else VARIANTS)
        for n, length in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for n, length, dtype, variant in tqdm(cases, unit="case"):
        torch.cuda.empty_cache()
        case = measure(n, length, dtype, variant, arguments.seconds)
        floor = 2 * n * length * (4 if dtype == torch.float32 else 2) / bandwidth
        case["share_of_copy_bandwidth"] = {name: floor / (case["ms"][name]["median"] * 1e-3) for name in OURS}
        report["cases"].append(case)
        path.write_text(json.dumps(report, indent=1) + "\n")  # what is measured stays if time runs out
        ms = {name: round(value["median"], 4) for name, value in case["ms"].items()}
        tqdm.write(f"{n} x {length} {case['dtype']} {variant} {ms} share {case['share_of_copy_bandwidth']}")


if __name__ == "__main__":
    main()
