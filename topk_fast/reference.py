r"""The maths in plain PyTorch: the losses, the sampler and the gradient. It is also the backend named ``torch``.

Scores :math:`s \in R^L` of one row, noise :math:`Z_b \sim N(0, I_L)` for b = 1..B, level :math:`\epsilon`:

.. math::
    v_b, c_b &= \text{value and class of the } k\text{-th largest of } s + \epsilon Z_b, \qquad
    top = \frac{1}{B} \sum_b v_b \\
    \ell(s, y) &= \max(0,\; scale \, (m_y + top - s_y)), \qquad k = K + 1 \\
    \partial \ell / \partial s_j &= [\ell > 0] \, scale \left(\#\{b : c_b = j\} / B - [j = y]\right)

Source: Garcin, Servajean, Joly, Salmon, "Stochastic smoothing of the top-K calibrated hinge loss for deep imbalanced
classification", ICML 2022. :func:`smoothed_value` and :func:`hinge` are that, differentiable, for any noise; below
them stands the search for (v_b, c_b) that draws noise only where it can matter, bit-identical to the kernels.
"""

import math

import torch
from torch import Tensor

from . import noise

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


def hinge(top: Tensor, true_score: Tensor, margin: Tensor | float = 1.0, scale: float = 1.0) -> Tensor:
    """max(0, scale * ((margin + top) - true_score)), NaN where any of them is NaN; all [N]."""
    excess = ((margin + top) - true_score) * scale
    return torch.where(excess <= 0, torch.zeros_like(excess), excess)


def dense_noise(rows: Tensor, n_classes: int, n_sample: int, seed: Tensor, first_class: int = 0) -> Tensor:
    """The contract's draws for every class: global rows [N] -> float32 [N, n_sample, n_classes]."""
    classes = torch.arange(first_class, first_class + n_classes, device=rows.device)
    return _draws(classes.expand(rows.shape[0], -1), rows, n_sample, seed)


def _draws(classes: Tensor, rows: Tensor, n_sample: int, seed: Tensor) -> Tensor:
    quads = torch.arange(-(-n_sample // 4), device=classes.device)
    words = noise.philox(classes[:, None], rows[:, None, None], quads[:, None], torch.zeros_like(quads[:1]), seed)
    words = torch.stack(torch.broadcast_tensors(*words), dim=2).flatten(1, 2)  # [N, 4 * quads, C]
    return noise.normal(words[:, :n_sample])


def cut(scores: Tensor, k: int) -> Tensor:
    """The score [N] above which a class gets draws of its own, a statistic of clean scores [N, L] without NaN.

    ``noise.plan`` says which. -inf (every class) where that is +inf, and where fewer than k classes lie above it
    and fewer than ``noise.wanted_contenders`` scores are finite: the walk over the others might find too few.
    """
    n_classes = scores.shape[1]
    chosen = noise.plan(n_classes, k)
    if chosen is None:
        return scores.new_full(scores.shape[:1], -math.inf)
    group, stride, rank = chosen
    padded = torch.nn.functional.pad(scores, (0, -n_classes % group), value=-math.inf)
    maxima = padded.unflatten(1, (-1, group))[:, ::stride].amax(2)  # [N, groups looked at]
    level = maxima.topk(rank, dim=1).values[:, -1]
    few = (scores > level[:, None]).sum(1) < k
    masked = (scores > -math.inf).sum(1) < noise.wanted_contenders(n_classes, k)
    return level.masked_fill((level == math.inf) | (few & masked), -math.inf)


def candidates(
    scores: Tensor, seed: Tensor, k: int, epsilon: float, n_sample: int, first_row: int, first_class: int, dense: bool
) -> tuple[Tensor, Tensor]:
    """The k best noised scores and their classes [N, n_sample, k], best first, (-inf, -1) where there are fewer."""
    n_rows, n_classes = scores.shape
    values, classes = empty_lists(scores, k, n_sample)
    step = max(1, _BUDGET // (n_classes + 64 * k * n_sample))
    for start in range(0, n_rows, step):
        part = slice(start, min(start + step, n_rows))
        wide = scores[part].to(values.dtype)
        bad = wide.isnan().any(1)
        wide = wide.masked_fill(bad[:, None], 0.0)
        rows = torch.arange(first_row + part.start, first_row + part.stop, device=scores.device) & 0xFFFFFFFF
        level = wide.new_full(wide.shape[:1], -math.inf) if dense else cut(wide, k)
        best = (values[part], classes[part])
        best = _draw_contenders(best, wide, level, rows, seed, epsilon, first_class)
        best = _walk_background(best, wide, level, rows, seed, epsilon, first_class)
        values[part] = best[0].masked_fill(bad[:, None, None], math.nan)
        classes[part] = best[1].masked_fill(bad[:, None, None], -1)
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


def _draw_contenders(best, scores, level, rows, seed, epsilon, first_class):
    """Merges every class above the cut into the k best, some columns of the ragged list of contenders at a time."""
    values, classes = best
    n_rows, n_sample, k = values.shape
    row, column = (scores > level[:, None]).nonzero(as_tuple=True)  # ascending classes within a row
    count = torch.bincount(row, minlength=n_rows)
    place = torch.arange(row.shape[0], device=row.device) - (count.cumsum(0) - count)[row]
    step = max(k, _BUDGET // (n_rows * n_sample))
    for start in range(0, int(count.max()) if n_rows else 0, step):
        here = (place >= start) & (place < start + step)
        width = min(step, int(count.max()) - start)
        at = (row[here], place[here] - start)
        index = column.new_zeros((n_rows, width)).index_put(at, column[here] + first_class)
        clean = scores.new_full((n_rows, width), -math.inf).index_put(at, scores[row[here], column[here]])
        z = _draws(index, rows, n_sample, seed).to(scores.dtype)
        drawn = clean[:, None] + z * epsilon
        values = torch.cat([values, drawn], dim=2)
        classes = torch.cat([classes, index[:, None].expand(-1, n_sample, -1)], dim=2)
        values, classes = merge(values, classes, k)
        classes = classes.masked_fill(values == -math.inf, -1)
    return values, classes


def _walk_background(best, scores, level, rows, seed, epsilon, first_class):
    """Merges the other classes: the arrivals of one Poisson process a (row, sample), at falling levels of noise.

    Every class has points at levels z with mean measure -ln Phi(z) above z; its highest one is N(0, 1). Together they
    are a process of rate L on uniform classes, walked until ``cut + epsilon * z`` cannot exceed the k-th best.
    """
    values, classes = (x.flatten(0, 1) for x in best)  # a lane is a (row, sample)
    n_sample, n_classes = best[0].shape[1], scores.shape[1]
    row = torch.arange(scores.shape[0], device=scores.device).repeat_interleave(n_sample)
    sample = torch.arange(n_sample, device=scores.device).repeat(scores.shape[0])
    lanes = (level[row] > -math.inf).nonzero().flatten()
    sums = torch.zeros_like(row)
    done, pairs = 0, 8
    while lanes.numel():
        counter = torch.arange(done, done + pairs, device=row.device)
        r, b = row[lanes], sample[lanes]
        stream = torch.full_like(b[:1, None], 1 + first_class)
        w = noise.philox(counter, rows[r][:, None], b[:, None], stream, seed)
        gaps = torch.stack([noise.gap(w[0]), noise.gap(w[2])], dim=2).flatten(1).to(torch.int64)
        times = sums[lanes, None] + gaps.cumsum(1)  # [lanes, 2 * pairs]
        drawn = torch.stack([w[1], w[3]], dim=2).flatten(1) * n_classes >> 32
        shift = noise.hazard_quantile(noise.arrival_time(times, n_classes)).to(scores.dtype) * epsilon
        v, c, bound = values[lanes], classes[lanes], level[r]
        clean = scores[r[:, None], drawn]
        walking = torch.ones_like(lanes, dtype=torch.bool)
        for j in range(2 * pairs):
            walking = walking & (bound + shift[:, j] > v[:, -1])
            value, name = clean[:, j] + shift[:, j], drawn[:, j] + first_class
            behind = (value[:, None] > v) | ((value[:, None] == v) & (name[:, None] < c))  # [lanes, k]
            new = walking & (clean[:, j] <= bound) & behind[:, -1] & ~(c == name[:, None]).any(1)
            first = behind & ~torch.nn.functional.pad(behind, (1, -1))  # its place in the list
            behind, first = behind & new[:, None], first & new[:, None]
            v = torch.where(first, value[:, None], torch.where(behind, v.roll(1, 1), v))
            c = torch.where(first, name[:, None], torch.where(behind, c.roll(1, 1), c))
        values, classes = values.index_put((lanes,), v), classes.index_put((lanes,), c)
        sums = sums.index_put((lanes,), times[:, -1])
        lanes = lanes[walking]
        done += pairs
    return values.view_as(best[0]), classes.view_as(best[1])


def smoothed(scores: Tensor, seed: Tensor, k: int, epsilon: float, n_sample: int, dense: bool):
    """Smoothed k-th largest value [N] and the class of each sample's k-th largest [N, n_sample]."""
    values, classes = candidates(scores, seed, k, epsilon, n_sample, 0, 0, dense)
    return mean(values[..., -1]), classes[..., -1].clone(memory_format=torch.contiguous_format)


def loss(
    scores: Tensor, target: Tensor, margins: Tensor | None, seed: Tensor, k: int, epsilon: float, n_sample: int,
    scale: float, ignore_index: int, dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses [N] and classes [N, n_sample], 0 and -1 in rows whose target is ``ignore_index``; how many are not."""
    values, classes = candidates(scores, seed, k, epsilon, n_sample, 0, 0, dense)
    true_score = scores.gather(1, target.masked_fill(target == ignore_index, 0)[:, None])[:, 0]
    return loss_of(values[..., -1], classes[..., -1], true_score, target, margins, scale, ignore_index)


def loss_of(
    values: Tensor, classes: Tensor, true_score: Tensor, target: Tensor, margins: Tensor | None, scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What :func:`loss` returns, from the k-th best of every sample [N, n_sample] and the true class's score [N]."""
    ignored = target == ignore_index
    margin = 1.0 if margins is None else margins[target.masked_fill(ignored, 0)]
    losses = hinge(mean(values), true_score.to(values.dtype), margin, scale)
    n_valid = (~ignored).sum().to(losses.dtype)
    return losses.masked_fill(ignored, 0.0), classes.masked_fill(ignored[:, None], -1), n_valid


def entries(
    grad: Tensor, result: Tensor, classes: Tensor, target: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Classes and values [N, J] of the gradient's entries, J = B + 1, or B where ``target`` is None.

    ``(grad * scale) * (count / B)`` with an exact count, B less for the true class; zero where the loss is 0. A class
    that stands several times in a row has the same value each time.
    """
    n_sample = classes.shape[1]
    weight = (classes >= 0).to(grad.dtype)
    if target is not None:
        gate = ~(result <= 0)
        classes = torch.cat([classes, target.masked_fill(~gate, 0)[:, None]], dim=1)
        weight = torch.cat([weight, torch.full_like(weight[:, :1], -n_sample)], dim=1) * gate[:, None]
    classes = classes.clamp(min=0)
    step = max(1, _BUDGET // classes.shape[1] ** 2)
    count = [
        ((c[:, :, None] == c[:, None, :]) * w[:, None, :]).sum(2)
        for c, w in zip(classes.split(step), weight.split(step))
    ]
    count = torch.cat(count)
    # A tensor as divisor: by a number, CUDA would multiply with its rounded inverse.
    value = (grad[:, None] * scale) * (count / torch.full_like(count, n_sample))
    return classes, torch.where((weight == 0).all(1, keepdim=True), torch.zeros_like(value), value)


def gradient(
    grad: Tensor, result: Tensor, classes: Tensor, target: Tensor | None, scale: float, first_class: int,
    n_classes: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gradient [N, L] of a loss, or of a smoothed value where ``target`` is None, or its slice from ``first_class`` on.

    :func:`entries` rounded to ``dtype``, zeros elsewhere; NaN where ``result`` is NaN.
    """
    out = torch.zeros((classes.shape[0], n_classes), dtype=dtype, device=classes.device)
    classes, values = entries(grad, result, classes, target, scale)
    place = classes - first_class
    row, column = ((place >= 0) & (place < n_classes)).nonzero(as_tuple=True)
    out.index_put_((row, place[row, column]), values[row, column].to(dtype))
    return out.masked_fill_(result.isnan()[:, None], math.nan)
