"""The losses that topk_fast is compared with, from their own packages where these exist, else from losses.py."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import SAMPLES, Case
from benchmarks.harness import Candidate
from benchmarks.losses import FocalLoss, LDAMLoss, LogitAdjustedCrossEntropy, SmoothTopKSVM
from topk_fast import BalNoisedTopK, SampledCrossEntropy


def make_pytopk(case: Case) -> nn.Module:
    import pytopk

    return pytopk.BalNoisedTopK(case.k, case.epsilon, case.n_sample)


def make_compiled(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    torch._dynamo.config.recompile_limit = 1000  # each shape gets a graph of its own, not a general one
    return torch.compile(F.cross_entropy, dynamic=False)


def make_difftopk(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    import difftopk

    # Half on top-1 by softmax, half on top-k, among the m best scores: the form for many classes of the paper.
    weights = [1.0] if case.k == 1 else [0.5, *[0.0] * (case.k - 2), 0.5]
    m = min(case.L - 1, max(16, 2 * case.k))
    return difftopk.TopKCrossEntropyLoss(
        "odd_even", inverse_temperature=2.0, p_k=weights, n=case.L, m=m, distribution="cauchy"
    )


def make_liger(case: Case) -> nn.Module:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


PEERS = {
    "topk_fast": Candidate(
        lambda c: BalNoisedTopK(c.k, c.epsilon, c.n_sample),
        "this package's balanced loss, fresh noise in every call",
        own=True,
    ),
    "sampled cross-entropy": Candidate(
        lambda c: SampledCrossEntropy(SAMPLES),
        f"this package's cross-entropy of {SAMPLES} draws from the softmax",
        own=True,
    ),
    "sampled cross-entropy, equal B": Candidate(
        lambda c: SampledCrossEntropy(c.n_sample), "the same with the B of the other losses", own=True
    ),
    "pytopk": Candidate(make_pytopk, "the same balanced loss by its authors' package: the reference"),
    "cross-entropy": Candidate(lambda c: F.cross_entropy, "what most train with; eager mode, no top-K in it"),
    "cross-entropy compiled": Candidate(make_compiled, "the same under torch.compile, one graph a shape"),
    "focal": Candidate(lambda c: FocalLoss(), "cross-entropy that turns to the hard rows; gamma 2; plain PyTorch"),
    "LDAM": Candidate(
        lambda c: LDAMLoss(c.count_classes()),
        "cross-entropy with a margin for each class: the usual answer to long tails; plain PyTorch",
    ),
    "logit-adjusted": Candidate(
        lambda c: LogitAdjustedCrossEntropy(c.count_classes()),
        "cross-entropy shifted by the classes' frequencies; tau 1; plain PyTorch",
    ),
    "smooth top-K SVM": Candidate(
        lambda c: SmoothTopKSVM(c.k),
        "the smoothing of the top-K hinge before the noised one; all K-sets, tau 1; our PyTorch for its polynomials",
    ),
    "Yang & Koyejo": Candidate(
        lambda c: BalNoisedTopK(c.k, 0.0, 1),
        "the calibrated top-K hinge without smoothing (ICML 2020): this package's with epsilon 0",
        own=True,
    ),
    "difftopk": Candidate(
        make_difftopk,
        "top-K cross-entropy through a differentiable sorting network over the 2 K (16 at least) best scores",
    ),
}
GPU_PEERS = {"Liger": Candidate(make_liger, "Liger-Kernel's cross-entropy in Triton")}
