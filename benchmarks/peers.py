"""The losses that topk_fast is compared with, from their own packages where these exist, else from losses.py.

``PEERS`` names each and states what is compared.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import topk_fast
from benchmarks.losses import FocalLoss, LapSumTopKLoss, LDAMLoss, LogitAdjustedCrossEntropy, SmoothTopKSVM


@dataclass(frozen=True)
class Case:
    """One point of a benchmark: scores [N, L] of a dtype and a kind, and the arguments of the losses."""

    N: int
    L: int
    k: int = 5
    n_sample: int = 10
    epsilon: float = 1.0
    dtype: str = "float32"
    scores: str = "normal"

    def cls_num_list(self) -> list[int]:
        """Rows of each class, falling exponentially from 1000 to 1."""
        return [max(1, round(1000 ** (1 - j / max(1, self.L - 1)))) for j in range(self.L)]


def _anywhere(case: Case, device: str) -> str | None:
    return None


def _package(name: str, only: str | None = None) -> Callable[[Case, str], str | None]:
    def fits(case: Case, device: str) -> str | None:
        if only and device != only:
            return f"runs only on {only}"
        return None if importlib.util.find_spec(name) else f"{name} is not installed"

    return fits


def _pytopk_fits(case: Case, device: str) -> str | None:
    entries = case.N * case.L * case.n_sample
    if entries > 2**30:
        return f"N * L * B = {entries} entries of noise, of which it holds several copies, are too many"
    return _package("pytopk")(case, device)


def _smooth_svm_fits(case: Case, device: str) -> str | None:
    terms = case.N * case.L * min(case.k + 3, 24) * 3  # of the largest rounds, kept for the backward
    return f"keeps about {4 * terms / 2**30:.0f} GiB for the backward" if terms > 2**30 else None


@dataclass(frozen=True)
class Peer:
    """A loss in the comparison.

    ``make(case)`` returns the loss of (scores, target), and ``fits(case, device)`` why it is left out, or None;
    ``compared`` says what is compared.
    """

    name: str
    make: Callable[[Case], Callable[[Tensor, Tensor], Tensor]]
    compared: str
    fits: Callable[[Case, str], str | None] = _anywhere


def _pytopk(case: Case) -> nn.Module:
    import pytopk

    return pytopk.BalNoisedTopK(case.k, case.epsilon, case.n_sample)


def _compiled(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    torch._dynamo.config.recompile_limit = 1000  # each shape gets a graph of its own, not a general one
    return torch.compile(F.cross_entropy, dynamic=False)


def _difftopk(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    import difftopk

    # Half on top-1 by softmax, half on top-k, among the m best scores: the form for many classes of the paper.
    weights = [1.0] if case.k == 1 else [0.5, *[0.0] * (case.k - 2), 0.5]
    m, made = min(case.L - 1, max(16, 2 * case.k)), {}

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        device = scores.device
        if device not in made:
            made[device] = difftopk.TopKCrossEntropyLoss(
                "odd_even", inverse_temperature=2.0, p_k=weights, n=case.L, m=m, distribution="cauchy", device=device
            )
        return made[device](scores, target)

    return loss


def _authors_svm(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    from difftopk.smooth_topk import Topk_Smooth_SVM

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        classes = torch.arange(case.L, device=scores.device)
        return Topk_Smooth_SVM(classes, k=case.k, tau=1.0)(scores, target).mean()

    return loss


def _entmax(loss: str) -> Callable[[Case], nn.Module]:
    def make(case: Case) -> nn.Module:
        import entmax

        return getattr(entmax, loss)()

    return make


def _liger(case: Case) -> nn.Module:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "topk_fast",
            lambda c: topk_fast.BalNoisedTopK(c.k, c.epsilon, c.n_sample),
            "this package's balanced loss, fresh noise in every call",
        ),
        Peer(
            "topk_fast imbalanced",
            lambda c: topk_fast.ImbalNoisedTopK(c.k, c.epsilon, 0.3, c.cls_num_list(), n_sample=c.n_sample),
            "this package's imbalanced loss, a margin for each class",
        ),
        Peer("pytopk", _pytopk, "the same balanced loss by its authors' package: the reference", _pytopk_fits),
        Peer("cross-entropy", lambda c: F.cross_entropy, "what most train with; eager mode, no top-K in it"),
        Peer("cross-entropy compiled", _compiled, "the same under torch.compile, one graph a shape"),
        Peer("focal", lambda c: FocalLoss(), "cross-entropy that turns to the hard rows; gamma 2; plain PyTorch"),
        Peer(
            "LDAM",
            lambda c: LDAMLoss(c.cls_num_list()),
            "cross-entropy with a margin for each class: the usual answer to long tails; plain PyTorch",
        ),
        Peer(
            "logit-adjusted",
            lambda c: LogitAdjustedCrossEntropy(c.cls_num_list()),
            "cross-entropy shifted by the classes' frequencies; tau 1; plain PyTorch",
        ),
        Peer(
            "smooth top-K SVM",
            lambda c: SmoothTopKSVM(c.k),
            "the smoothing of the top-K hinge before the noised one; all K-sets, tau 1; our PyTorch for its "
            "polynomials",
            _smooth_svm_fits,
        ),
        Peer(
            "smooth top-K SVM (authors')",
            _authors_svm,
            "the same by its authors' code, which travels with difftopk",
            lambda case, device: _package("difftopk")(case, device) or _smooth_svm_fits(case, device),
        ),
        Peer(
            "Yang & Koyejo",
            lambda c: topk_fast.BalNoisedTopK(c.k, 0.0, 1),
            "the calibrated top-K hinge without smoothing (ICML 2020): this package's with epsilon 0",
        ),
        Peer(
            "LapSum",
            lambda c: LapSumTopKLoss(c.k),
            "-ln of a deterministic soft top-K membership, by one full sort; alpha 1; plain PyTorch",
        ),
        Peer(
            "difftopk",
            _difftopk,
            "top-K cross-entropy through a differentiable sorting network over the 2 K (16 at least) best scores",
            _package("difftopk"),
        ),
        Peer("sparsemax", _entmax("SparsemaxLoss"), "a loss of sparse probabilities, by a sort", _package("entmax")),
        Peer("1.5-entmax", _entmax("Entmax15Loss"), "between softmax and sparsemax, by a sort", _package("entmax")),
        Peer("Liger", _liger, "Liger-Kernel's cross-entropy in Triton", _package("liger_kernel", only="cuda")),
    )
}
