"""The tables of the study, from its committed result."""

from statistics import mean

from scipy.stats import ttest_1samp

from benchmarks.committed import spread


def falls_short(runs: list[dict], best: list[dict], metric: str) -> bool:
    """Whether a paired one-sided t-test over the seeds finds `runs` below `best`, at 5 percent.

    The test is paired, since a seed gives all losses the same batches and initial weights.
    """
    pairs = zip(*(sorted(group, key=lambda r: r["seed"]) for group in (runs, best)))
    less = [own[metric] - other[metric] for own, other in pairs]
    if len(set(less)) == 1:
        return less[0] < 0
    return ttest_1samp(less, 0, alternative="less").pvalue < 0.05


def accuracy_cells(runs: dict[str, list[dict]], metric: str) -> dict[str, str]:
    """Mean ± deviation of each loss; the best mean is bold, and so are those that are not significantly lower."""
    best = max(runs, key=lambda loss: mean(r[metric] for r in runs[loss]))
    cells = {}
    for loss, own in runs.items():
        text = "{:.1f} ± {:.1f}".format(*spread(own, metric))
        cells[loss] = text if falls_short(own, runs[best], metric) else f"**{text}**"
    return cells
