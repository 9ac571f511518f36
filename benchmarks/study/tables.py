"""The tables of the study, from its committed result."""

from collections.abc import Callable
from statistics import mean

from scipy.stats import ttest_1samp

from benchmarks.committed import ablation_runs, final_runs, result, spread
from benchmarks.markdown import grid
from benchmarks.study import BALANCED, IMBALANCED

SHOTS = ("few", "medium", "many")
SETTING_NAMES = {"k": "K", "n_sample": "B", "epsilon": "epsilon", "max_m": "max_m"}
HEADS = {"few": "few-shot top-5", "medium": "medium-shot", "many": "many-shot"}
LONG_TAILED = ("species", "long-tailed glyphs")  # elsewhere shots differ only by chance, or not at all


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


def study_table(metrics: list[str], data: str) -> str:
    """Test figures of each loss on a data set."""
    report = result("study")
    runs = final_runs(report, data)
    metrics = [m for m in metrics if m not in SHOTS or data in LONG_TAILED]
    columns = [accuracy_cells(runs, m) for m in metrics]
    rows = []
    for loss, own in runs.items():
        seconds = mean(r["seconds an epoch"] for r in own)
        rows.append([loss, *(cells[loss] for cells in columns), f"{seconds:.2f}"])
    return grid(["loss", *(HEADS.get(m, m) for m in metrics), "s an epoch"], rows)


def study_data_table() -> str:
    report = result("study")
    rows = [
        [
            name,
            str(d["classes"]),
            *(str(d["rows"][part]) for part in ("train", "val", "test")),
            f"{d['least']} to {d['most']}",
        ]
        for name in report["config"]["data"]
        for d in [report["data"][name]]
    ]
    return grid(["data", "classes", "training", "validation", "test rows", "training rows of a class"], rows)


def settings_table() -> str:
    """The settings that validation chose."""
    report = result("study")
    rows = []
    for data in report["config"]["data"]:
        for loss, runs in final_runs(report, data).items():
            settings = runs[0]["settings"]
            text = ", ".join(f"{key} = {value:g}" for key, value in settings.items() if key not in ("k", "n_sample"))
            rows.append([data, loss, text])
    return grid(["data", "loss", "settings"], rows)


def ablation_table() -> str:
    """Each setting varied by itself around the settings that validation chose."""
    report = result("study")
    data = report["config"]["ablations"]["data"]
    rows = []
    for loss in (BALANCED, IMBALANCED):
        for key, values in report["config"]["ablations"][loss].items():
            for value in values:
                runs = ablation_runs(report, loss, key, value)
                cells = [spread(runs, m) for m in ("top-1", "top-5", "top-20", "macro top-5", "few")]
                seconds = mean(r["seconds an epoch"] for r in runs)
                rows.append(
                    [
                        loss,
                        f"{SETTING_NAMES[key]} = {value:g}",
                        *(f"{a:.1f} ± {b:.1f}" for a, b in cells),
                        f"{seconds:.2f}",
                    ]
                )
    head = ["loss", "setting", "top-1", "top-5", "top-20", "macro top-5", "few-shot top-5", "s an epoch"]
    seeds = len(report["config"]["ablations"]["seeds"])
    note = f"{data}, {seeds} seeds, percent of the validation rows; all else as validation chose it."
    return (
        grid(head, rows) + f"\n\n{note} Commit {report['environment']['commit']}, {report['environment']['date'][:10]}."
    )


def study_full(data: str) -> Callable[[], str]:
    metrics = ["top-1", "top-5", "top-10", "top-20", "macro top-1", "macro top-5", "few", "medium", "many"]
    return lambda: study_table(metrics, data)
