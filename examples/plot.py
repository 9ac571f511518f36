"""The demo's figure: top-k accuracy of the losses, and what a head over all species costs under each."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

# Readers with colour blindness can tell Okabe and Ito's colours apart; the markers need no colour.
STYLES = (("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v"))


def draw(result: dict, path: Path) -> None:
    """Draws the `result` of the demo, which has the form of its JSON, to a PNG."""
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(12, 4.5), layout="constrained", width_ratios=(2, 1, 1)
        )
        for (name, measured), (colour, marker) in zip(result["losses"].items(), STYLES):
            k = range(1, len(measured["curve"]) + 1)
            left.plot(k, measured["curve"], color=colour, marker=marker, markersize=4, label=name)
        left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        left.set(xlabel="number of guesses k", ylabel="top-k accuracy", title=result["data"])
        left.set_xticks([1, 5, 10, 15, 20])
        left.grid(alpha=0.3)
        left.legend(frameon=False, loc="lower right")
        _bars(middle, result["head"]["losses"], "ms a step")
        _bars(right, result["head"]["losses"], "MiB a step")
        figure.suptitle(f"right: a head over {result['head']['classes']:,} species", x=1, ha="right")
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)


def _bars(axes: Axes, losses: dict[str, dict], column: str) -> None:
    bars = axes.bar(list(losses), [row[column] for row in losses.values()], color=[c for c, _ in STYLES])
    axes.bar_label(bars, fmt="%.0f")
    axes.set(title=column)
