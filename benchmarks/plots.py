"""The plots of README.md and docs/, which tables.py writes."""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes

from benchmarks.committed import bias_is_seen, digest, median, result, spread, title
from benchmarks.loss import BASIC, CURVES, EQUAL
from benchmarks.study.jobs import PLANS
from benchmarks.study.losses import LOSSES
from benchmarks.study.tables import runs_of
from examples.style import COLOURS, GREY, MARKERS, save_svg

TOPS = (("top-1", COLOURS[1], "s"), ("top-5", COLOURS[0], "o"), ("top-20", COLOURS[3], "^"))


def look() -> dict[str, dict]:
    """A colour, a marker and a line of each loss, the same in all plots."""
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linewidth": 2.4 if name == "topk_fast" else 1.3,
            "zorder": 3 if name in BASIC else 2,
        }
        for i, name in enumerate((*CURVES, EQUAL))
    }


def curves(axes: Axes, group: str, key: str, measured=median, field: str = "ms") -> None:
    """Draws one line a loss over the cases of a group: `measured(case, loss)` against `key`."""
    cases = sorted((c for c in result("cpu")["cases"] if c["group"] == group), key=lambda c: c[key])
    for name, style in look().items():
        points = [(c[key], measured(c, name)) for c in cases if name in c.get(field, {})]
        if points:
            axes.plot(*zip(*points), label=title(name), **style)
    axes.set(xscale="log", yscale="log")


def legend(axes: Axes) -> None:
    """Puts the legend beside the axes, in the order of the lines' right ends."""
    lines = sorted(axes.get_legend_handles_labels()[0], key=lambda line: -line.get_ydata()[-1])
    axes.legend(handles=lines, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def time_length(figure) -> None:
    axes = figure.subplots()
    curves(axes, "length", "L", lambda c, name: median(c, name) / (c["N"] * c["L"]) * 1e6)
    axes.set(ylabel="ns a score, forward + backward")
    rows = [c["N"] for c in result("cpu")["cases"] if c["group"] == "length"]
    axes.set_xlabel(f"classes L (N from {max(rows)} rows down to {min(rows)})")
    legend(axes)


def time_samples_rank(figure) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    curves(left, "samples", "n_sample")
    curves(right, "k", "k")
    left.set(xlabel="samples B", ylabel="ms, forward + backward")
    right.set(xlabel="K")
    case = next(c for c in result("cpu")["cases"] if c["group"] == "samples")
    figure.suptitle(f"N, L = {case['N']}, {case['L']}", fontsize=9)
    lines = {line.get_label(): line for axes in (left, right) for line in axes.get_lines()}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=5, fontsize=8)


def memory_length(figure) -> None:
    axes = figure.subplots()
    curves(axes, "length", "L", lambda c, name: max(c["peak_bytes"][name], 1) / (4 * c["N"] * c["L"]), "peak_bytes")
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="classes L", ylabel="peak extra memory, in units of the scores")
    legend(axes)


def gradient(figure) -> None:
    report, times = result("gradient"), result("gradient_cpu")
    left, right = figure.subplots(1, 2)
    for name, colour, marker in zip(dict.fromkeys(q["row"] for q in report["quality"]), COLOURS, MARKERS):
        points = [q for q in report["quality"] if q["row"] == name]
        b = [q["n_sample"] for q in points]
        a = points[0]["activation"]
        left.plot(b, [q["variance"] for q in points], color=colour, marker=marker, label=f"variance, a = {a:.1f}")
        seen = [(q["n_sample"], q["bias_squared"]) for q in points if bias_is_seen(q, report)]
        if seen:
            left.plot(*zip(*seen), color=colour, marker=marker, linestyle=":", label=f"bias², a = {a:.1f}")
    left.plot(b, [points[0]["unit_variance"] / x for x in b], color=GREY, linewidth=0.8, label="(1 - Σ p²) / B")
    left.set(xscale="log", yscale="log", xlabel="samples B", ylabel="of one row's gradient")
    left.legend(fontsize=8)
    for shape, colour in zip(dict.fromkeys((c["N"], c["L"]) for c in times["cases"]), COLOURS):
        cases = [c for c in times["cases"] if (c["N"], c["L"]) == shape]
        for loss, line, marker in (("topk_fast", "-", "o"), (EQUAL, "--", "s"), ("pytopk", ":", "D")):
            if points := [(median(c, loss), c["variance"][loss]) for c in cases if loss in c["ms"]]:
                label = f"{title(loss)}, N, L = {shape[0]}, {shape[1]}"
                right.plot(*zip(*points), color=colour, linestyle=line, marker=marker, label=label)
    right.set(xscale="log", yscale="log", xlabel="ms a step", ylabel="variance of a row's gradient")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=3, fontsize=7)


def language_model(figure) -> None:
    report = result("language_model")
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, times), colour, marker in zip(report["times"].items(), COLOURS, MARKERS):
        runs = [run["curve"] for run in report["runs"] if run["loss"] == name]
        steps = [point["step"] for point in runs[0]]
        found = [mean(point["validation perplexity"] for point in points) for points in zip(*runs)]
        seconds = [step * times["CPU ms a step"] / 1e3 for step in steps]
        for axes, x in ((left, steps), (right, seconds)):
            axes.plot(x, found, color=colour, marker=marker, markersize=3, label=name)
    left.set(xlabel="steps", ylabel="validation perplexity", yscale="log")
    right.set(xlabel="seconds of CPU time")
    left.legend(fontsize=8)


def study(figure) -> None:
    """The top-1, top-5 and top-20 accuracy of every loss on the data whose runs are complete."""
    report = result("study")
    sets = [data for data in PLANS if report["data"][data]["complete"]]
    losses = [loss for loss in reversed(LOSSES) if any(loss in PLANS[data].losses for data in sets)]
    for axes, data in zip(figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets):
        runs = runs_of(report, "test", data)
        for metric, colour, marker in TOPS:
            found = [(place, *spread(runs[loss], metric)) for place, loss in enumerate(losses) if loss in runs]
            place, value, error = zip(*found)
            style = dict(color=colour, marker=marker, linestyle="none", capsize=2, label=metric)
            axes.errorbar(value, place, xerr=error, **style)
        axes.set_title(data, fontsize=9)
        axes.set_xlabel("percent of test rows")
        axes.set_yticks(range(len(losses)), losses)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


# By name, the function that draws a plot, the results that it is drawn from, and its size in inches.
PLOTS = {
    "time_length": (time_length, ("cpu",), (7.5, 4.2)),
    "time_samples_rank": (time_samples_rank, ("cpu",), (7.5, 3.6)),
    "memory_length": (memory_length, ("cpu",), (7.5, 3.2)),
    "study": (study, ("study",), (10, 4.8)),
    "gradient": (gradient, ("gradient", "gradient_cpu"), (9, 4.2)),
    "language_model": (language_model, ("language_model",), (9, 3.8)),
}


def draw(name: str, path: Path) -> None:
    """Draws one plot, whose description names the digest of its results."""
    function, results, size = PLOTS[name]
    save_svg(function, size, path, Description=f"results {digest(*results)}", Title=name)
