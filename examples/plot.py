"""The demo's figure: top-k accuracy, and top-5 accuracy by how often a class was seen in training."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

# Readers with colour blindness can tell Okabe and Ito's colours apart; the markers need no colour.
STYLES = (("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"))


def draw(result: dict, path: Path) -> None:
    """Draws the `result` of a run, which has the form of its JSON, to a PNG."""
    losses = result["losses"]
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        _curves(left, losses)
        _bins(right, losses)
        for axes in (left, right):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.grid(alpha=0.3)
        title = f"{result['data']}: {result['classes']:,} classes, {result['rows']['test']:,} test rows"
        figure.suptitle(title, fontweight="bold")
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)


def _curves(axes: Axes, losses: dict[str, dict]) -> None:
    for (name, measured), (colour, marker) in zip(losses.items(), STYLES):
        k = range(1, len(measured["curve"]) + 1)
        axes.plot(k, measured["curve"], color=colour, marker=marker, markersize=4, label=name)
        axes.plot(k, measured["unseen"]["curve"], color=colour, linestyle=":", linewidth=1.3)
    axes.plot([], [], color="grey", linestyle=":", label="rows whose input is not in training")
    axes.set(xlabel="number of guesses k", ylabel="top-k accuracy", title="Accuracy by number of guesses")
    axes.set_xticks([1, 5, 10, 15, 20])
    axes.legend(frameon=False, loc="lower right")


def _bins(axes: Axes, losses: dict[str, dict]) -> None:
    for i, ((name, measured), (colour, marker)) in enumerate(zip(losses.items(), STYLES)):
        bins = measured["by_frequency"]
        place = [at + 0.14 * (i - (len(losses) - 1) / 2) for at in range(len(bins))]
        share = [b["accuracy"] for b in bins]
        error = [(a * (1 - a) / b["rows"]) ** 0.5 for a, b in zip(share, bins)]
        axes.errorbar(place, share, error, color=colour, marker=marker, linestyle="none", capsize=2, label=name)
    axes.set_xticks(range(len(bins)), [f"{b['label']}\n({b['rows']:,})" for b in bins])
    axes.set(
        xlabel="training rows of the class (test rows in brackets)",
        ylabel="top-5 accuracy, ± one standard error",
        title="Top-5 accuracy by class frequency",
    )
