"""Linear layer + loss of many classes against linear + cross-entropy: time of each pass, and peak extra memory.

The peers are ``F.cross_entropy(F.linear(x, weight), y)``, the plain form; torch's linear_cross_entropy, where this
torch has one, in chunks of 64 rows, with which it is much faster here than with its default (one row for float32 on a
CPU); and on a GPU Liger-Kernel's fused linear cross-entropy and cut-cross-entropy, where they are installed. The
optimizer's step is Adam on a dense gradient and SparseAdam on a sparse one; both are torch's.

    python -m benchmarks.linear                    # writes results/linear_cpu.json
    python -m benchmarks.linear --quick            # fewer samples, the first case; prints only
    python -m benchmarks.linear --device cuda      # writes $OUT/linear_gpu.json (out/ by default)
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import Batch, Candidate, Effort, Entry
from topk_fast.functional import (
    linear_noised_topk_loss,
    linear_sampled_cross_entropy,
    noised_topk_loss,
    sampled_cross_entropy,
)

PLAIN, SAMPLED, TOPK = "linear + cross-entropy", "sampled cross-entropy, B = 16", "noised top-5, B = 5"
SPARSE = f"{SAMPLED}, sparse_grad"
OWN = {f"sampled cross-entropy, B = {b}": partial(linear_sampled_cross_entropy, n_sample=b) for b in (1, 5, 16, 64)}
OWN |= {
    SPARSE: partial(OWN[SAMPLED], sparse_grad=True),
    TOPK: partial(linear_noised_topk_loss, k=5, epsilon=1.0, n_sample=5),
}
ON_LOGITS = {SAMPLED: sampled_cross_entropy, TOPK: noised_topk_loss}
CANDIDATES = {PLAIN: Candidate(lambda c: lambda x, weight, y: F.cross_entropy(F.linear(x, weight), y))} | {
    name: Candidate(lambda c, loss=loss: loss, own=True, sparse=name == SPARSE) for name, loss in OWN.items()
}
if hasattr(F, "linear_cross_entropy"):
    OPTIONS = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=64)
    CHUNKED = partial(F.linear_cross_entropy, options=OPTIONS)
    CANDIDATES["torch's linear_cross_entropy, 64 rows a chunk"] = Candidate(lambda c: CHUNKED)


def make_liger(case):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, y: liger(weight, x, y)


def make_cut(case):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


GPU_PEERS = {"Liger-Kernel": Candidate(make_liger), "cut-cross-entropy": Candidate(make_cut)}
# By device; `make gpu` has little time for its cases.
EFFORT = {"cpu": Effort(20, 30), "cuda": Effort(30, 1)}


class Case(NamedTuple):
    """Features [N, D] and a weight [L, D]."""

    N: int
    D: int
    L: int
    dtype: str = "float32"

    def make_batch(self, device: str, exact: bool = False) -> Batch:
        """Features, weight and target, whose logits have standard deviation 1.

        With ``exact``, features and weight are small integers, whose matmul needs no rounding.
        """
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(self.N, self.D, generator=generator, device=device)
        weight = torch.randn(self.L, self.D, generator=generator, device=device) / (2 if exact else self.D**0.5)
        if exact:
            x, weight = x.round(), weight.round()
        x, weight = (t.to(getattr(torch, self.dtype)).requires_grad_() for t in (x, weight))
        optimizers = torch.optim.Adam([weight], lr=1e-6), torch.optim.SparseAdam([weight], lr=1e-6)
        return Batch((x, weight), torch.randint(self.L, (self.N,), generator=generator, device=device), optimizers)

    def check(self, names: tuple[str, ...], device: str) -> None:
        """The gate: the linear form has its logits' losses, bit for bit, and their gradients to a few roundings.

        Raises:
            SystemExit: if it has not.
        """
        (x, weight), y, _ = self._replace(N=16).make_batch(device, exact=True)
        for name, on_logits in ON_LOGITS.items():
            loss, common = OWN[name].func, OWN[name].keywords | dict(seed=1, sampler="dense", reduction="none")
            results = []
            for value in (
                loss(x, weight, y, chunk_size=self.L // 3, **common),
                on_logits(F.linear(x, weight), y, **common),
            ):
                results.append((value.detach(), *torch.autograd.grad(value.sum(), (x, weight))))
            (value, *grads), (expected, *wanted) = results
            eps = torch.finfo(x.dtype).eps
            close = all((a - b).abs().max() <= 8 * eps * b.abs().max() for a, b in zip(grads, wanted))
            if not (torch.equal(value, expected) and close):
                raise SystemExit(f"{name}: linear and plain form disagree at {self}: nothing was timed")


def list_entries(quick: bool, device: str) -> list[Entry]:
    if device == "cuda":
        cases = [Case(8192, 1024, length, "bfloat16") for length in (131_072, 1_000_000)]
        cases.append(Case(8192, 1024, 131_072))
    else:
        cases = [Case(256, 128, length) for length in (100_000, 1_000_000)]
    names = tuple(CANDIDATES) + tuple(GPU_PEERS) * (device == "cuda")
    return [Entry("linear", case, names) for case in (cases[:1] if quick else cases)]


def main(argv: list[str] | None = None) -> None:
    args = harness.make_parser(__doc__).parse_args(argv)
    report, path = harness.begin(args, "linear_")
    todo = list_entries(args.quick, args.device)
    effort = Effort(3) if args.quick else EFFORT[args.device]
    harness.measure(todo, CANDIDATES | GPU_PEERS, args.device, effort, report, path)


if __name__ == "__main__":
    main()
