r"""The functions: smoothed ranks, their excesses over the true class's score, and the losses that are made of these.

Source of all: Garcin, Servajean, Joly, Salmon, "Stochastic smoothing of the top-K calibrated hinge loss for deep
imbalanced classification", ICML 2022, https://proceedings.mlr.press/v162/garcin22a.html.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import autograd, backends, checks, loss_checks, losses, noise_checks, ops
from .criterion import Criterion, make_margins, make_offsets
from .linear import linear_noised_excess, linear_noised_topk_loss, linear_sampled_cross_entropy, linear_topk
from .request import Labels, LossRequest, Options, Place, Search

__all__ = [
    "bal_noised_topk_loss",
    "class_margins",
    "class_offsets",
    "imbal_noised_topk_loss",
    "linear_noised_excess",
    "linear_noised_topk_loss",
    "linear_sampled_cross_entropy",
    "linear_topk",
    "noised_excess",
    "noised_topk",
    "noised_topk_candidates",
    "noised_topk_loss",
    "sampled_cross_entropy",
]


def noised_topk(
    input: Tensor,
    k: int | Sequence[int],
    epsilon: float | Tensor = 1.0,
    n_sample: int = 5,
    dim: int = -1,
    *,
    noise: str = "normal",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    sampler: str = "auto",
    backend: str = "auto",
) -> Tensor:
    r"""Smoothed, differentiable k-th largest value along a dimension.

    .. math:: top_k = \frac1B \sum_{b=1}^{B} (s + \epsilon Z_b)_{[k]}, \qquad Z_b \in R^L

    Its gradient is, for each entry, the share of the samples in which that entry was the k-th largest.

    Args:
        input: scores, float32, float64, bfloat16 or float16; L entries along ``dim``. -inf masks an entry; a row
            with fewer than k finite scores has the value -inf, one with a NaN has NaN.
        k: rank, 1 to L; 1 is the maximum. A sequence of up to 32 ranks takes one search for all of them.
        epsilon: noise level, >= 0, in units of the scores; 0 gives the plain k-th largest value, except for the
            rounding of a mean of ``n_sample`` equal numbers. A floating-point tensor without dimensions on input's
            device may change between calls of a compiled or captured graph, as a schedule does; one that requires grad,
            and then is > 0, is learned.
        n_sample: number B of noise vectors, >= 1.
        dim: the dimension that is searched.
        noise: "normal", a standard normal law, or "gumbel", a Gumbel law less its mean. With the latter and rank 1 the
            expected value is ``logsumexp(input / epsilon) * epsilon`` and the expected gradient
            ``softmax(input / epsilon)``.
        seed: fixes the noise: an int, ``-2**63`` to ``2**64 - 1`` (negative ones by two's complement), or an int64
            tensor without dimensions on input's device. None draws it from ``generator``.
        generator: source of the seed, on input's device; None is torch's default one.
        sampler: "thinned" draws noise only for entries that can matter, "dense" for all of them; both are exact and
            differ in their noise. "auto" is "thinned".
        backend: "auto", "cpp", "torch", "triton" or "cuda"; the same seed gives the same bits in all.

    Returns:
        Tensor of input's shape without ``dim``, and with a last dimension for the ranks if ``k`` is a sequence; float64
        for float64 scores, else float32.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import noised_topk
        >>> noised_topk(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), k=2, epsilon=0.0)
        tensor([3.])
        >>> noised_topk(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), k=[1, 3], epsilon=0.0)
        tensor([[4., 2.]])

    References:
        The estimator is that of Garcin, Servajean, Joly, Salmon, "Stochastic smoothing of the top-K calibrated hinge
        loss for deep imbalanced classification", ICML 2022, https://proceedings.mlr.press/v162/garcin22a.html.
    """
    options = Options(epsilon, n_sample, noise, seed, generator, sampler, backend)
    checks.check_scores(input)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a tensor without dimensions")
    rows = input.movedim(checks.check_dimension(dim, input.dim()), -1)
    ranks = checks.check_ranks(k, 1, checks.check_length(rows.shape[-1]), "L")
    flat = losses.flatten(rows)
    wanted = noise_checks.check_noise(options, ranks, input.device)
    search = Search(flat, wanted, Labels(None), backends.resolve(backend, flat, wanted.k))
    return losses.shape_ranks(autograd.differentiable_excess(search), rows.shape[:-1], k)


def noised_excess(
    input: Tensor,
    target: Tensor,
    k: int | Sequence[int],
    epsilon: float | Tensor = 1.0,
    n_sample: int = 5,
    *,
    noise: str = "normal",
    exclude_target: bool = False,
    ignore_index: int = -100,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""How far the smoothed (K+1)-th largest score exceeds the true class's score: what top-K losses are made of.

    .. math:: e_K(s, y) = top_{K+1}(s) - s_y, \qquad
              \frac{\partial e_K}{\partial s_j} = \frac{\#\{b : c_b = j\}}{B} - [j = y]

    with :math:`top_{K+1}` the value of :func:`noised_topk` for rank K + 1, and :math:`c_b` the class at that rank in
    sample b. The gradient has at most B + 1 entries that are not zero in a row. With ``noise="gumbel"``, ``k=0`` and
    ``epsilon=1`` the excess is a sampled cross-entropy: its expected value and gradient are those of
    :func:`torch.nn.functional.cross_entropy` with ``reduction="none"``.

    Args:
        input, target: as in :func:`noised_topk_loss`.
        k: the K of top-K accuracy, 0 to L - 1, or a sequence of up to 32 of them, which takes one search.
        epsilon, n_sample, noise: as in :func:`noised_topk`.
        exclude_target: ranks only the other classes: the excess of the K-th best of them, so K is 1 to L - 1.
        ignore_index: rows with this target have excess 0 and no gradient.
        seed, generator, sampler, backend: as in :func:`noised_topk`.
        process_group: as in :func:`noised_topk_loss`.

    Returns:
        Tensor of target's shape, and with a last dimension for the Ks if ``k`` is a sequence; float64 for float64
        scores, else float32. A row with a NaN score has NaN excesses and a NaN gradient.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import noised_excess
        >>> logits = torch.tensor([[2.0, 1.5, -3.0], [7.5, 4.0, -1.5]])
        >>> noised_excess(logits, torch.tensor([0, 2]), k=[0, 1], epsilon=0.0)
        tensor([[ 0.0000, -0.5000],
                [ 9.0000,  5.5000]])

    References:
        For normal noise Garcin et al., see :func:`noised_topk`; for Gumbel noise see :func:`sampled_cross_entropy`.
    """
    options = Options(epsilon, n_sample, noise, seed, generator, sampler, backend, process_group)
    return losses.evaluate(input, target, LossRequest(k, options, None, ignore_index, exclude_target))


def noised_topk_loss(
    input: Tensor,
    target: Tensor,
    k: int | Sequence[int] = (1, 5),
    epsilon: float | Tensor = 1.0,
    n_sample: int = 5,
    *,
    noise: str = "normal",
    link: str = "hinge",
    temperature: float = 1.0,
    margin: float | Tensor = 1.0,
    scale: float = 1.0,
    rank_weights: Sequence[float] | None = None,
    exclude_target: bool = False,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""The family of the noised top-K losses: one K or several, and how far each is missed, through a link.

    .. math:: \ell(s, y) = w_y \sum_m r_m \cdot scale \cdot link(m_y + e_{K_m}(s, y)), \qquad
              e_K(s, y) = top_{K+1}(s) - s_y

    where :math:`top_{K+1}` is the value of :func:`noised_topk` for rank K + 1. One search finds all ranks. For top-1
    and top-5 accuracy at once start from ``k=(1, 5), link="softplus", exclude_target=True, margin=0.0, epsilon=1.0``:
    every row keeps a gradient, also where the true class is safely among the first K.

    Args:
        input: logits [N, L], [L], or [N, L, d1, ...] as for :class:`torch.nn.CrossEntropyLoss`; float32, float64,
            bfloat16 or float16.
        target: true classes, int64 in [0, L - 1] or ``ignore_index``: [N], no dimension, or [N, d1, ...].
        k: the K of top-K accuracy, 0 to L - 1, or a sequence of up to 32 of them.
        epsilon: noise level, >= 0, in units of the logits; a number, or a tensor as in :func:`noised_topk`. 1.0 suits
            logits of a plain linear layer.
        n_sample: number B of noise vectors, >= 1. The paper uses 5 and finds little gain beyond.
        noise: the law, "normal" or "gumbel", as in :func:`noised_topk`.
        link: "hinge" :math:`\max(0, x)`, "softplus" :math:`\tau \ln(1 + e^{x / \tau})`, or "identity" x.
        temperature: :math:`\tau` of the softplus, > 0, in units of the logits; small ones approach the hinge.
        margin: m, a number, or margins [L] on input's device, see :func:`class_margins`; constants.
        scale: factor of the links, > 0.
        rank_weights: r, a number >= 0 for each of the Ks; None is 1 for each, the sum over the Ks.
        exclude_target: ranks only the other classes: e is then the excess of the K-th best of them, so K is 1 to L - 1.
        offset: [L] on input's device, added to the logits before all else, and rounded to their dtype, as logit
            adjustment does for long tails, see :func:`class_offsets`; constants. Predict without it.
        weight: w, weights [L] of the classes on input's device, as in :class:`torch.nn.CrossEntropyLoss`; constants.
            Weights of single rows: ``(row_weights * noised_topk_loss(..., reduction="none")).mean()``.
        reduction: "mean" over the rows that are not ignored (with ``weight`` the sum divided by that of their weights),
            "sum" or "none".
        ignore_index: rows with this target have loss 0 and no gradient.
        generator, seed, sampler, backend: as in :func:`noised_topk`.
        process_group: ranks over which the classes are sharded: ``input`` holds this rank's, contiguous in the order of
            ranks, any number of them; target, margins, weight, offset and all else are the same on all ranks, and the
            seed is rank 0's. Every rank returns the loss over all classes and has the gradient of its own. A DTensor
            sharded along its classes needs no process_group and gets a DTensor back.

    Returns:
        A tensor without dimensions, or with target's shape for ``reduction="none"``; float64 for float64 logits,
        else float32. NaN in a row of logits makes its loss and gradient NaN.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import noised_topk_loss
        >>> logits = torch.tensor([[2.0, 1.5, -3.0], [7.5, 4.0, -1.5]])
        >>> noised_topk_loss(logits, torch.tensor([0, 2]), k=(0, 1), epsilon=0.0, reduction="none")
        tensor([ 1.5000, 16.5000])

    References:
        One K, normal noise and the hinge: Garcin et al., see :func:`bal_noised_topk_loss`. Gumbel noise and K = 0: see
        :func:`sampled_cross_entropy`. Offsets: see :func:`class_offsets`.
    """
    criterion = Criterion(link, temperature, margin, scale, rank_weights, weight, reduction)
    options = Options(epsilon, n_sample, noise, seed, generator, sampler, backend, process_group)
    return losses.evaluate(input, target, LossRequest(k, options, criterion, ignore_index, exclude_target, offset))


def sampled_cross_entropy(
    input: Tensor,
    target: Tensor,
    n_sample: int = 16,
    *,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""Cross-entropy whose gradient has at most B + 1 entries a row, exact in expectation.

    .. math:: \ell(s, y) = \frac1B \sum_{b=1}^{B} \max_j (s_j + G_{bj}) - s_y, \qquad
              E\,\ell(s, y) = \log \sum_j e^{s_j} - s_y

    with G independent Gumbel noise less its mean. The class of each maximum is a draw from the softmax (the
    Gumbel-max trick), so a row's gradient is ``counts / B - onehot(target)``: its expected value is cross-entropy's,
    ``softmax - onehot``. The label itself is such a draw where the model is calibrated, so the samples add 1/B of the
    variance that the gradient has already: B = 16 costs about what a batch smaller by 6 % does.

    A training loss only: the value of one call is noisy, with a standard deviation of :math:`\pi / \sqrt{6 B}` a row
    (0.32 for B = 16), and can be negative. Evaluate with :func:`torch.nn.functional.cross_entropy`. It is not the
    sampled softmax of large vocabularies: there is no proposal distribution, and no bias. With a linear layer use
    :func:`linear_sampled_cross_entropy`, which saves two of three matmuls.

    Args:
        input, target, offset, weight, reduction, ignore_index, process_group: as in :func:`noised_topk_loss`.
        n_sample: number B of draws from the softmax, >= 1.
        generator, seed, sampler, backend: as in :func:`noised_topk`.

    Returns:
        As :func:`noised_topk_loss`.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import sampled_cross_entropy
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(100_000, 3)
        >>> target = torch.zeros(100_000, dtype=torch.int64)
        >>> loss = sampled_cross_entropy(logits, target, n_sample=1, seed=0)
        >>> exact = torch.nn.functional.cross_entropy(logits, target)
        >>> bool((loss - exact).abs() < 4 * 1.2826 / 100_000**0.5)
        True

    References:
        Gumbel, "Statistical theory of extreme values and some practical applications", 1954; Maddison, Tarlow, Minka,
        "A* sampling", NeurIPS 2014.
    """
    options = Options(1.0, n_sample, "gumbel", seed, generator, sampler, backend, process_group)
    criterion = Criterion("identity", margin=0.0, weight=weight, reduction=reduction)
    return losses.evaluate(input, target, LossRequest(0, options, criterion, ignore_index, offset=offset))


def bal_noised_topk_loss(
    input: Tensor,
    target: Tensor,
    k: int,
    epsilon: float | Tensor = 1.0,
    n_sample: int = 5,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""Balanced noised top-K loss: a hinge of the smoothed (K+1)-th largest score against the true class's score.

    .. math:: \ell(s, y) = \max(0,\; 1 + top_{K+1}(s) - s_y)

    with :math:`top_{K+1}` the value of :func:`noised_topk` for rank K + 1 over all classes, the true one too. With
    ``epsilon=0`` it is the top-K calibrated hinge of Yang & Koyejo. It is :func:`noised_topk_loss` of one K with its
    default link, margin and scale.

    Args:
        input, target, epsilon, n_sample, reduction, ignore_index, process_group: as in :func:`noised_topk_loss`.
        k: the K of top-K accuracy, 0 to L - 1.
        generator, seed, sampler, backend: as in :func:`noised_topk`.

    Returns:
        As :func:`noised_topk_loss`.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import bal_noised_topk_loss
        >>> logits = torch.tensor([[2.0, 1.5, -3.0], [7.5, 4.0, -1.5]])
        >>> bal_noised_topk_loss(logits, torch.tensor([0, 2]), k=1, epsilon=0.0, reduction="none")
        tensor([0.5000, 6.5000])

    References:
        Garcin, Servajean, Joly, Salmon, "Stochastic smoothing of the top-K calibrated hinge loss for deep imbalanced
        classification", ICML 2022, https://proceedings.mlr.press/v162/garcin22a.html.
        The hinge without noise: Yang, Koyejo, "On the consistency of top-k surrogate losses", ICML 2020.
    """
    options = Options(epsilon, n_sample, "normal", seed, generator, sampler, backend, process_group)
    loss = LossRequest(k, options, Criterion(reduction=reduction), ignore_index, several=False)
    return losses.evaluate(input, target, loss)


def imbal_noised_topk_loss(
    input: Tensor,
    target: Tensor,
    k: int,
    margins: Tensor,
    epsilon: float | Tensor,
    scale: float = 50,
    n_sample: int = 5,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sampler: str = "auto",
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    r"""Noised top-K loss with a margin for each class, larger for rarer ones; for long-tailed data.

    .. math:: \ell(s, y) = \max(0,\; scale \, (m_y + top_{K+1}(s) - s_y))

    Args:
        input, target, n_sample, reduction, ignore_index: as in :func:`noised_topk_loss`.
        k: the K of top-K accuracy, 0 to L - 1.
        margins: margins m [L] on input's device, see :func:`class_margins`; constants. A number is the same for all.
        epsilon: noise level, >= 0, in units of the logits; for cosine logits some 0.01 to 0.1. A tensor as in
            :func:`noised_topk`.
        scale: factor of the hinge, > 0. The default assumes cosine logits, in [-1, 1], as
            :class:`topk_fast.NormedLinear` makes them; use 1 for logits that are not normalised.
        generator, seed, sampler, backend: as in :func:`noised_topk`.
        process_group: as in :func:`noised_topk_loss`.

    Returns:
        As :func:`noised_topk_loss`.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import class_margins, imbal_noised_topk_loss
        >>> margins = class_margins([16, 1, 81], max_m=0.3)
        >>> logits = torch.tensor([[0.5, 0.25, -0.5]])
        >>> imbal_noised_topk_loss(logits, torch.tensor([1]), 1, margins, epsilon=0.0, scale=10)
        tensor(3.)

    References:
        Garcin, Servajean, Joly, Salmon, "Stochastic smoothing of the top-K calibrated hinge loss for deep imbalanced
        classification", ICML 2022, https://proceedings.mlr.press/v162/garcin22a.html.
    """
    options = Options(epsilon, n_sample, "normal", seed, generator, sampler, backend, process_group)
    criterion = Criterion(margin=margins, scale=scale, reduction=reduction)
    return losses.evaluate(input, target, LossRequest(k, options, criterion, ignore_index, several=False))


def class_margins(cls_num_list: Sequence[int] | Tensor, max_m: float) -> Tensor:
    r"""Margins that grow as a class gets rarer: the rule of LDAM, which the imbalanced loss uses.

    .. math:: m_j = max\_m \cdot n_j^{-1/4} / \max_i n_i^{-1/4}

    Args:
        cls_num_list: number of training examples n_j of each class, all positive; L of them.
        max_m: margin of the rarest class, >= 0; in units of the logits.

    Returns:
        float32 tensor [L], on the device of ``cls_num_list`` if that is a tensor, else on torch's default device.

    Raises:
        TypeError, ValueError: counts that are not a list of positive numbers, or a negative ``max_m``.

    Example:
        >>> from topk_fast.functional import class_margins
        >>> class_margins([16, 1, 81], max_m=0.3)
        tensor([0.1500, 0.3000, 0.1000])

    References:
        Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019.
    """
    max_m = checks.check_not_negative("max_m", max_m)
    device = cls_num_list.device if isinstance(cls_num_list, Tensor) else None
    return make_margins(loss_checks.check_counts(cls_num_list), max_m, device)


def class_offsets(cls_num_list: Sequence[int] | Tensor, tau: float = 1.0) -> Tensor:
    r"""Offsets of logit adjustment: frequent classes get a head start in training that they lack in prediction.

    .. math:: offset_j = \tau \ln (n_j / \sum_i n_i)

    Args:
        cls_num_list: number of training examples n_j of each class, all positive; L of them.
        tau: factor, >= 0; 1 is consistent for the balanced error of a cross-entropy.

    Returns:
        float32 tensor [L], on the device of ``cls_num_list`` if that is a tensor, else on torch's default device.

    Raises:
        TypeError, ValueError: counts that are not a list of positive numbers, or a negative ``tau``.

    Example:
        >>> from topk_fast.functional import class_offsets
        >>> class_offsets([3, 1])
        tensor([-0.2877, -1.3863])

    References:
        Menon et al., "Long-tail learning via logit adjustment", ICLR 2021.
    """
    tau = checks.check_not_negative("tau", tau)
    device = cls_num_list.device if isinstance(cls_num_list, Tensor) else None
    return make_offsets(loss_checks.check_counts(cls_num_list), tau, device)


def noised_topk_candidates(
    scores: Tensor,
    k: int,
    epsilon: float | Tensor = 1.0,
    n_sample: int = 5,
    *,
    noise: str = "normal",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    first_class: int = 0,
    sampler: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""The k best noised scores of every row and sample, best first; no gradient.

    .. math:: v_{n,b,1} \ge \dots \ge v_{n,b,k}, \quad \text{the largest of } s_n + \epsilon Z_{n,b}

    Losses over chunks or shards of classes merge these lists: search each slice with its ``first_class`` and the same
    seed, then keep the k best of all. A slice may have fewer than k classes.

    Args:
        scores: [N, L], a slice of rows and classes; dtypes as in :func:`noised_topk`.
        k: length of each list, >= 1. Where fewer than k scores are finite it ends in (-inf, -1).
        epsilon, n_sample, noise, seed, generator, backend: as in :func:`noised_topk`.
        first_row, first_class: global row and class of ``scores[0, 0]``: draws belong to global ones.
        sampler: as in :func:`noised_topk`; only with "dense" the merged lists do not depend on the slices, bit for
            bit (with "thinned" they do not in distribution).

    Returns:
        Values [N, n_sample, k], float64 for float64 scores, else float32, and global classes, int64. Rows with a NaN
        hold NaN and -2.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, out of range, or not fitting the others.
        RuntimeError: a named backend that is not available.

    Example:
        >>> import torch
        >>> from topk_fast.functional import noised_topk_candidates
        >>> values, classes = noised_topk_candidates(torch.tensor([[4.0, 1.0, 3.0]]), 2, epsilon=0.0, n_sample=1)
        >>> values, classes
        (tensor([[[4., 3.]]]), tensor([[[0, 2]]]))

        Slices of classes, and their merged lists:

        >>> scores, options = torch.randn(4, 1000), {"k": 3, "epsilon": 0.5, "seed": 1, "sampler": "dense"}
        >>> whole = noised_topk_candidates(scores, **options)
        >>> slices = [noised_topk_candidates(scores[:, i : i + 500], first_class=i, **options) for i in (0, 500)]
        >>> values, classes = (torch.cat(lists, dim=2) for lists in zip(*slices))
        >>> best = values.topk(3, dim=2)
        >>> torch.equal(best.values, whole[0]), torch.equal(classes.gather(2, best.indices), whole[1])
        (True, True)

    References:
        Garcin et al., see :func:`noised_topk`.
    """
    epsilon = epsilon.detach() if isinstance(epsilon, Tensor) else epsilon
    options = Options(epsilon, n_sample, noise, seed, generator, sampler, backend)
    checks.check_scores(scores, "scores")
    if scores.dim() != 2:
        raise ValueError(f"scores must be [N, L], got shape {list(scores.shape)}")
    n_classes = checks.check_length(scores.shape[1])
    if n_classes == 0:
        raise ValueError("scores must have at least one class, got shape " + str(list(scores.shape)))
    k = checks.check_integer("k", k, 1, 2**31 - 1)
    place = Place(
        checks.check_integer("first_row", first_row, 0, 2**32 - 1),
        checks.check_integer("first_class", first_class, 0, 2**31 - 1 - n_classes, "2**31 - 1 - L"),
    )
    wanted = noise_checks.check_noise(options, (k,), scores.device)
    return ops.kernel("candidates", backends.resolve(backend, scores, k))(scores.detach(), *wanted, *place)
