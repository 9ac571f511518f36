"""The losses that topk_fast is compared with: from their own packages where there are some, else written from their papers.

``PEERS`` names each with a statement of what is compared. The classes here take scores [N, L] and a target [N] and
return the mean over the rows; they are plain PyTorch, as their authors' code is.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import topk_fast

NEVER = -1e30  # a logarithm of 0 whose sums and gradients stay finite


class FocalLoss(nn.Module):
    """-(1 - p_y)^gamma ln p_y with p = softmax(scores).

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, in its form for several classes.
    """

    def __init__(self, gamma: float = 2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        entropy = F.cross_entropy(scores, target, reduction="none")
        # Above 0, for the power of a gamma below 1 has an infinite slope there, times an entropy of 0.
        missing = (-torch.expm1(-entropy)).clamp_min(torch.finfo(entropy.dtype).tiny)  # 1 - p_y
        return missing.pow(self.gamma).mul(entropy).mean()


class LDAMLoss(nn.Module):
    """Cross-entropy of s (cos_j - [j = y] m_j) with m_j = max_m (min_i n_i / n_j)^(1/4): larger margins for rarer classes.

    ``scores`` are cosines. Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    NeurIPS 2019; its default max_m is 0.5 and s is 30.
    """

    def __init__(self, cls_num_list: list[int], max_m: float = 0.5, s: float = 30.0):
        super().__init__()
        count = torch.tensor(cls_num_list, dtype=torch.float32)
        self.register_buffer("margins", max_m * (count.min() / count) ** 0.25)
        self.s = s

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        margin = torch.zeros_like(scores).scatter_(1, target[:, None], self.margins[target, None].to(scores.dtype))
        return F.cross_entropy(self.s * (scores - margin), target)


class LogitAdjustedCrossEntropy(nn.Module):
    """Cross-entropy of s_j + tau ln(n_j / sum_i n_i).

    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021; consistent for the balanced error at tau = 1.
    """

    def __init__(self, cls_num_list: list[int], tau: float = 1.0):
        super().__init__()
        count = torch.tensor(cls_num_list, dtype=torch.float32)
        self.register_buffer("adjustment", tau * (count / count.sum()).log())

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scores + self.adjustment, target)


def log_symmetric_polynomials(x: Tensor, k: int) -> Tensor:
    """ln e_m(exp x) for m = 0 to k: [k + 1, N] of x [N, L]; e_m is the sum over all m-subsets of their products.

    The product of (1 + exp(x_j) t) over j, cut off above t^k, by halves: ceil(log2 L) rounds. It stays in log space,
    for e_k spans more orders of magnitude than float32 has.
    """
    factors = torch.stack([torch.zeros_like(x), x])  # [degree + 1, N, number of factors]
    while factors.shape[2] > 1:
        if factors.shape[2] % 2:
            one = factors.new_full((len(factors), len(x), 1), NEVER)
            one[0] = 0
            factors = torch.cat([factors, one], 2)
        a, b = factors.chunk(2, 2)
        degree = len(factors) - 1
        products = []
        for m in range(min(2 * degree, k) + 1):
            low, high = max(0, m - degree), min(degree, m)
            terms = [a[i] + b[m - i] for i in range(low, high + 1)]
            products.append(torch.logsumexp(torch.stack(terms), 0) if len(terms) > 1 else terms[0])
        factors = torch.stack(products)
    return factors[..., 0]


class SmoothTopKSVM(nn.Module):
    """tau ln(sum_A exp((alpha [y not in A] + sum_{j in A} s_j / k) / tau)) less the same sum over the A with y in A.

    A runs over all sets of k classes. With e_m the elementary symmetric polynomials of exp(s_j / (k tau)), j != y, that
    is tau softplus((alpha - s_y / k) / tau + ln e_k - ln e_{k-1}). Berrada, Zisserman, Kumar, "Smooth Loss Functions for
    Deep Top-k Classification", ICLR 2018.
    """

    def __init__(self, k: int = 5, tau: float = 1.0, alpha: float = 1.0):
        super().__init__()
        self.k, self.tau, self.alpha = k, tau, alpha

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        if not 1 <= self.k < scores.shape[1]:
            raise ValueError(f"k must be in [1, L - 1] = [1, {scores.shape[1] - 1}], got {self.k}")
        x = scores / (self.k * self.tau)
        true = x.gather(1, target[:, None])
        e = log_symmetric_polynomials(x.scatter(1, target[:, None], NEVER), self.k)
        return self.tau * F.softplus(self.alpha / self.tau + e[-1] - e[-2] - true[:, 0]).mean()


class _LapSumThreshold(torch.autograd.Function):
    """beta with sum_i F(z_i - beta) = k, F the distribution function of the standard Laplace law: [N, 1] of z [N, L]."""

    @staticmethod
    def forward(ctx, z: Tensor, k: int) -> Tensor:
        falling = z.sort(1, descending=True).values.double()  # float64: m - k below cancels
        above = torch.logcumsumexp(-falling, 1)  # ln sum_{i <= m} exp(-z_i)
        upto = torch.logcumsumexp(falling.flip(1), 1).flip(1)  # ln sum_{i >= m} exp(z_i)
        none = upto.new_full((len(z), 1), -torch.inf)
        below = torch.cat([upto[:, 1:], none], 1)
        place = torch.arange(1, z.shape[1] + 1, device=z.device)
        # The sum at beta = z_m grows with m: beta lies between z_m and z_{m + 1} for the last m where it is at most k.
        at = place - 0.5 * (falling + above).exp() + 0.5 * (below - falling).exp()
        m = (at <= k).sum(1, keepdim=True)
        log_a = torch.cat([none, above], 1).gather(1, m)
        log_b = torch.cat([upto, none], 1).gather(1, m)
        # There it is m - exp(beta) a / 2 + exp(-beta) b / 2 = k, a quadratic in exp(beta); the root without cancellation.
        excess = (m - k).double()
        root = (excess.square() + (log_a + log_b).exp()).sqrt()
        beta = torch.where(m >= k, (excess + root).log() - log_a, log_b - (root - excess).log()).to(z.dtype)
        ctx.save_for_backward(z, beta)
        return beta

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        z, beta = ctx.saved_tensors
        density = torch.exp(-(z - beta).abs())
        return grad * density / density.sum(1, keepdim=True), None


class LapSumTopKLoss(nn.Module):
    """-ln p_y with p_j = F((s_j - b) / alpha), F the Laplace distribution function and b such that sum_j p_j = k.

    The soft top-k membership of Struski et al., "LapSum - One Method to Differentiate Them All", ICML 2025, by one sort and
    closed forms, under a negative logarithm.
    """

    def __init__(self, k: int = 5, alpha: float = 1.0):
        super().__init__()
        self.k, self.alpha = k, alpha

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        if not 1 <= self.k < scores.shape[1]:
            raise ValueError(f"k must be in [1, L - 1] = [1, {scores.shape[1] - 1}], got {self.k}")
        z = scores / self.alpha
        distance = (z.gather(1, target[:, None]) - _LapSumThreshold.apply(z, self.k))[:, 0]
        tail = 0.5 * torch.exp(-distance.abs())
        return -torch.where(distance > 0, torch.log1p(-tail), -distance.abs() - 0.6931471805599453).mean()


@dataclass(frozen=True)
class Case:
    """One point of a benchmark: scores [N, L] of a dtype and a kind, and what the losses are called with."""

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
            return f"runs on {only} alone"
        return None if importlib.util.find_spec(name) else f"{name} is not installed"

    return fits


def _pytopk_fits(case: Case, device: str) -> str | None:
    entries = case.N * case.L * case.n_sample
    if entries > 2**30:
        return f"N * L * B = {entries} entries of noise, which it holds several times, are too many"
    return _package("pytopk")(case, device)


def _smooth_svm_fits(case: Case, device: str) -> str | None:
    terms = case.N * case.L * min(case.k + 3, 24) * 3  # of the largest rounds, kept for the backward
    return f"keeps about {4 * terms / 2**30:.0f} GiB for the backward" if terms > 2**30 else None


@dataclass(frozen=True)
class Peer:
    """A loss in the comparison.

    make: the loss of (scores, target) for a case. compared: what the comparison says. fits: why it is left out, or None.
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
            "the smoothing of the top-K hinge before the noised one; all K-sets, tau 1; our PyTorch for its polynomials",
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
