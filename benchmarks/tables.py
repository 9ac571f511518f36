"""Every table and plot of README.md and docs/, from the committed JSON of benchmarks/results.

A table stands between the marks ``<!-- NAME table -->`` and ``<!-- end -->`` of a page, a plot in docs/img. Each plot
names in its metadata the digest of the results that it was made from, so that a test can tell a stale plot.

    python -m benchmarks.tables            # or: make tables
"""

import re
from statistics import mean, stdev

from benchmarks import ROOT
from benchmarks.committed import bias_is_seen, median, result
from benchmarks.markdown import grid, where

IMAGES = ROOT / "docs" / "img"
PAGES = ("README.md", "docs/choosing.md", "docs/performance.md", "docs/study.md")
PLAIN = "linear + cross-entropy"
# Of the sampled cross-entropy's time and memory to PLAIN, at L = 100 000; with sparse_grad the second of each.
LINEAR_GOALS = {"time": (0.4, 0.35), "memory": (0.25, 0.1)}


def ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


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
    head = ["N, L", "B", "epsilon", "topk_fast", "cross-entropy", "pytopk"]
    head += ["to cross-entropy (goal)", "to pytopk (goal)"]
    return grid(head, rows) + "\n\n" + where(report["environment"])


def peers_table() -> str:
    """Every peer at two shapes: time, its ratio to cross-entropy, peak memory in units of the scores."""
    from benchmarks.peers import PEERS  # needs the packages of the peers, which no other table does

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
        f"Forward + backward, K = {first['k']}, B = {first['n_sample']}, epsilon = {first['epsilon']:g}, N(0, 1) "
        "scores; in brackets the ratio to cross-entropy; peak extra memory in units of the scores, the gradient (1.0) "
        "included. "
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
    (time, sparse_time), (memory, sparse_memory) = LINEAR_GOALS["time"], LINEAR_GOALS["memory"]
    note = (
        f"In brackets the ratio to {PLAIN}. B = 16 for the sampled cross-entropy, 5 for the noised top-5. Goals of the "
        f"sampled cross-entropy at L = 100 000: {time} of the time and {memory} of the memory; with sparse_grad "
        f"{sparse_time} and {sparse_memory}. The memory contains the weight's gradient. "
    )
    return grid(head, rows) + "\n\n" + note + where(report["environment"])


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
        f"Gradient of one row of {report['L']} classes, K = {report['k']}, epsilon = {report['epsilon']:g}: variance "
        "summed over the classes, squared length of the bias (where above two standard errors), from "
        f"{report['repetitions']} repetitions against {report['exact_samples']} samples; a is the mean of the hinge's "
        "argument. Steps of topk_fast, in brackets how many times longer pytopk's take at the same B. Central "
        f"differences in float64 agree with the gradient to {worst:.0e} of its largest entry in "
        f"{len(report['gradcheck'])} cases, with both samplers. "
    )
    return grid(head, rows) + "\n\n" + note + where(report["environment"])


def language_table() -> str:
    """The language model: perplexity over seeds, times and memory, with their ratio to cross-entropy."""
    report = result("language_model")
    rows, plain = [], None
    for name, times in report["times"].items():
        runs = [run for run in report["runs"] if run["loss"] == name]
        perplexities, step, head = [run["test perplexity"] for run in runs], "CPU ms a step", "CPU ms of head"
        peak = mean(run["peak MiB"] for run in runs)
        plain = plain or (times[step], times[head], peak)
        deviation = f" ± {stdev(perplexities):.1f}" if len(runs) > 1 else ""
        row = [name, f"{mean(perplexities):.1f}{deviation}", str(len(runs))]
        for value, unit, base in zip((times[step], times[head], peak), ("ms", "ms", "MiB"), plain):
            row.append(f"{value:.0f} {unit} ({value / base:.2f})")
        rows.append(row)
    head = ["loss", "test perplexity", "seeds", "CPU time a step", "of it head and loss", "peak memory of training"]
    settings = report["settings"]
    note = (
        f"A vocabulary of {settings['different words']} words, {settings['steps']} steps of {settings['words a step']} "
        f"words, {settings['width']} features. Perplexity is exact, with the standard deviation over seeds. In "
        "brackets stands the ratio to cross-entropy. "
    )
    return grid(head, rows) + "\n\n" + note + where(report["environment"])


def model_table() -> str:
    """The model of the CUDA kernels' forward before and after their rewrite, beside the time of the scores' bytes."""
    report = result("model")
    sections, rows = ("before", "after"), {}
    for section in sections:
        for c in (c for c in report[section]["cases"] if c["step"] == "forward" and c["k"] == 6):
            row = (f"{c['n_rows']}, {c['n_classes']}", c["dtype"], c["law"], str(c["n_sample"]))
            rows.setdefault(row, {})[c["gpu"], section] = f"{ms(c['estimate_us'])} us"
            rows[row][c["gpu"], "bytes"] = f"{ms(c['byte_floor_us'])} us"
    gpus = list(dict.fromkeys(c["gpu"] for c in report["after"]["cases"]))
    columns = [(gpu, kind) for gpu in gpus for kind in (*sections, "bytes")]
    head = ["N, L", "dtype", "law", "B"] + [f"{gpu}, {kind}" for gpu, kind in columns]
    commits = (f"{section}: commit {report[section]['environment']['commit']}" for section in sections)
    note = (
        "A model, of which nothing was measured on a GPU: the forward with K + 1 = 6 and epsilon = 1 on standard "
        f"normal scores, 2 us of each launch included, and the time of the scores' bytes. {'; '.join(commits)}."
    )
    return grid(head, [[*row, *(times[column] for column in columns)] for row, times in rows.items()]) + "\n\n" + note


TABLES = {
    "cpu": goals_table,
    "peers": peers_table,
    "scores": scores_table,
    "linear": linear_table,
    "gradient": gradient_table,
    "language model": language_table,
    "model": model_table,
}
MARK = re.compile(r"<!-- ([a-z -]+) table -->\n(.*?)<!-- end -->", re.DOTALL)


def filled(page: str) -> str:
    """The text of a page, with its tables made from the results."""
    return MARK.sub(lambda m: f"<!-- {m[1]} table -->\n{TABLES[m[1]]()}\n<!-- end -->", (ROOT / page).read_text())


def main():
    from benchmarks import plots  # needs matplotlib, which the tables do not

    for page in PAGES:
        (ROOT / page).write_text(filled(page))
    for name in plots.PLOTS:
        plots.draw(name, IMAGES / f"{name}.svg")


if __name__ == "__main__":
    main()
