"""Forward + backward of the balanced loss on CPU against cross-entropy and pytopk: time and peak extra memory.

One thread, process CPU time, candidates in turn, medians. Before anything is timed the C++ kernel is held to the
PyTorch backend bit for bit, and to pytopk's mean loss within 5 standard errors.

    python benchmarks/cpu.py                # writes results/cpu.json and the table between README.md's marks
    python benchmarks/cpu.py --quick        # fewer repeats, prints only
    python benchmarks/cpu.py --table        # the table again, from the committed JSON
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytopk
import torch
import torch.nn.functional as F
from tqdm import tqdm

import topk_fast

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
SHAPES = [(128, 100), (128, 1000), (64, 10_000), (32, 100_000)]
K = 5
CASES = [(n, length, n_sample, epsilon) for n, length in SHAPES for n_sample in (5, 10) for epsilon in (1.0, 0.2)]
# Ratios that the design sets as goals: to cross-entropy at n_sample 5, to pytopk at n_sample 10.
GOALS = {100: (4, 1 / 8), 1000: (1.5, 1 / 40), 10_000: (0.6, 1 / 150), 100_000: (0.3, 1 / 300)}


def candidates(n_sample: int, epsilon: float) -> dict:
    return {
        "cross_entropy": F.cross_entropy,
        "topk_fast": topk_fast.BalNoisedTopK(K, epsilon, n_sample),
        "pytopk": pytopk.BalNoisedTopK(K, epsilon, n_sample),
    }


def batch(n: int, length: int):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n, length, generator=generator, requires_grad=True)
    return scores, torch.randint(length, (n,), generator=generator)


def step(loss, scores, target):
    scores.grad = None
    loss(scores, target).backward()


def check_equality(n, length, n_sample, epsilon):
    """Raises unless both backends agree in every bit and pytopk agrees in the mean."""
    scores, target = batch(n, length)
    results = []
    for backend in ("cpp", "torch"):
        scores.grad = None
        loss = topk_fast.BalNoisedTopK(K, epsilon, n_sample, reduction="none", seed=1, backend=backend)
        losses = loss(scores, target)
        losses.sum().backward()
        results.append((losses.detach(), scores.grad))
    if not all(torch.equal(a, b) for a, b in zip(*results)):
        raise SystemExit(f"the backends disagree at {(n, length, n_sample, epsilon)}: nothing was timed")
    ours, theirs = (torch.stack([f(scores.detach(), target) for _ in range(8)]) for f in
                    (candidates(n_sample, epsilon)[name] for name in ("topk_fast", "pytopk")))  # fmt: skip
    error = ((ours.var() + theirs.var()) / 8).sqrt()
    if abs(ours.mean() - theirs.mean()) > 5 * error:
        raise SystemExit(f"mean losses {ours.mean():.5f} and pytopk's {theirs.mean():.5f} differ: nothing was timed")


def time_case(n, length, n_sample, epsilon, repeats, seconds):
    """Medians of milliseconds a step, each with its quartiles, candidates in turn."""
    scores, target = batch(n, length)
    losses = candidates(n_sample, epsilon)
    inner = {}
    for name, loss in losses.items():
        step(loss, scores, target)
        start = time.process_time()
        step(loss, scores, target)
        inner[name] = max(1, min(200, int(seconds / repeats / (time.process_time() - start + 1e-5))))
    times = {name: [] for name in losses}
    for _ in range(repeats):
        for name, loss in losses.items():
            step(loss, scores, target)  # the allocator, caches and branch predictors get over the one before
            start = time.process_time()
            for _ in range(inner[name]):
                step(loss, scores, target)
            times[name].append((time.process_time() - start) / inner[name] * 1e3)
    return {name: dict(zip(("lower", "median", "upper"), statistics.quantiles(t, n=4))) for name, t in times.items()}


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _memory_worker(make, args, queue):
    torch.set_num_threads(1)
    make(*args, small=True)()  # what first calls load is not the loss's
    run = make(*args, small=False)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    queue.put(_status("VmHWM") - before)


def peak_memory(make, *args):
    """Bytes that a step takes at its peak beyond its inputs, gradients included; in a process of its own.

    ``make(*args, small=...)`` returns the step, on small inputs or on those that count.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_memory_worker, args=(make, args, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def one_step(name, n, length, n_sample, epsilon, small):
    loss = candidates(n_sample, epsilon)[name]
    scores, target = batch(*((2, 200) if small else (n, length)))
    return lambda: step(loss, scores, target)


def machine():
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": model,
        "python": platform.python_version(),
        "pytopk": pytopk.__version__,
        "topk_fast": topk_fast.__version__,
        **topk_fast.build_info(),
        "commit": commit.stdout.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
    }


def table(report) -> str:
    """The Markdown table of a report."""
    rows = [
        "| N, L | B | epsilon | topk_fast | cross-entropy | pytopk | to cross-entropy (goal) | to pytopk (goal) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report["cases"]:
        t = {name: value["median"] for name, value in r["ms"].items()}
        ce_goal, pytopk_goal = GOALS[r["L"]]
        to_ce = f"{t['topk_fast'] / t['cross_entropy']:.2f}" + (f" ({ce_goal})" if r["n_sample"] == 5 else "")
        to_pytopk = f"1/{t['pytopk'] / t['topk_fast']:.0f}"
        to_pytopk += f" (1/{1 / pytopk_goal:.0f})" if r["n_sample"] == 10 else ""
        rows.append(
            f"| {r['N']}, {r['L']} | {r['n_sample']} | {r['epsilon']:g} | {t['topk_fast']:.3f} ms | "
            f"{t['cross_entropy']:.3f} ms | {t['pytopk']:.4g} ms | {to_ce} | {to_pytopk} |"
        )
    m = report["memory"]
    parts = ", ".join(f"{name} {m['bytes'][name] / m['logits_bytes']:.2f}" for name in m["bytes"])
    e = report["environment"]
    return "\n".join(rows) + (
        f"\n\nPeak extra memory of a step at ({m['N']}, {m['L']}), B = {m['n_sample']}, in units of the logits, the "
        f"gradient (1.00) included: {parts}.\n{e['cpu']}, one thread, torch {e['torch']}, {e['compiler']}, commit "
        f"{e['commit']}, {e['date'][:10]}."
    )


def write_table(name, text):
    """Puts a table between README's marks of that name."""
    readme = ROOT / "README.md"
    head, _, rest = readme.read_text().partition(f"<!-- {name} table -->\n")
    _, _, tail = rest.partition("<!-- end -->")
    readme.write_text(f"{head}<!-- {name} table -->\n{text}\n<!-- end -->{tail}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, one n_sample and epsilon; prints only")
    parser.add_argument("--table", action="store_true", help="write README's table from the committed JSON")
    arguments = parser.parse_args()
    if arguments.table:
        write_table("cpu", table(json.loads(RESULT.read_text())))
        return
    torch.set_num_threads(1)
    cases = [c for c in CASES if c[2:] == (5, 1.0)] if arguments.quick else CASES
    report = {"environment": machine(), "k": K, "cases": []}
    for case in tqdm(cases, unit="case"):
        check_equality(*case)
        ms = time_case(*case, repeats=5 if arguments.quick else 15, seconds=2 if arguments.quick else 8)
        report["cases"].append(dict(zip(("N", "L", "n_sample", "epsilon"), case)) | {"ms": ms})
    case = (32, 100_000, 10, 1.0)
    report["memory"] = dict(zip(("N", "L", "n_sample", "epsilon"), case)) | {
        "logits_bytes": case[0] * case[1] * 4,
        "bytes": {name: peak_memory(one_step, name, *case) for name in candidates(10, 1.0)},
    }
    print(table(report))
    if not arguments.quick:
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
        write_table("cpu", table(report))


if __name__ == "__main__":
    main()
