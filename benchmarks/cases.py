"""A case of the losses on logits: its scores, and the gate that the losses pass before they are timed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import topk_fast
from benchmarks import ROOT
from benchmarks.harness import Batch
from topk_fast.functional import bal_noised_topk_loss, sampled_cross_entropy

SPECIES = ROOT / "data" / "species_logits.pt"
SPECIES_COMMAND = "python -m examples.all_species --losses cross-entropy --save-logits data/species_logits.pt"
PEAKS = 8  # large scores in a "spiky" row; the true class has one of them
DRAWS = 16  # losses whose means are compared
SAMPLES = 16  # of a sampled cross-entropy, its default


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


class Case(NamedTuple):
    """Scores [N, L] of a dtype and a kind, and the arguments of the losses."""

    N: int
    L: int
    k: int = 5
    n_sample: int = 10
    epsilon: float = 1.0
    dtype: str = "float32"
    scores: str = "normal"

    def make_batch(self, device: str) -> Batch:
        scores, target = make_scores(self.scores, self.N, self.L, self.dtype, device)
        return Batch((scores,), target)

    def count_classes(self) -> list[int]:
        """Rows of each class, falling exponentially from 1000 to 1."""
        return [max(1, round(1000 ** (1 - j / max(1, self.L - 1)))) for j in range(self.L)]

    def check(self, names: tuple[str, ...], device: str) -> None:
        """The gate, in as many rows as the other side computes quickly.

        Losses and gradients of every backend have the reference's bits; the means of pytopk's loss and of the balanced
        one agree, and those of cross-entropy and of the sampled one, within 5 standard errors.

        Raises:
            SystemExit: if they do not.
        """
        (scores,), target, _ = self.make_batch(device)
        scores, some = scores.detach(), 2**18 // self.L
        few, fewer = slice(max(8, some)), slice(max(2, some))
        balanced = dict(k=self.k, epsilon=self.epsilon, n_sample=self.n_sample)
        check_equality(bal_noised_topk_loss, scores[few], target[few], **balanced)
        check_equality(sampled_cross_entropy, scores[few], target[few], n_sample=SAMPLES)
        scores, target = scores[fewer].float(), target[fewer]
        check_means("cross-entropy", F.cross_entropy, topk_fast.SampledCrossEntropy(SAMPLES), scores, target)
        if "pytopk" in names:
            import pytopk  # which a GPU machine may lack

            theirs = pytopk.BalNoisedTopK(self.k, self.epsilon, self.n_sample)
            check_means("pytopk", theirs, topk_fast.BalNoisedTopK(**balanced), scores, target)


def list_own_backends(device: str) -> list[str]:
    """Our backends that are worth timing there: no interpreter, and the reference only if there is no other."""
    names = topk_fast.available_backends(device)
    return [name for name in names if name != "torch" and (device, name) != ("cpu", "triton")] or ["torch"]


def check_equality(loss: Callable, scores: Tensor, target: Tensor, **options) -> None:
    """Raises SystemExit unless losses and gradients have the reference's bits on every backend."""
    device, results = scores.device.type, {}
    places = [("cpu", name) for name in ("torch", *list_own_backends("cpu"))]
    places += [(device, name) for name in list_own_backends(device)]
    for place, backend in places:
        leaf = scores.to(place, copy=True).requires_grad_()
        value = loss(leaf, target.to(place), seed=1, reduction="none", backend=backend, **options)
        value.sum().backward()
        results[place, backend] = value.detach().cpu(), leaf.grad.cpu()
    for (place, backend), result in results.items():
        if not all(torch.equal(a, b) for a, b in zip(result, results["cpu", "torch"])):
            case = f"{loss.__name__} at {list(scores.shape)}, {scores.dtype}, {options}"
            raise SystemExit(f"{backend} on {place} and the reference differ in {case}: nothing was timed")


def check_means(name: str, loss: Callable, own: Callable, scores: Tensor, target: Tensor) -> None:
    """Raises SystemExit unless the mean losses agree within 5 standard errors."""
    torch.manual_seed(0)
    theirs, ours = (torch.stack([f(scores, target) for _ in range(DRAWS)]).double() for f in (loss, own))
    error = ((theirs.var() + ours.var()) / DRAWS).sqrt() + 1e-6 * theirs.mean().abs()  # float32 sums round
    if not (theirs.mean() - ours.mean()).abs() <= 5 * error:
        raise SystemExit(f"mean losses {ours.mean():.5f} and {name}'s {theirs.mean():.5f} differ: nothing was timed")
