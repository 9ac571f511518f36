"""Linear layer + loss of many classes against linear + cross-entropy: time of each pass, and peak extra memory.

harness.py describes how candidates are timed. The peers are:

* linear + cross-entropy: ``F.cross_entropy(F.linear(x, weight), y)``, the plain form;
* torch's linear_cross_entropy, in its chunked form, where this torch has one;
* Liger-Kernel's fused linear cross-entropy and cut-cross-entropy, on a GPU, where they are installed.

The optimizer's step is Adam on a dense gradient and SparseAdam on a sparse one; both are torch's. Before anything is
timed, the losses of the linear form are compared with those of its logits, bit for bit, and its gradients with
autograd's.

    python -m benchmarks.linear             # writes results/linear_cpu.json or, on a GPU, $OUT/linear_gpu.json
    python -m benchmarks.linear --quick     # fewer repeats, prints only
"""

import argparse
import importlib.util
import math
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import RESULTS, ROOT, harness, memory
from examples.machine import environment
from topk_fast.functional import (
    linear_noised_topk_loss,
    linear_sampled_cross_entropy,
    noised_topk_loss,
    sampled_cross_entropy,
)

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
CASE_SECONDS = 8 if ON_GPU else math.inf  # for the samples of a case; make gpu has little time for its three cases
PLAIN, SPARSE = "linear + cross-entropy", ", sparse_grad"
SEARCH = {  # of our losses, by name
    "sampled cross-entropy": dict(n_sample=16),
    "noised top-5": dict(k=5, epsilon=1.0, n_sample=5),
}
LINEAR = {"sampled cross-entropy": linear_sampled_cross_entropy, "noised top-5": linear_noised_topk_loss}
ON_LOGITS = {"sampled cross-entropy": sampled_cross_entropy, "noised top-5": noised_topk_loss}


def list_candidates() -> dict:
    """Losses of (x, weight, y) by name, as far as they are installed."""
    out = {PLAIN: lambda x, weight, y: F.cross_entropy(F.linear(x, weight), y)}
    for name, loss in LINEAR.items():
        out[name] = partial(loss, **SEARCH[name])
        out[name + SPARSE] = partial(loss, sparse_grad=True, **SEARCH[name])
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


def make_batch(N, D, L, dtype, exact=False):
    """Features, weight and target, whose logits have standard deviation 1.

    With ``exact``, features and weight are small integers, whose matmul needs no rounding.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(N, D, generator=generator, device=DEVICE)
    weight = torch.randn(L, D, generator=generator, device=DEVICE) / (2 if exact else D**0.5)
    if exact:
        x, weight = x.round(), weight.round()
    leaves = [t.to(getattr(torch, dtype)).requires_grad_() for t in (x, weight)]
    return *leaves, torch.randint(L, (N,), generator=generator, device=DEVICE)


def check_equality(N, D, L, dtype):
    """Raises unless the linear form has its logits' losses, bit for bit, and their gradients to a few roundings."""
    x, weight, y = make_batch(16, D, L, dtype, exact=True)
    for name, search in SEARCH.items():
        common = search | dict(seed=1, sampler="dense", reduction="none")
        results = []
        for loss in (
            LINEAR[name](x, weight, y, chunk_size=L // 3, **common),
            ON_LOGITS[name](F.linear(x, weight), y, **common),
        ):
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (x, weight))))
        (loss, *grads), (expected, *wanted) = results
        eps = torch.finfo(x.dtype).eps
        close = all((a - b).abs().max() <= 8 * eps * b.abs().max() for a, b in zip(grads, wanted))
        if not (torch.equal(loss, expected) and close):
            raise SystemExit(f"{name}: linear and plain form disagree at {(N, D, L, dtype)}: nothing was timed")


class Step:
    """Forward, backward and the optimizer's step of one candidate, each a pass of its own."""

    def __init__(self, name, x, weight, y, optimizer=None):
        self.loss_of, self.x, self.weight, self.y = list_candidates()[name], x, weight, y
        self.optimizer, self.loss = optimizer, None

    def forward(self):
        self.x.grad = self.weight.grad = None
        self.loss = self.loss_of(self.x, self.weight, self.y)

    def backward(self):
        self.loss.backward()

    def update(self):
        self.optimizer.step()

    def drop(self):
        """Releases the tensors of a pass that failed."""
        self.x.grad = self.weight.grad = self.loss = None


def measure(case, repeats: int) -> dict:
    """Quartiles of the milliseconds of each candidate's passes, or "out of memory"."""
    x, weight, y = make_batch(**case)
    dense, sparse = torch.optim.Adam([weight], lr=1e-6), torch.optim.SparseAdam([weight], lr=1e-6)
    steps = {name: Step(name, x, weight, y, sparse if name.endswith(SPARSE) else dense) for name in list_candidates()}
    passes = {name: [step.forward, step.backward, step.update] for name, step in steps.items()}
    fitting = {}
    for name, step in steps.items():
        if memory.attempt(harness.time_passes, passes[name], DEVICE)[1] is None:  # the first run warms up and compiles
            fitting[name] = passes[name]
        step.drop()
    samples, _ = harness.sample_in_turn(fitting, DEVICE, repeats, case_seconds=CASE_SECONDS)
    out = dict.fromkeys(passes, "out of memory")
    for name, rows in samples.items():
        forward, backward, update = zip(*rows)
        both = [a + b for a, b in zip(forward, backward)]
        series = dict(forward=forward, backward=backward, both=both, optimizer=update)
        out[name] = {part: harness.compute_quartiles(values) for part, values in series.items()}
    return out


def make_step(name, case, small):
    step = Step(name, *make_batch(**(case | dict(N=4, D=16, L=300) if small else case)))

    def run():
        step.forward()
        step.backward()

    return run


def describe(result: dict) -> str:
    """A result as text."""
    rows = ["N, D, L = {N}, {D}, {L}, {dtype}".format(**result)]
    for name, ms in result["ms"].items():
        if not isinstance(ms, dict):
            rows.append(f"  {name}: {ms}")
            continue
        parts = ", ".join(f"{part} {value['median']:.4g} ms" for part, value in ms.items())
        rows.append(f"  {name}: {parts}, peak {result['peak_bytes'][name] / 2**20:.0f} MiB")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, only the first case; prints only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(os.environ.get("OUT", ROOT / "out")) / "linear_gpu.json"
    if not ON_GPU:
        memory.limit()
        path = RESULTS / "linear_cpu.json"
    report = {"environment": environment(DEVICE), "search": SEARCH, "cases": []}
    for case in harness.tqdm(CASES[:1] if arguments.quick else CASES, unit="case"):
        check_equality(**case)
        repeats = 3 if arguments.quick else 30 if ON_GPU else max(5, 2_000_000 // case["L"])
        ms = measure(case, repeats)
        measured = [name for name in ms if isinstance(ms[name], dict)]
        peaks = {name: memory.measure_peak(make_step, name, case, device=DEVICE) for name in measured}
        report["cases"].append(case | {"ms": ms, "peak_bytes": peaks})
        if not arguments.quick:
            harness.write(path, report)
        harness.tqdm.write(describe(report["cases"][-1]))


if __name__ == "__main__":
    main()
