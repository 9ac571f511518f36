r"""The maths in plain PyTorch: the losses, the sampler and the gradient. It is also the backend named ``torch``.

Scores :math:`s \in R^L` of one row, noise :math:`Z_b \sim N(0, I_L)` for b = 1..B, level :math:`\epsilon`:

.. math::
    v_b, c_b &= \text{value and class of the } k\text{-th largest of } s + \epsilon Z_b, \qquad
    top = \frac{1}{B} \sum_b v_b \\
    \ell(s, y) &= \sum_m r_m \, scale \cdot link(m_y + top_m - s_y), \qquad k_m = K_m + 1 \\
    \partial \ell / \partial s_j &= \sum_m r_m \, scale \cdot link' \left(\#\{b : c_{b,m} = j\} / B - [j = y]\right)

Source: Garcin, Servajean, Joly, Salmon, "Stochastic smoothing of the top-K calibrated hinge loss for deep imbalanced
classification", ICML 2022. :func:`smoothed_value` and :func:`loss` are that, differentiable, for any noise; below
them stands the search for (v_b, c_b) that draws noise only where it can matter, bit-identical to the kernels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import noise
from .request import Labels, Noise, Place, Slice

_START = Place()
_FEW_SAMPLES = 128  # whose classes are counted by comparing all pairs
_BUDGET = 1 << 22  # entries of the largest temporary, of which a dozen live at once


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 scores, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def smoothed_value(scores: Tensor, z: Tensor, k: int, epsilon: float) -> Tensor:
    """Mean over b of the k-th largest of ``scores + epsilon * z[b]``; scores [N, L], z [N, B, L] -> [N]."""
    return mean((scores[:, None] + epsilon * z).topk(k, dim=-1).values[..., -1])


def mean(values: Tensor) -> Tensor:
    """Mean over samples [N, B] -> [N]: added in sample order, then one product with 1 / B."""
    total = values[:, 0]
    for b in range(1, values.shape[1]):
        total = total + values[:, b]
    return total * (1.0 / values.shape[1])


def loss(
    tops: Tensor,
    true_score: Tensor,
    margin: Tensor | float = 1.0,
    scale: float = 1.0,
    link: str = "hinge",
    temperature: float = 1.0,
    rank_weights: Sequence[float] | None = None,
) -> Tensor:
    """Sum over m of ``r_m * scale * link(margin + (tops[m] - true_score))``, NaN where any of them is NaN.

    tops is [N, M], true_score [N], margin [N] or a number; the result is [N].
    """
    x = (margin + (tops.t() - true_score)).t()
    if link == "hinge":
        x = torch.where(x <= 0, torch.zeros_like(x), x)
    elif link == "softplus":  # in the form that does not overflow
        x = temperature * (torch.log1p(torch.exp(-(x / temperature).abs())) + (x / temperature).clamp(min=0))
    weights = torch.ones_like(x[0]) if rank_weights is None else x.new_tensor(rank_weights)
    return (scale * x * weights).sum(1)


def dense_noise(
    rows: Tensor, n_classes: int, n_sample: int, seed: Tensor, first_class: int = 0, law: int = noise.NORMAL
) -> Tensor:
    """The contract's draws for every class: global rows [N] -> float32 [N, n_sample, n_classes]."""
    classes = torch.arange(first_class, first_class + n_classes, device=rows.device)
    return _draws(classes.expand(rows.shape[0], -1), rows, n_sample, seed, law)


def _draws(classes: Tensor, rows: Tensor, n_sample: int, seed: Tensor, law: int) -> Tensor:
    quads = torch.arange(-(-n_sample // 4), device=classes.device)
    words = noise.philox(classes[:, None], rows[:, None, None], quads[:, None], torch.zeros_like(quads[:1]), seed)
    every = torch.stack(torch.broadcast_tensors(*words), dim=2).flatten(1, 2)  # [N, 4 * quads, C]
    return noise.LAWS[law].draw(every[:, :n_sample])


def cut_of(scores: Tensor, k: int, law: int = noise.NORMAL) -> Tensor:
    """The score [N] above which a class gets draws of its own, a statistic of clean scores [N, L] without NaN.

    ``noise.plan`` says which statistic. It is -inf (every class) where that is +inf, and where fewer than k classes lie
    above it and fewer than ``noise.wanted_contenders`` scores are finite: the walk over the others might find too few.
    """
    n_classes = scores.shape[1]
    chosen = noise.plan(n_classes, k, law)
    if chosen is None:
        return scores.new_full(scores.shape[:1], -math.inf)
    group, stride, rank = chosen
    padded = torch.nn.functional.pad(scores, (0, -n_classes % group), value=-math.inf)
    maxima = padded.unflatten(1, (-1, group))[:, ::stride].amax(2)  # [N, groups looked at]
    level = maxima.topk(rank, dim=1).values[:, -1]
    few = (scores > level[:, None]).sum(1) < k
    masked = (scores > -math.inf).sum(1) < noise.wanted_contenders(n_classes, k, law)
    return level.masked_fill((level == math.inf) | (few & masked), -math.inf)


class _Slice(NamedTuple):
    """Some rows of a slice of classes, without NaN, as the steps of the search see them."""

    scores: Tensor  # [N, L] in the arithmetic's dtype
    cut: Tensor  # [N]
    rows: Tensor  # [N]: global numbers
    epsilon: Tensor | float
    noise: Noise
    first_class: int


def candidates(scores: Tensor, wanted: Noise, place: Place = _START) -> tuple[Tensor, Tensor]:
    """The k best noised scores and their classes [N, n_sample, k], best first, (-inf, -1) where there are fewer.

    Rows with a NaN hold NaN and the class id -2.
    """
    n_rows, n_classes = scores.shape
    k, first_row = wanted.k, place.first_row
    values, classes = empty_lists(scores, k, wanted.n_sample)
    epsilon = wanted.epsilon if wanted.schedule is None else wanted.schedule.to(values.dtype)
    step = max(1, _BUDGET // (n_classes + 64 * k * wanted.n_sample))
    for start in range(0, n_rows, step):
        part = slice(start, min(start + step, n_rows))
        wide = scores[part].to(values.dtype)
        bad = wide.isnan().any(1)
        wide = wide.masked_fill(bad[:, None], 0.0)
        rows = torch.arange(first_row + part.start, first_row + part.stop, device=scores.device) & 0xFFFFFFFF
        cut = wide.new_full(wide.shape[:1], -math.inf) if wanted.dense else cut_of(wide, k, wanted.law)
        here = _Slice(wide, cut, rows, epsilon, wanted, place.first_class)
        best = _draw((values[part], classes[part]), here)
        best = _walk(best, here)
        values[part] = best[0].masked_fill(bad[:, None, None], math.nan)
        classes[part] = best[1].masked_fill(bad[:, None, None], -2)
    return values, classes


def empty_lists(scores: Tensor, k: int, n_sample: int) -> tuple[Tensor, Tensor]:
    """Values -inf and classes -1 [N, n_sample, k]."""
    values = scores.new_full((scores.shape[0], n_sample, k), -math.inf, dtype=arithmetic(scores.dtype))
    return values, torch.full_like(values, -1, dtype=torch.int64)


def merge(values: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of lists that stand one behind the other, in the order of their classes: [N, B, m] -> [N, B, k]."""
    # A stable sort keeps the lower class first among equals; adding 0 makes -0 equal to +0 in radix sorts.
    order = (values + 0.0).sort(dim=2, descending=True, stable=True).indices[..., :k]
    return values.gather(2, order), classes.gather(2, order)


def _draw(best, here: _Slice):
    """Merges every class above the cut into the k best, some columns of the ragged list of contenders at a time."""
    values, classes = best
    scores = here.scores
    n_rows, n_sample, k = values.shape
    row, column = (scores > here.cut[:, None]).nonzero(as_tuple=True)  # ascending classes within a row
    count = torch.bincount(row, minlength=n_rows)
    place = torch.arange(row.shape[0], device=row.device) - (count.cumsum(0) - count)[row]
    step = max(k, _BUDGET // (n_rows * n_sample))
    for start in range(0, int(count.max()) if n_rows else 0, step):
        chosen = (place >= start) & (place < start + step)
        width = min(step, int(count.max()) - start)
        at = (row[chosen], place[chosen] - start)
        index = column.new_zeros((n_rows, width)).index_put(at, column[chosen] + here.first_class)
        clean = scores.new_full((n_rows, width), -math.inf).index_put(at, scores[row[chosen], column[chosen]])
        z = _draws(index, here.rows, n_sample, here.noise.seed, here.noise.law).to(scores.dtype)
        drawn = clean[:, None] + z * here.epsilon
        values = torch.cat([values, drawn], dim=2)
        classes = torch.cat([classes, index[:, None].expand(-1, n_sample, -1)], dim=2)
        values, classes = merge(values, classes, k)
        classes = classes.masked_fill(values == -math.inf, -1)
    return values, classes


def _walk(best, here: _Slice):
    """Merges the other classes: the arrivals of one Poisson process a (row, sample), at falling levels of noise.

    Every class has points at levels z with mean measure -ln F(z) above z; its highest one has the distribution F.
    Together they are a process of rate L on uniform classes, walked until ``cut + epsilon * z`` cannot exceed the
    k-th best.
    """
    values, classes = (x.flatten(0, 1) for x in best)  # a lane is a (row, sample)
    scores, level_of = here.scores, noise.LAWS[here.noise.law].level
    n_sample, n_classes = best[0].shape[1], scores.shape[1]
    row = torch.arange(scores.shape[0], device=scores.device).repeat_interleave(n_sample)
    sample = torch.arange(n_sample, device=scores.device).repeat(scores.shape[0])
    lanes = (here.cut[row] > -math.inf).nonzero().flatten()
    sums = torch.zeros_like(row)
    done, pairs = 0, 8
    while lanes.numel():
        counter = torch.arange(done, done + pairs, device=row.device)
        r, b = row[lanes], sample[lanes]
        stream = torch.full_like(b[:1, None], 1 + here.first_class)
        w = noise.philox(counter, here.rows[r][:, None], b[:, None], stream, here.noise.seed)
        gaps = torch.stack([noise.gap(w[0]), noise.gap(w[2])], dim=2).flatten(1).to(torch.int64)
        times = sums[lanes, None] + gaps.cumsum(1)  # [lanes, 2 * pairs]
        drawn = torch.stack([w[1], w[3]], dim=2).flatten(1) * n_classes >> 32
        shift = level_of(noise.arrival_time(times, n_classes)).to(scores.dtype) * here.epsilon
        v, c, cut = values[lanes], classes[lanes], here.cut[r]
        clean = scores[r[:, None], drawn]
        walking = torch.ones_like(lanes, dtype=torch.bool)
        for j in range(2 * pairs):
            walking = walking & (cut + shift[:, j] > v[:, -1])
            value, name = clean[:, j] + shift[:, j], drawn[:, j] + here.first_class
            behind = (value[:, None] > v) | ((value[:, None] == v) & (name[:, None] < c))  # [lanes, k]
            new = walking & (clean[:, j] <= cut) & behind[:, -1] & ~(c == name[:, None]).any(1)
            first = behind & ~torch.nn.functional.pad(behind, (1, -1))  # its place in the list
            behind, first = behind & new[:, None], first & new[:, None]
            v = torch.where(first, value[:, None], torch.where(behind, v.roll(1, 1), v))
            c = torch.where(first, name[:, None], torch.where(behind, c.roll(1, 1), c))
        values, classes = values.index_put((lanes,), v), classes.index_put((lanes,), c)
        sums = sums.index_put((lanes,), times[:, -1])
        lanes = lanes[walking]
        done += pairs
    return values.view_as(best[0]), classes.view_as(best[1])


def excess(scores: Tensor, wanted: Noise, labels: Labels) -> tuple[Tensor, Tensor]:
    """Excesses [N, M] of the ranks over the true class's score, and the classes [N, n_sample, M] at these ranks.

    Without a target they are the smoothed values themselves.
    """
    true_score = None
    if labels.target is not None:
        assert_known(labels.target, scores.shape[1], labels.ignore_index)
        true_score = own_scores(scores, labels.target, 0)
    return excess_of(*candidates(scores, wanted), true_score, wanted.ranks, labels)


def excess_of(
    values: Tensor, classes: Tensor, true_score: Tensor | None, ranks: Sequence[int], labels: Labels
) -> tuple[Tensor, Tensor]:
    """What :func:`excess` returns, from the k best of every sample [N, B, k] and the true class's score [N].

    Rank r takes the r-th entry of a list. Where only the other classes are ranked it takes the (r - 1)-th, or the
    next one if the true class stands before that. All class ids of a row are -2 where one of its excesses is NaN, and
    -1 where its target is ``ignore_index``.
    """
    target, ignore_index, exclude_target = labels

    def pick(rank):
        value, class_ = values[..., rank - 1], classes[..., rank - 1]
        if not exclude_target:
            return value, class_
        ahead = (classes[..., : rank - 1] == target[:, None, None]).any(2)  # [N, B]: the true class stands before
        return torch.where(ahead, value, values[..., rank - 2]), torch.where(ahead, class_, classes[..., rank - 2])

    values, classes = (torch.stack(picked, dim=2) for picked in zip(*map(pick, ranks)))  # [N, B, M]
    result = mean(values)
    if true_score is not None:
        result = result - true_score[:, None]
    classes = classes.masked_fill(result.isnan().any(1)[:, None, None], -2)
    if target is not None:
        ignored = target == ignore_index
        result = result.masked_fill(ignored[:, None], 0.0)
        classes = classes.masked_fill(ignored[:, None, None], -1)
    return result, classes


def assert_known(target: Tensor, n_classes: int, ignore_index: int) -> None:
    """Raises on the CPU, and stops a GPU without waiting for it, where a label is neither a class nor ignored."""
    known = (target == ignore_index) | ((target >= 0) & (target < n_classes))
    torch._assert_async(known.all(), "target out of bounds")


def own_scores(scores: Tensor, target: Tensor, first_class: int) -> Tensor:
    """The true class's score [N] where this slice of classes holds it, elsewhere 0; float64 or float32."""
    place = target - first_class
    inside = (place >= 0) & (place < scores.shape[1])
    if scores.shape[1] == 0:
        return torch.zeros_like(target, dtype=arithmetic(scores.dtype))
    picked = scores.gather(1, place.clamp(0, scores.shape[1] - 1)[:, None])[:, 0]
    return picked.masked_fill(~inside, 0).to(arithmetic(scores.dtype))


def entries(grad: Tensor, classes: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """Classes and values [N, J] of the gradient's entries, and which exist; J is B * M + 1, or B * M without a target.

    The value at class j is the sum over m of ``grad[m] * (count / B)``, with the exact count of j among the classes of
    rank m, less the sum of ``grad`` where j is the true class. A class that stands several times has the same value
    each time; an id below 0 becomes class 0 with class 0's value. There is no entry, and its value is 0, where class 0
    has none by itself, and in rows whose target is ``ignore_index``.
    """
    n_rows, n_sample, n_ranks = classes.shape
    target, ignore_index, _ = labels
    places = classes.flatten(1)
    if target is not None:
        places = torch.cat([places, target[:, None]], dim=1)
    places = places.clamp(min=0)
    counts = count_occurrences(places, classes).to(grad.dtype)  # [N, J, M]
    # A tensor as divisor: by a number, CUDA would multiply with its rounded inverse.
    terms = grad[:, None] * (counts / torch.full_like(counts, n_sample))
    value, total = terms[..., 0], grad[:, 0]
    for m in range(1, n_ranks):
        value, total = value + terms[..., m], total + grad[:, m]
    absent = (counts == 0).all(2)  # class 0 in place of an id below 0
    if target is not None:
        is_target = places == target[:, None]
        value = torch.where(is_target, value - total[:, None], value)
        absent = absent & ~is_target | (target == ignore_index)[:, None]
    return places, value.masked_fill(absent, 0.0), ~absent


def count_occurrences(places: Tensor, classes: Tensor) -> Tensor:
    """How often each of the places [N, J] stands among the classes [N, B, M] of each rank: [N, J, M].

    All pairs are compared where samples are few, which is faster; else a binary search takes J log B steps. A graph has
    the latter, which needs no pieces of a number of rows that may not be known.
    """
    n_sample, n_ranks = classes.shape[1:]
    if n_sample > _FEW_SAMPLES or not isinstance(classes.shape[0], int):
        ordered = classes.transpose(1, 2).contiguous().sort(dim=2).values
        wanted = places[:, None].expand(-1, n_ranks, -1).contiguous()
        least, end = (torch.searchsorted(ordered, wanted, right=right) for right in (False, True))
        return (end - least).transpose(1, 2)
    step = max(1, _BUDGET // (places.shape[1] * n_sample * n_ranks))
    pairs = zip(places.split(step), classes.split(step))
    return torch.cat([(p[:, :, None, None] == c[:, None]).sum(2) for p, c in pairs])


def gradient(grad: Tensor, classes: Tensor, labels: Labels, of: Slice) -> Tensor:
    """Gradient [N, L] of the scores from that of the excesses [N, M], or its slice from ``of.first_class`` on.

    :func:`entries` rounded to ``of.dtype``, zeros elsewhere; NaN in rows whose class ids are -2.
    """
    out = torch.zeros((classes.shape[0], of.n_classes), dtype=of.dtype, device=classes.device)
    found, values, _ = entries(grad, classes, labels)
    place = found - of.first_class
    row, column = ((place >= 0) & (place < of.n_classes)).nonzero(as_tuple=True)
    out.index_put_((row, place[row, column]), values[row, column].to(of.dtype))
    return out.masked_fill_(marks_nan(classes)[:, None], math.nan)


def clean_excess(picked: Tensor, own: Tensor | None, classes: Tensor, labels: Labels) -> Tensor:
    """Excesses [N, M] of the clean scores ``picked`` [N, B, M] at these classes over those of the true classes [N].

    It is linear in the scores, and :func:`entries` its transpose.
    """
    total = picked.masked_fill(classes < 0, 0.0).mean(1)
    if own is None:
        return total
    return (total - own[:, None]).masked_fill((labels.target == labels.ignore_index)[:, None], 0.0)


def marks_nan(classes: Tensor) -> Tensor:
    """Whether a row's class ids [N, B, M] say that its gradient is NaN: [N]."""
    return classes[:, 0, 0] == -2
