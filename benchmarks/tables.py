"""Every table and plot of README.md and docs/, from the committed JSON of benchmarks/results.

A table stands between the marks ``<!-- NAME table -->`` and ``<!-- end -->`` of a page, a plot in docs/img. Each plot names
in its metadata the digest of what it was made from, so that a test can tell a stale one.

    python benchmarks/tables.py            # or: make tables
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import ttest_1samp

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "img"
PAGES = ("README.md", "docs/choosing.md", "docs/study.md")
PLAIN = "linear + cross-entropy"
LINEAR_GOALS = {"time": 0.5, "memory": 0.25}  # to PLAIN, at L = 100 000
BALANCED, IMBALANCED = "balanced noised top-K", "imbalanced noised top-K"
NOISED = (BALANCED, IMBALANCED)
SHOTS = ("few", "medium", "many")


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def where(e: dict) -> str:
    return f"{e['cpu']}, one thread, torch {e['torch']}, commit {e['commit']}, {e['date'][:10]}."


def ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def median(case: dict, name: str) -> float:
    if name not in case["ms"]:
        raise KeyError(
            f"{name} has no time at N, L = {case['N']}, {case['L']}: {case['left_out'].get(name, 'not asked')}"
        )
    return case["ms"][name]["median"]


def goals_table() -> str:
    """Times beside the goals that the design sets."""
    report = result("cpu")
    rows = []
    for c in (c for c in report["cases"] if c["group"] == "goals"):
        ours, plain, theirs = (median(c, name) for name in ("topk_fast", "cross-entropy", "pytopk"))
        to_plain, to_pytopk = report["goals"][str(c["L"])]
        goal = f" ({to_plain:g})" if c["n_sample"] == 5 else ""
        other_goal = f" (1/{1 / to_pytopk:.0f})" if c["n_sample"] == 10 else ""
        shape = [f"{c['N']}, {c['L']}", str(c["n_sample"]), f"{c['epsilon']:g}"]
        times = [f"{ms(t)} ms" for t in (ours, plain, theirs)]
        rows.append([*shape, *times, f"{ours / plain:.2f}{goal}", f"1/{theirs / ours:.0f}{other_goal}"])
    head = [
        "N, L",
        "B",
        "epsilon",
        "topk_fast",
        "cross-entropy",
        "pytopk",
        "to cross-entropy (goal)",
        "to pytopk (goal)",
    ]
    return grid(head, rows) + "\n\n" + where(report["environment"])


def peers_table() -> str:
    """Every peer at two shapes: time, its ratio to cross-entropy, peak memory in units of the scores."""
    from peers import PEERS  # needs the packages of the peers, which no other table does

    report = result("cpu")
    cases = [c for c in report["cases"] if c["group"] == "peers"]
    names = sorted(
        {n for c in cases for n in c["ms"]}, key=lambda n: median(cases[-1], n) if n in cases[-1]["ms"] else 0
    )
    rows = []
    for name in names:
        row = [f"**{name}**" if name.startswith("topk_fast") else name]
        for c in cases:
            if name not in c["ms"]:
                row += ["-", "-"]
                continue
            peak = c["peak_bytes"].get(name)
            ratio = median(c, name) / median(c, "cross-entropy")
            row.append(f"{ms(median(c, name))} ms ({ratio:{'.2g' if ratio < 100 else '.0f'}})")
            row.append("-" if peak is None else f"{peak / (4 * c['N'] * c['L']):.1f}")
        rows.append(row + [PEERS[name].compared])
    head = ["loss"]
    for c in cases:
        head += [f"N, L = {c['N']}, {c['L']}", "memory"]
    first = cases[0]
    note = (
        f"Forward + backward, K = {first['k']}, B = {first['n_sample']}, epsilon = {first['epsilon']:g}, N(0, 1) scores; in "
        "brackets the ratio to cross-entropy; peak extra memory in units of the scores, the gradient (1.0) included. "
    )
    return grid(head + ["what it is"], rows) + "\n\n" + note + where(report["environment"])


def scores_table() -> str:
    """How the kind of the scores changes the time."""
    report = result("cpu")
    cases = [c for c in report["cases"] if c["group"] == "scores"]
    rows = []
    for kind in dict.fromkeys(c["scores"] for c in cases):
        row = [{"species": "logits of the 16S model", "normal": "N(0, 1)"}.get(kind, kind)]
        for c in (c for c in cases if c["scores"] == kind):
            ratio = median(c, "topk_fast") / median(c, "cross-entropy")
            row.append(f"{ms(median(c, 'topk_fast'))} ms ({ratio:.2f})")
        rows.append(row + [f"{ms(median(c, name))} ms" for name in ("cross-entropy", "pytopk")])
    levels = [f"topk_fast, epsilon {c['epsilon']:g}" for c in cases[:2]]
    note = (
        f"N, L = {cases[0]['N']}, {cases[0]['L']}, B = {cases[0]['n_sample']}; in brackets the ratio to cross-entropy."
    )
    return grid(["scores", *levels, "cross-entropy", "pytopk"], rows) + f"\n\n{note} {where(report['environment'])}"


def linear_table() -> str:
    """The linear form: times and memory, with their ratio to the plain form."""
    report = result("linear_cpu")
    rows = []
    for case in report["cases"]:
        plain, plain_bytes = case["ms"][PLAIN]["both"]["median"], case["peak_bytes"][PLAIN]
        for name, parts in case["ms"].items():
            if parts == "out of memory":
                rows.append([f"{case['N']}, {case['D']}, {case['L']}", name, *[""] * 4, parts])
                continue
            t, peak = {part: value["median"] for part, value in parts.items()}, case["peak_bytes"][name]
            rows.append(
                [f"{case['N']}, {case['D']}, {case['L']}", name, f"{t['forward']:.0f} ms", f"{t['backward']:.0f} ms"]
                + [f"{t['both']:.0f} ms ({t['both'] / plain:.2f})", f"{t['optimizer']:.1f} ms"]
                + [f"{peak / 2**20:.0f} MiB ({peak / plain_bytes:.2f})"]
            )
    head = ["N, D, L", "", "forward", "backward", "both", "optimizer", "peak extra memory"]
    note = (
        f"In brackets the ratio to {PLAIN}; goals at L = 100 000: {LINEAR_GOALS['time']} of its time, "
        f"{LINEAR_GOALS['memory']} of its memory. The memory contains the weight's gradient. "
    )
    return grid(head, rows) + "\n\n" + note + where(report["environment"])


def runs_of(report: dict, **wanted) -> list[dict]:
    return [r for r in report["runs"] if all(r[key] == value for key, value in wanted.items())]


def test_runs(report: dict, data: str) -> dict[str, list[dict]]:
    """The runs on the test rows of a data set, by loss."""
    return {loss: runs_of(report, stage="test", data=data, loss=loss) for loss in report["config"]["losses"]}


def ablation_runs(report: dict, loss: str, key: str, value: float) -> list[dict]:
    """The runs of a loss with one setting at `value`."""
    return [r for r in runs_of(report, stage=f"ablation of {key}", loss=loss) if r["settings"][key] == value]


def spread(runs: list[dict], metric: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds, in percent (of a metric in [0, 1])."""
    values = [100 * r[metric] for r in runs]
    return mean(values), stdev(values)


def falls_short(runs: list[dict], best: list[dict], metric: str) -> bool:
    """Paired t-test over the seeds, one-sided, at 5 percent: a seed gives all losses the same batches and first weights."""
    pairs = zip(*(sorted(group, key=lambda r: r["seed"]) for group in (runs, best)))
    less = [own[metric] - other[metric] for own, other in pairs]
    if len(set(less)) == 1:
        return less[0] < 0
    return ttest_1samp(less, 0, alternative="less").pvalue < 0.05


def accuracy_cells(runs: dict[str, list[dict]], metric: str) -> dict[str, str]:
    """Mean ± deviation of each loss; bold: the best mean, and those that the seeds do not tell from it."""
    best = max(runs, key=lambda loss: mean(r[metric] for r in runs[loss]))
    cells = {}
    for loss, own in runs.items():
        text = "{:.1f} ± {:.1f}".format(*spread(own, metric))
        cells[loss] = text if falls_short(own, runs[best], metric) else f"**{text}**"
    return cells


HEADS = {"few": "few-shot top-5", "medium": "medium-shot", "many": "many-shot"}
LONG_TAILED = ("species", "long-tailed glyphs")  # elsewhere shots differ by chance alone, or not at all


def study_table(metrics: list[str], data: str) -> str:
    """Test figures of each loss on a data set."""
    report = result("study")
    runs = test_runs(report, data)
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
    """What validation chose."""
    report = result("study")
    rows = []
    for data in report["config"]["data"]:
        for loss, runs in test_runs(report, data).items():
            settings = runs[0]["settings"]
            text = ", ".join(f"{key} = {value:g}" for key, value in settings.items() if key not in ("k", "n_sample"))
            rows.append([data, loss, text])
    return grid(["data", "loss", "settings"], rows)


def ablation_table() -> str:
    """Each setting varied alone around what validation chose."""
    report = result("study")
    data = report["config"]["ablations"]["data"]
    rows = []
    for loss in NOISED:
        for key, values in report["config"]["ablations"][loss].items():
            for value in values:
                runs = ablation_runs(report, loss, key, value)
                cells = [spread(runs, m) for m in ("top-1", "top-5", "top-20", "macro top-5", "few")]
                seconds = mean(r["seconds an epoch"] for r in runs)
                rows.append(
                    [loss, f"{NAMES[key]} = {value:g}", *(f"{a:.1f} ± {b:.1f}" for a, b in cells), f"{seconds:.2f}"]
                )
    head = ["loss", "setting", "top-1", "top-5", "top-20", "macro top-5", "few-shot top-5", "s an epoch"]
    seeds = len(report["config"]["ablations"]["seeds"])
    note = f"{data}, {seeds} seeds, percent of the validation rows; all else as validation chose it."
    return (
        grid(head, rows) + f"\n\n{note} Commit {report['environment']['commit']}, {report['environment']['date'][:10]}."
    )


NAMES = {"k": "K", "n_sample": "B", "epsilon": "epsilon", "max_m": "max_m"}


def bias_is_seen(q: dict, report: dict) -> bool:
    """Whether the bias stands out of two standard errors, that of the limit, found from samples itself, among them."""
    return q["bias_squared"] > 2 * (q["bias_squared_error"] + q["unit_variance"] / report["exact_samples"])


def gradient_table() -> str:
    """Variance and bias against B, and what a second buys."""
    report = result("gradient")
    rows = []
    for b in dict.fromkeys(q["n_sample"] for q in report["quality"]):
        row = [str(b)]
        for q in (q for q in report["quality"] if q["n_sample"] == b):
            row.append(f"{q['variance']:.4f}")
            row.append(f"{q['bias_squared']:.1e}" if bias_is_seen(q, report) else "none seen")
        for shape in dict.fromkeys((s["N"], s["L"]) for s in report["second"]):
            at = {
                s["loss"]: s["ms"]["median"] for s in report["second"] if (s["N"], s["L"], s["n_sample"]) == (*shape, b)
            }
            theirs = f"{at['pytopk'] / at['topk_fast']:.0f}" if "pytopk" in at else "-"
            row.append(f"{ms(at['topk_fast'])} ms ({theirs})")
        rows.append(row)
    head = ["B"]
    for name in dict.fromkeys(q["row"] for q in report["quality"]):
        a = next(q["activation"] for q in report["quality"] if q["row"] == name)
        head += [f"variance, a = {abs(a):.1f}", "bias²"]
    head += [f"step at {n}, {length}" for n, length in dict.fromkeys((s["N"], s["L"]) for s in report["second"])]
    worst = max(g["largest_error"] / g["largest_entry"] for g in report["gradcheck"])
    note = (
        f"Gradient of one row of {report['L']} classes, K = {report['k']}, epsilon = {report['epsilon']:g}: variance summed "
        f"over the classes, squared length of the bias (where above two standard errors), from {report['repetitions']} "
        f"repetitions against {report['exact_samples']} samples; a is the mean of the hinge's argument. Steps of topk_fast, in "
        f"brackets how many times longer pytopk's take at the same B. Central differences in float64 agree with the gradient to "
        f"{worst:.0e} of its largest entry in {len(report['gradcheck'])} cases, with both samplers. "
    )
    return grid(head, rows) + "\n\n" + note + where(report["environment"])


def study_full(data: str) -> Callable[[], str]:
    metrics = ["top-1", "top-5", "top-10", "top-20", "macro top-1", "macro top-5", "few", "medium", "many"]
    return lambda: study_table(metrics, data)


TABLES = {
    "cpu": goals_table,
    "peers": peers_table,
    "scores": scores_table,
    "linear": linear_table,
    "data": study_data_table,
    "species": study_full("species"),
    "glyphs": study_full("glyphs"),
    "noisy glyphs": study_full("noisy glyphs"),
    "long-tailed glyphs": study_full("long-tailed glyphs"),
    "settings": settings_table,
    "ablation": ablation_table,
    "gradient": gradient_table,
}
MARK = re.compile(r"<!-- ([a-z -]+) table -->\n(.*?)<!-- end -->", re.DOTALL)


def filled(page: str) -> str:
    """The text of a page with its tables made anew."""
    return MARK.sub(lambda m: f"<!-- {m[1]} table -->\n{TABLES[m[1]]()}\n<!-- end -->", (ROOT / page).read_text())


def digest(*names: str) -> str:
    """Of the results a plot is made from."""
    content = b"".join((RESULTS / f"{name}.json").read_bytes() for name in names)
    return hashlib.sha256(content).hexdigest()[:16]


def main():
    import plots  # needs matplotlib, which the tables do not

    for page in PAGES:
        (ROOT / page).write_text(filled(page))
    for name in plots.PLOTS:
        plots.draw(name, IMAGES / f"{name}.svg")


if __name__ == "__main__":
    main()
