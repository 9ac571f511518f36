"""Linear layer + loss of many classes against linear + cross-entropy: time of each pass, and peak extra memory.

On CPU: one thread, process CPU time. On a GPU: CUDA events. Candidates in turn, medians with quartiles. The peers:

* linear + cross-entropy: ``F.cross_entropy(F.linear(x, weight), y)``, the plain form;
* torch's linear_cross_entropy, in its chunked form, where this torch has one;
* Liger-Kernel's fused linear cross-entropy and cut-cross-entropy, on a GPU, where they are installed.

The optimizer's step is Adam on a dense gradient and SparseAdam on a sparse one; both are torch's. Before anything is
timed the losses of the linear form are held to those of its logits, bit for bit, and its gradients to autograd's.

    python benchmarks/linear.py             # results/linear_cpu.json and README's table, or $OUT/linear_gpu.json
    python benchmarks/linear.py --quick     # fewer repeats, prints only
    python benchmarks/linear.py --table     # README's table again, from the committed JSON
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from pathlib import Path

import cpu
import gpu
import torch
import torch.nn.functional as F
from tqdm import tqdm

from topk_fast.functional import bal_noised_topk_loss, linear_noised_topk_loss

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "linear_cpu.json"
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CASES = (
    [
        dict(N=8192, D=1024, L=131_072, dtype="bfloat16"),
        dict(N=8192, D=1024, L=1_000_000, dtype="bfloat16"),
        dict(N=8192, D=1024, L=131_072, dtype="float32"),
    ]
    if ON_GPU
    else [dict(N=256, D=128, L=100_000, dtype="float32"), dict(N=256, D=128, L=1_000_000, dtype="float32")]
)
SEARCH = dict(k=5, epsilon=1.0, n_sample=5)
PLAIN, OURS, SPARSE = "linear + cross-entropy", "topk_fast", "topk_fast, sparse_grad"
GOALS = {"time": 0.5, "memory": 0.25}  # to linear + cross-entropy, on CPU at L = 100 000


def candidates() -> dict:
    """Losses of (x, weight, y) by name; those that are installed."""
    out = {
        PLAIN: lambda x, weight, y: F.cross_entropy(F.linear(x, weight), y),
        OURS: lambda x, weight, y: linear_noised_topk_loss(x, weight, y, **SEARCH),
        SPARSE: lambda x, weight, y: linear_noised_topk_loss(x, weight, y, sparse_grad=True, **SEARCH),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        out["torch's linear_cross_entropy"] = lambda x, weight, y: F.linear_cross_entropy(x, weight, y, options=options)
    if ON_GPU and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        out["Liger-Kernel"] = lambda x, weight, y: liger(weight, x, y)
    if ON_GPU and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        out["cut-cross-entropy"] = linear_cross_entropy
    return out


def batch(N, D, L, dtype, exact=False):
    """Features, weight and target; logits of standard deviation 1. ``exact``: small integers, whose matmul has no rounding."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(N, D, generator=generator, device=DEVICE)
    weight = torch.randn(L, D, generator=generator, device=DEVICE) / (2 if exact else D**0.5)
    if exact:
        x, weight = x.round(), weight.round()
    leaves = [t.to(getattr(torch, dtype)).requires_grad_() for t in (x, weight)]
    return *leaves, torch.randint(L, (N,), generator=generator, device=DEVICE)


def check_equality(N, D, L, dtype):
    """Raises unless the linear form is the loss of its logits: bits of losses, gradients to a few roundings."""
    x, weight, y = batch(16, D, L, dtype, exact=True)
    common = SEARCH | dict(seed=1, sampler="dense", reduction="none")
    results = []
    for loss in (
        linear_noised_topk_loss(x, weight, y, chunk_size=L // 3, **common),
        bal_noised_topk_loss(F.linear(x, weight), y, **common),
    ):
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (x, weight))))
    (loss, *grads), (expected, *wanted) = results
    eps = torch.finfo(x.dtype).eps
    close = all((a - b).abs().max() <= 8 * eps * b.abs().max() for a, b in zip(grads, wanted))
    if not (torch.equal(loss, expected) and close):
        raise SystemExit(f"linear and plain form disagree at {(N, D, L, dtype)}: nothing was timed")


def timed(passes: list) -> list[float]:
    """Milliseconds of each of some functions, one after the other."""
    if ON_GPU:
        gpu.larger_than_the_cache().zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(passes) + 1)]
        events[0].record()
        for run, event in zip(passes, events[1:]):
            run()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:])]
    stamps = [time.process_time()]
    for run in passes:
        run()
        stamps.append(time.process_time())
    return [1e3 * (b - a) for a, b in zip(stamps, stamps[1:])]


class Step:
    """Forward, backward and the optimizer's step of one candidate, apart."""

    def __init__(self, name, x, weight, y, with_optimizer=True):
        self.loss_of, self.x, self.weight, self.y = candidates()[name], x, weight, y
        if with_optimizer:
            optimizer = torch.optim.SparseAdam if name == SPARSE else torch.optim.Adam
            self.optimizer = optimizer([weight], lr=1e-6)
        self.loss = None

    def forward(self):
        self.x.grad = self.weight.grad = None
        self.loss = self.loss_of(self.x, self.weight, self.y)

    def backward(self):
        self.loss.backward()

    def update(self):
        self.optimizer.step()


def measure(case, repeats: int) -> dict:
    x, weight, y = batch(**case)
    steps = {name: Step(name, x, weight, y) for name in candidates()}
    times = {name: [] for name in steps}
    for name in steps:
        try:
            timed([steps[name].forward, steps[name].backward, steps[name].update])  # warms up, compiles
        except torch.OutOfMemoryError:
            times[name] = None
    for _ in range(repeats):
        for name, step in steps.items():
            if times[name] is not None:
                times[name].append(timed([step.forward, step.backward, step.update]))
    out = {}
    for name, rows in times.items():
        if rows is None:
            out[name] = "out of memory"
            continue
        forward, backward, update = zip(*rows)
        series = dict(
            forward=forward, backward=backward, both=[a + b for a, b in zip(forward, backward)], optimizer=update
        )
        out[name] = {
            part: dict(zip(("lower", "median", "upper"), statistics.quantiles(v, n=4))) for part, v in series.items()
        }
    return out


def memory_step(name, case, small):
    step = Step(name, *batch(**(case | dict(N=4, D=16, L=300) if small else case)), with_optimizer=False)

    def run():
        step.forward()
        step.backward()

    return run


def peak_memory(name, case) -> int:
    if not ON_GPU:
        return cpu.peak_memory(memory_step, name, case)
    run = memory_step(name, case, small=False)
    run()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def table(report) -> str:
    """The Markdown table of a report: times and memory, with their ratio to the plain form."""
    rows = [
        "| N, D, L | | forward | backward | both | optimizer | peak extra memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        plain, plain_bytes = case["ms"][PLAIN]["both"]["median"], case["peak_bytes"][PLAIN]
        for name, ms in case["ms"].items():
            t = {part: value["median"] for part, value in ms.items()}
            peak = case["peak_bytes"][name]
            rows.append(
                f"| {case['N']}, {case['D']}, {case['L']} | {name} | {t['forward']:.0f} ms | {t['backward']:.0f} ms | "
                f"{t['both']:.0f} ms ({t['both'] / plain:.2f}) | {t['optimizer']:.1f} ms | "
                f"{peak / 2**20:.0f} MiB ({peak / plain_bytes:.2f}) |"
            )
    e = report["environment"]
    return "\n".join(rows) + (
        f"\n\nIn brackets the ratio to {PLAIN}; goals at L = 100 000: {GOALS['time']} of its time, {GOALS['memory']} of its "
        f"memory. The memory contains the weight's gradient. {e['cpu']}, one thread, torch {e['torch']}, commit "
        f"{e['commit']}, {e['date'][:10]}."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, the first case alone; prints only")
    parser.add_argument("--table", action="store_true", help="write README's table from the committed JSON")
    arguments = parser.parse_args()
    if arguments.table:
        cpu.write_table("linear", table(json.loads(RESULT.read_text())))
        return
    torch.set_num_threads(1)
    report = {"environment": gpu.environment() if ON_GPU else cpu.machine(), "search": SEARCH, "cases": []}
    for case in tqdm(CASES[:1] if arguments.quick else CASES, unit="case"):
        check_equality(**case)
        repeats = 3 if arguments.quick else 30 if ON_GPU else max(5, 2_000_000 // case["L"])
        ms = measure(case, repeats)
        report["cases"].append(
            case | {"ms": ms, "peak_bytes": {n: peak_memory(n, case) for n in ms if isinstance(ms[n], dict)}}
        )
        tqdm.write(json.dumps(report["cases"][-1]))
    if not ON_GPU:
        print(table(report))
    if arguments.quick:
        return
    path = Path(os.environ.get("OUT", ROOT / "out")) / "linear_gpu.json" if ON_GPU else RESULT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    if not ON_GPU:
        cpu.write_table("linear", table(report))


if __name__ == "__main__":
    main()
