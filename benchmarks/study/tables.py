"""The tables of the study, from its committed result."""

from functools import partial
from statistics import mean

from scipy.stats import ttest_1samp

from benchmarks.committed import grid, result, spread
from benchmarks.study.jobs import ABLATED, ABLATIONS, PLANS

SHOTS = {"few": "few-shot", "medium": "medium-shot", "many": "many-shot"}
METRICS = ("top-1", "top-5", "top-20", "macro top-5")
IN_README = (
    *("cross-entropy", "sampled, B = 16", "{1, 5} softplus", "balanced noised top-5"),
    *("logit-adjusted", "logit-adjusted, cosine", "sampled, B = 16, offset", "{1, 5} softplus, offset", "LDAM"),
    "imbalanced noised top-5",
)
SETS_IN_README = ("features", "kanji", "species", "long-tailed glyphs")
SETTINGS = {"eps": "eps of AdamW", "n_sample": "B", "k": "K", "ranks": "Ks", "length": "length of rows at the start"}


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


def runs_of(report: dict, stage: str, data: str) -> dict[str, list[dict]]:
    """The runs of one stage on a data set, by loss in the order of the plan."""
    found = [run for run in report["runs"] if (run["stage"], run["data"]) == (stage, data)]
    return {loss: own for loss in PLANS[data].losses if (own := [run for run in found if run["loss"] == loss])}


def study_table(data: str) -> str:
    """Test figures of each loss on a data set."""
    report = result("study")
    described = report["data"][data]
    if not described["complete"]:
        return "The runs on these data are not complete."
    runs = runs_of(report, "test", data)
    # Where all classes have as many rows, the mean over classes is that over rows; wrong labels change rows only.
    is_long_tailed = described["most"] > described["least"] and data != "noisy glyphs"
    metrics = [*METRICS, *SHOTS] if is_long_tailed else METRICS[:3]
    columns = [accuracy_cells(runs, metric) for metric in metrics]
    rows = [[loss, *(cells[loss] for cells in columns)] for loss in runs]
    return grid(["loss", *(SHOTS.get(metric, metric) for metric in metrics)], rows)


def data_table() -> str:
    report = result("study")
    rows = []
    for name, d in report["data"].items():
        sizes = [str(d["rows"][part]) for part in ("train", "val", "test")]
        rows.append([name, str(d["classes"]), *sizes, f"{d['least']} to {d['most']}"])
    return grid(["data", "classes", "training", "validation", "test rows", "training rows of a class"], rows)


def settings_table() -> str:
    """The settings that validation chose."""
    report = result("study")
    rows = []
    for data in PLANS:
        for loss, runs in runs_of(report, "test", data).items():
            text = ", ".join(f"{name} = {value:g}" for name, value in runs[0]["settings"].items())
            rows.append([data, loss, text])
    return grid(["data", "loss", "settings"], rows)


def sgd_table() -> str:
    """The best first trial of each loss with AdamW and with SGD, on the data that have both."""
    report, rows = result("study"), []
    for data, plan in PLANS.items():
        for loss, trials in runs_of(report, "trial", data).items() if "SGD" in plan.optimizers else ():
            of_both = ([t[plan.keep_by] for t in trials if name in t["settings"]] for name in ("eps", "momentum"))
            rows.append([data, loss, *(f"{100 * max(values):.1f}" for values in of_both)])
    return grid(["data", "loss", "AdamW", "SGD"], rows)


def ablation_table() -> str:
    """Each setting varied by itself around the best first trial with AdamW."""
    report = result("study")
    rows, seeds = [], 0
    for loss, keys in ABLATIONS.items():
        for key, values in keys.items():
            runs = runs_of(report, f"ablation of {key}", ABLATED).get(loss, [])
            for value in values:
                own = [run for run in runs if run["settings"][key] == value]
                if len(own) > 1:
                    seeds = len(own)
                    name = value if isinstance(value, list) else f"{value:g}"
                    cells = ("{:.1f} ± {:.1f}".format(*spread(own, metric)) for metric in (*METRICS, "few"))
                    rows.append([loss, f"{SETTINGS.get(key, key)} = {name}", *cells])
    note = f"{ABLATED}, {seeds} seeds, percent of the validation rows; all else as in the best first trial with AdamW."
    return grid(["loss", "setting", *METRICS, "few-shot"], rows) + f"\n\n{note}"


def accuracy_table() -> str:
    """README's: the measure by which settings were chosen, and top-1, of some losses on the test rows."""
    report = result("study")
    sets = [data for data in SETS_IN_README if report["data"][data]["complete"]]
    cells: dict[str, dict[str, str]] = {}
    for data in sets:
        runs, metric = runs_of(report, "test", data), PLANS[data].keep_by
        shown = {loss: runs[loss] for loss in IN_README if loss in runs}
        for loss, first in accuracy_cells(shown, metric).items():
            cells.setdefault(loss, {})[data] = f"{first} ({spread(runs[loss], 'top-1')[0]:.1f})"
    rows = [[loss, *(own.get(data, "-") for data in sets)] for loss, own in cells.items()]
    return grid(["loss", *(data + ", top-5" * (PLANS[data].keep_by == "top-5") for data in sets)], rows)


TABLES = {
    "data": data_table,
    **{data: partial(study_table, data) for data in PLANS},
    "settings": settings_table,
    "sgd": sgd_table,
    "ablation": ablation_table,
    "accuracy": accuracy_table,
}
