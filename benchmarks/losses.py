"""Losses of other papers, without a package of their own: plain PyTorch, as their authors' code is.

Each takes scores [N, L] and a target [N], and returns the mean over the rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        # Clamped above 0, where a gamma below 1 has an infinite slope, which would meet an entropy of 0.
        missing = (-torch.expm1(-entropy)).clamp_min(torch.finfo(entropy.dtype).tiny)  # 1 - p_y
        return missing.pow(self.gamma).mul(entropy).mean()


class LDAMLoss(nn.Module):
    """Cross-entropy of s (cos_j - [j = y] m_j) with m_j = max_m (min_i n_i / n_j)^(1/4).

    Rarer classes have larger margins; ``scores`` are cosines. Cao et al., "Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss", NeurIPS 2019; its default max_m is 0.5 and s is 30.
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

    They are the coefficients of the product of (1 + exp(x_j) t) over j, which is computed by halves in ceil(log2 L)
    rounds, without powers above t^k. It stays in log space, since e_k spans more orders of magnitude than float32 has.
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
    is tau softplus((alpha - s_y / k) / tau + ln e_k - ln e_{k-1}). Berrada, Zisserman, Kumar, "Smooth Loss Functions
    for Deep Top-k Classification", ICLR 2018.
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
