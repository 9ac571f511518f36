"""Draws the pictures of these pages from the sampler's own functions: ``python docs/pictures.py [FOLDER]``.

One row of scores serves all pictures.
"""

import sys
from pathlib import Path

import torch

from examples.style import COLOURS, GREY, save_svg
from topk_fast import functional, noise, reference
from topk_fast.request import Noise

RED, BLUE, PINK, GREEN = COLOURS[:4]
ARROW = {"arrowstyle": "->", "color": GREY}
N_CLASSES, RANK, EPSILON, SEED = 1000, 6, 1.0, torch.tensor(16)  # the losses with K = 5 search for rank 6


def row_of_scores():
    """Normal scores [1, L], and each class's place when they are sorted [L], from 1."""
    scores = torch.randn(1, N_CLASSES, generator=torch.Generator().manual_seed(0))
    return scores, scores[0].argsort(descending=True).argsort() + 1


def walk(scores):
    """One sample of one row, as ``reference.candidates`` searches it, with the steps on the way.

    Returns the cut, the contenders and their noised scores as a dict, and for each arrival its class, noised score,
    the bound ``cut + epsilon * z`` and the k-th best before it; the last arrival is the one that stops the walk.
    """
    n_classes = scores.shape[1]
    wanted = Noise(SEED, (RANK,), EPSILON, None, n_sample=1, law=noise.NORMAL, dense=False)
    cut = reference.cut_of(scores, RANK)[0]
    noised = scores[0] + reference.dense_noise(torch.arange(1), n_classes, 1, SEED)[0, 0] * EPSILON
    drawn = {name: float(noised[name]) for name in (scores[0] > cut).nonzero()[:, 0].tolist()}
    best = dict(sorted(drawn.items(), key=lambda item: -item[1])[:RANK])
    arrivals, elapsed = [], torch.zeros((), dtype=torch.int64)
    for j in range(n_classes):
        words = noise.philox(torch.tensor(j // 2), 0, 0, 1, SEED)[2 * (j % 2) : 2 * (j % 2) + 2]
        elapsed = elapsed + noise.gap(words[0])
        name = int(words[1] * n_classes >> 32)
        shift = noise.LAWS[noise.NORMAL].level(noise.arrival_time(elapsed, n_classes)) * EPSILON
        value, bound, threshold = float(scores[0, name] + shift), float(cut + shift), min(best.values())
        arrivals.append((name, value, bound, threshold))
        if not bound > threshold:
            break
        if name not in drawn and name not in best and value > threshold:
            del best[min(best, key=best.get)]
            best[name] = value
    values, classes = reference.candidates(scores, wanted)
    if sorted(best.items(), key=lambda item: -item[1]) != list(zip(classes[0, 0].tolist(), values[0, 0].tolist())):
        raise AssertionError("the picture's walk is not the sampler's")
    return float(cut), drawn, arrivals


def draw_sampler(figure):
    scores, place = row_of_scores()
    cut, drawn, arrivals = walk(scores)
    others = [a for a in arrivals[:-1] if a[0] not in drawn]
    threshold = arrivals[-1][3]

    left, right = figure.subplots(1, 2, width_ratios=[3, 2], sharey=True)
    left.plot(range(1, N_CLASSES + 1), scores[0].sort(descending=True).values, color=GREY, label="clean scores, sorted")
    left.axhline(cut, color=GREEN, linestyle="--", linewidth=1)
    left.text(1, cut - 0.1, "cut", color=GREEN, va="top")
    left.plot(place[list(drawn)], list(drawn.values()), ".", color=BLUE, label=f"{len(drawn)} contenders, own draws")
    names = [name for name, *_ in others]
    left.vlines(place[names], scores[0, names], [a[1] for a in others], color=RED, linewidth=0.5)
    left.plot(place[names], [a[1] for a in others], ".", color=RED, label=f"{len(others)} arrivals on other classes")
    left.axhline(threshold, color=PINK, linewidth=1)
    left.text(N_CLASSES, threshold + 0.1, f"{RANK}th best", color=PINK, ha="right")
    left.set(xlabel="class, by rank of its clean score (log scale)", ylabel="score", xscale="log", xlim=(0.9, 1100))
    left.legend(loc="lower left")

    right.plot(range(1, len(arrivals) + 1), [a[2] for a in arrivals], color=GREEN, label="bound: cut + ε z, falls")
    right.step(
        range(1, len(arrivals) + 1), [a[3] for a in arrivals], color=PINK, where="mid", label=f"{RANK}th best so far"
    )
    tried = [(i, a[1]) for i, a in enumerate(arrivals[:-1], 1) if a[0] not in drawn]
    skipped = [(i, a[1]) for i, a in enumerate(arrivals[:-1], 1) if a[0] in drawn]
    right.plot(*zip(*tried), ".", color=RED, label="its noised score")
    right.plot(*zip(*skipped), "x", color=GREY, markersize=4, label="on a contender: skipped")
    end = (len(arrivals), arrivals[-1][2])
    right.annotate("stop", end, (end[0], end[1] - 1.5), color=GREY, ha="right", arrowprops=ARROW)
    right.set(xlabel="arrival")
    right.legend(loc="lower left")


def draw_smoothing(figure):
    """The largest of two scores, and the loss of a row of three, against one score; means over 20 000 samples."""
    left, right = figure.subplots(1, 2)
    x = torch.linspace(-3, 3, 121)
    for epsilon, color in ((0.0, GREY), (0.3, BLUE), (1.0, RED)):
        options = {"epsilon": epsilon, "n_sample": 20_000 if epsilon else 1, "seed": 0}
        pair = torch.stack([x, torch.zeros_like(x)], dim=1)
        left.plot(x, functional.noised_topk(pair, 1, **options), color=color, label=f"ε = {epsilon:g}")
        three = torch.stack([x, torch.full_like(x, 1.0), torch.full_like(x, -1.0)], dim=1)
        target = torch.zeros(len(x), dtype=torch.int64)
        loss = functional.bal_noised_topk_loss(three, target, 1, reduction="none", **options)
        right.plot(x, loss, color=color, label=f"ε = {epsilon:g}")
    left.set(xlabel="s", ylabel="smoothed largest of (s, 0)")
    right.set(xlabel="score of the true class; the others have 1 and -1", ylabel="balanced loss, K = 1")
    left.legend()
    right.legend()


def draw_entries(figure):
    """Sizes of the gradient's entries of one row: cross-entropy's and, at B = 5, the loss's."""
    scores, place = row_of_scores()
    y = (place == 40).nonzero()[0]  # a class that is not among the first
    axes = figure.subplots()
    logits = scores.clone().requires_grad_()
    torch.nn.functional.cross_entropy(logits, y).backward()
    size = logits.grad[0].abs()
    label = f"cross-entropy: {int((size > 0).sum())} entries"
    axes.plot(range(1, N_CLASSES + 1), size[place.argsort()], color=GREY, label=label)
    logits = scores.clone().requires_grad_()
    functional.bal_noised_topk_loss(logits, y, RANK - 1, EPSILON, seed=int(SEED)).backward()
    size = logits.grad[0].abs()
    here = size.nonzero()[:, 0]
    label = f"balanced top-{RANK - 1} loss, B = 5: {len(here)} entries"
    axes.vlines(place[here], 1e-5, size[here], color=BLUE, linewidth=0.8)
    axes.plot(place[here], size[here], "o", color=BLUE, markersize=4, label=label)
    axes.annotate("true class", (40, 1.0), (80, 0.9), color=GREY, va="center", arrowprops=ARROW)
    axes.set(xscale="log", yscale="log", xlim=(0.9, 1100), ylim=(1e-5, 5))
    axes.set(xlabel="class, by rank of its score (log scale)", ylabel="size of the gradient's entry")
    figure.legend(loc="outside upper left")


PICTURES = {
    "sampler": (draw_sampler, (9, 3.8)),
    "smoothing": (draw_smoothing, (9, 3)),
    "entries": (draw_entries, (6, 3)),
}


def main(folder=Path(__file__).parent / "img"):
    """Writes all pictures into ``folder``."""
    torch.set_num_threads(1)
    Path(folder).mkdir(exist_ok=True)
    for name, (draw, size) in PICTURES.items():
        save_svg(draw, size, Path(folder) / f"{name}.svg")


if __name__ == "__main__":
    main(*sys.argv[1:])
