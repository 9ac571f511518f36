"""The language model's figure: validation perplexity against steps and against CPU time."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

# Readers with colour blindness can tell Okabe and Ito's colours apart; the markers need no colour.
STYLES = (
    *(("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^")),
    *(("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P")),
)


def draw(result: dict, path: Path) -> None:
    """Draws the learning curve of each loss, the mean over its seeds, to a PNG; CPU time is the steps' median time."""
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
        for name, (colour, marker) in zip(result["times"], STYLES):
            curves = [run["curve"] for run in result["runs"] if run["loss"] == name]
            if curves:
                steps = np.array([point["step"] for point in curves[0]])
                found = np.mean([[point["validation perplexity"] for point in curve] for curve in curves], axis=0)
                seconds = steps * result["times"][name]["CPU ms a step"] / 1e3
                for axes, x in ((left, steps), (right, seconds)):
                    axes.plot(x, found, color=colour, marker=marker, markersize=4, label=name)
        left.set(xlabel="steps", ylabel="validation perplexity", yscale="log")
        right.set(xlabel="seconds of CPU time")
        for axes in (left, right):
            axes.grid(alpha=0.3, which="both")
        left.legend(frameon=False)
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
