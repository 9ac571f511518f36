"""The one look of all plots and pictures: SVG without a background, legible on light and on dark pages."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")  # no display needed
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

GREY = "#808080"
# Okabe and Ito's colours; those that are too dark or too pale for one of the backgrounds are replaced. The markers tell
# the curves apart without colour.
COLOURS = ("#d55e00", "#3b8fd0", "#cc79a7", "#009e73", "#b8860b", "#7b68ee", "#56b4e9", "#8c6d5a")
MARKERS = "osD^vP*X"
STYLE = {
    "font.size": 9,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.markersize": 4,
    "lines.linewidth": 1.3,
    "svg.hashsalt": "topk_fast",
    "svg.fonttype": "none",
}


def save_svg(draw: Callable[[Figure], None], size: tuple[float, float], path: Path, **metadata: str) -> None:
    """Writes what ``draw`` draws on a figure of ``size`` inches."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None} | metadata)
        plt.close(figure)
