"""Every table and plot of README.md and docs/, from the committed JSON of benchmarks/results.

A table stands between the marks ``<!-- NAME table -->`` and ``<!-- end -->`` of a page, a plot in docs/img. Each plot
names in its metadata the digest of the results that it was made from, so that a test can tell a stale plot. Columns
whose figures have not been measured are left out.

    python -m benchmarks.tables            # or: make tables
"""

import re
from collections.abc import Callable
from statistics import mean, stdev
from statistics import median as median_of

from benchmarks import ROOT
from benchmarks.committed import (
    bias_is_seen,
    grid,
    median,
    ms,
    ratio_to,
    result,
    show,
    time_and_ratio,
    title,
    where,
    with_ratio,
)
from benchmarks.linear import PLAIN, SAMPLED, TOPK
from benchmarks.peers import PEERS
from benchmarks.study.tables import TABLES as STUDY

IMAGES = ROOT / "docs" / "img"
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("choosing", "design", "performance", "study", "study_tables")))
LOSSES = ("cross-entropy", "topk_fast", "sampled cross-entropy", "pytopk")
LOSSES_IN_README = ("cross-entropy", "sampled cross-entropy", "topk_fast", "pytopk")
# Of the sampled cross-entropy's time and memory to PLAIN, at L = 100 000; with sparse_grad the second of each.
LINEAR_GOALS = {"time": (0.4, 0.35), "memory": (0.25, 0.1)}
LOGITS = {"species": "logits of the 16S model", "species_logits": "logits of the 16S model", "normal": "N(0, 1)"}


def cases_of(report: dict, *groups: str) -> list[dict]:
    """The cases of some groups, those with many classes first."""
    return sorted((c for c in report["cases"] if c["group"] in groups), key=lambda c: -c["L"])


def times_table(cases: list[dict], columns: dict[str, Callable[[dict], str]], note: str, report: dict) -> str:
    """A row of each case: its columns, by title, then the times of the losses."""
    names = [name for name in LOSSES if all(name in c["ms"] for c in cases)]
    rows = [[*(cell(c) for cell in columns.values()), *(time_and_ratio(c, name) for name in names)] for c in cases]
    note += " The sampled cross-entropy has B = 16." * ("sampled cross-entropy" in names)
    note += " In brackets stands the ratio to cross-entropy." * ("cross-entropy" in names)
    return show([*columns, *map(title, names)], rows, note, report)


def shape(case: dict) -> str:
    return f"{case['N']}, {case['L']}"


def times_of(report: dict, n: int, length: int, name: str) -> list[float]:
    """The times of a loss in all cases of a shape, on normal scores, with K = 5, epsilon 1 and, where it has a B, 5."""
    others = report["environment"]["instruction_sets"][1:]
    wanted = {"N": n, "L": length, "scores": "normal", "k": 5}
    if name in ("topk_fast", "pytopk"):
        wanted |= {"epsilon": 1.0, "n_sample": 5}
    cases = [c for c in report["cases"] if wanted.items() <= c.items() and c["group"] not in others]
    return [median(c, name) for c in cases if name in c["ms"]]


def speed_table() -> str:
    """README's: many classes, with the last layer and without it."""
    linear, report, rows, ranges = result("linear_cpu"), result("cpu"), [], []
    for case in cases_of(linear, "linear"):
        row = ["layer and loss, N, D, L = {N}, {D}, {L}".format(**case)]
        for name in (PLAIN, SAMPLED, TOPK):
            time, peak = case["ms"][name]["both"]["median"], case["peak_bytes"][name]
            shares = time / case["ms"][PLAIN]["both"]["median"], peak / case["peak_bytes"][PLAIN]
            row.append(f"{ms(time)} ms ({shares[0]:.2f}), {peak / 2**20:.0f} MiB ({shares[1]:.2f})")
        rows.append([*row, "-"])
    for n, length in dict.fromkeys((c["N"], c["L"]) for c in cases_of(report, "goals") if c["L"] >= 10_000):
        found = [times_of(report, n, length, name) for name in LOSSES_IN_README]
        plain = found[0]
        cells = [ratio_to(median_of(times), median_of(plain)) if times else "-" for times in found]
        rows.append([f"loss on logits, N, L = {n}, {length}", *cells])
        ranges.append(f"{ms(min(plain))} to {ms(max(plain))} ms at L = {length}")
    note = (
        "Forward + backward on N(0, 1) scores or features, epsilon = 1, and the peak of extra memory; in brackets the "
        "ratio to cross-entropy. On logits a figure is the median of all cases of one run that have the shape; "
        f"cross-entropy's range from {' and '.join(ranges)}."
    )
    if (layer := where(linear["environment"])) != where(report["environment"]):
        note += f" The layer: {layer} Logits:"
    return show(["", "cross-entropy", "sampled, B = 16", "noised top-5, B = 5", "pytopk"], rows, note, report)


def goals_table() -> str:
    """Times beside the goals that the design sets for the top-K loss, as ratios to two other losses."""
    report = result("cpu")

    def goal(case: dict) -> str:
        to_plain, to_pytopk = report["goals"][str(case["L"])]
        return f"{to_plain:g} of cross-entropy" if case["n_sample"] == 5 else f"1/{1 / to_pytopk:.0f} of pytopk"

    def reached(case: dict) -> str:
        ours, plain, theirs = (median(case, name) for name in ("topk_fast", "cross-entropy", "pytopk"))
        return f"{ours / plain:.2f}" if case["n_sample"] == 5 else f"1/{theirs / ours:.0f}"

    columns = {"N, L": shape, "B": lambda c: str(c["n_sample"]), "epsilon": lambda c: f"{c['epsilon']:g}"}
    columns |= {"goal": goal, "reached": reached}
    return times_table(cases_of(report, "goals"), columns, "Forward + backward, K = 5, on N(0, 1) scores.", report)


def scores_table() -> str:
    """How the kind of the scores changes the time."""
    report = result("cpu")
    cases = cases_of(report, "scores")
    columns = {"scores": lambda c: LOGITS.get(c["scores"], c["scores"]), "epsilon": lambda c: f"{c['epsilon']:g}"}
    return times_table(cases, columns, f"N, L = {shape(cases[0])}, B = {cases[0]['n_sample']}.", report)


def instructions_table() -> str:
    """The losses under each instruction set."""
    report = result("cpu")
    cases = cases_of(report, *report["environment"]["instruction_sets"])
    return times_table(cases, {"N, L": shape, "instructions": lambda c: c["group"]}, "B = 5.", report)


def peers_table() -> str:
    """Every peer at two shapes: time, its ratio to cross-entropy, peak memory in units of the scores."""
    report = result("cpu")
    cases, rows = cases_of(report, "peers"), []
    names = [name for name in PEERS if all(name in c["ms"] for c in cases)]
    for name in sorted(names, key=lambda name: median(cases[0], name)):
        row = [f"**{title(name)}**" if PEERS[name].own else name]
        for c in cases:
            peak = c["peak_bytes"].get(name)
            row += [time_and_ratio(c, name), "-" if peak is None else f"{peak / (4 * c['N'] * c['L']):.1f}"]
        rows.append(row + [PEERS[name].compared])
    head = ["loss", *(title for c in cases for title in (f"N, L = {shape(c)}", "memory")), "what it is"]
    note = (
        f"Forward + backward, K = {cases[0]['k']}, B = {cases[0]['n_sample']}, epsilon = {cases[0]['epsilon']:g}, "
        "N(0, 1) scores; in brackets the ratio to cross-entropy; peak extra memory in units of the scores, the "
        "gradient (1.0) included."
    )
    return show(head, rows, note, report)


def linear_table() -> str:
    """The linear form: times and memory, with their ratio to the plain form."""
    report = result("linear_cpu")
    rows = []
    for case in cases_of(report, "linear"):
        plain, plain_bytes = case["ms"][PLAIN]["both"]["median"], case["peak_bytes"][PLAIN]
        first = "{N}, {D}, {L}".format(**case)
        for name, parts in case["ms"].items():
            t, peak = {part: value["median"] for part, value in parts.items()}, case["peak_bytes"][name]
            row = [first, name, f"{t['forward']:.0f} ms", f"{t['backward']:.0f} ms"]
            row += [f"{t['both']:.0f} ms ({t['both'] / plain:.2f})", f"{t['optimizer']:.1f} ms"]
            rows.append(row + [f"{peak / 2**20:.0f} MiB ({peak / plain_bytes:.2f})"])
        rows += [[first, name, *[""] * 4, reason] for name, reason in case["left_out"].items()]
    head = ["N, D, L", "", "forward", "backward", "both", "optimizer", "peak extra memory"]
    (time, sparse_time), (memory, sparse_memory) = LINEAR_GOALS["time"], LINEAR_GOALS["memory"]
    note = (
        f"In brackets the ratio to {PLAIN}. Goals of the sampled cross-entropy with B = 16 at L = 100 000: {time} of "
        f"the time and {memory} of the memory; with sparse_grad {sparse_time} and {sparse_memory}. The memory contains "
        "the weight's gradient."
    )
    return show(head, rows, note, report)


def head_table() -> str:
    """The head over all species: what a training step takes, with its ratio to cross-entropy, and the accuracy."""
    report, memory = result("all_species"), result("all_species_memory")
    peaks = {name: found["MiB a step"] for name, found in memory["losses"].items()}
    names = {"cross-entropy": PLAIN, "sampled": SAMPLED, "topk": TOPK}
    plain, rows = report["losses"]["cross-entropy"], []
    for name, found in report["losses"].items():
        cells = [with_ratio(found[key], "ms", plain[key]) for key in ("ms a step", "CPU ms a step")]
        cells.append(with_ratio(peaks[name], "MiB", peaks["cross-entropy"]))
        rows.append([names[name], *cells, *(f"{100 * found[f'top-{k}']:.1f}" for k in (1, 5, 10))])
    note = (
        f"{report['classes']} species, {len(plain['losses'])} steps of 256 rows, with the reading of the data and the "
        "optimizers; 256 features. Cross-entropy has a dense gradient and Adam, the others a row-sparse gradient of "
        "the weight and SparseAdam. Memory is what a step takes at its peak beyond what weights, optimizers' state and "
        f"data hold (commit {memory['environment']['commit']}). Accuracy in percent of {report['test rows']} test "
        "rows, which are of species with four genes or more; one seed, one run of each loss, ten steps in turn, and "
        "settings that were chosen by hand on validation rows. In brackets the ratio to the first."
    )
    head = ["", "time a step", "CPU time a step", "memory of a step", "top-1", "top-5", "top-10"]
    return show(head, rows, note, report)


def gradient_table() -> str:
    """The top-K loss: variance and bias against B, and what a second buys."""
    report, times = result("gradient"), result("gradient_cpu")
    rows, shapes = [], list(dict.fromkeys((c["N"], c["L"]) for c in cases_of(times, "gradient")))
    for b in dict.fromkeys(q["n_sample"] for q in report["quality"]):
        row = [str(b)]
        for q in (q for q in report["quality"] if q["n_sample"] == b):
            row.append(f"{q['variance']:.4f}")
            row.append(f"{q['bias_squared']:.1e}" if bias_is_seen(q, report) else "none seen")
        for shape in shapes:
            (case,) = (c for c in times["cases"] if (c["N"], c["L"], c["n_sample"]) == (*shape, b))
            ours = median(case, "topk_fast")
            theirs = f"{median(case, 'pytopk') / ours:.0f}" if "pytopk" in case["ms"] else "-"
            row.append(f"{ms(ours)} ms ({theirs})")
        rows.append(row)
    head = ["B"]
    for a in dict.fromkeys(q["activation"] for q in report["quality"]):
        head += [f"variance, a = {abs(a):.1f}", "bias²"]
    head += [f"step at {n}, {length}" for n, length in shapes]
    note = (
        f"Gradient of one row of {report['L']} classes, K = {report['k']}, epsilon = {report['epsilon']:g}: variance "
        "summed over the classes, squared length of the bias (where above two standard errors), from "
        f"{report['repetitions']} repetitions against {report['exact_samples']} samples; a is the mean of the hinge's "
        "argument. Steps of topk_fast, in brackets how many times longer pytopk's take at the same B. "
    )
    machines = f"Variance and bias: {where(report['environment'])} Steps: {where(times['environment'])}"
    return grid(head, rows) + "\n\n" + note + machines


def sampling_table() -> str:
    """The sampled cross-entropy: the variance that the label has, and what B samples add to it."""
    report, rows = result("gradient"), []
    for model in report["sampling"]:
        own, label = model["model_variance"], model["label_variance"]
        row = [LOGITS.get(model["logits"], model["logits"]), f"{model['rows']}, {model['L']}", f"{own:.3f}"]
        row.append(f"{label:.3f} ± {model['label_variance_error']:.3f}")
        rows.append(row + [f"{s['variance']:.4f} (1/{label / s['variance']:.1f})" for s in model["samples"]])
    head = ["logits", "rows, L", "label of the model", "label of the data"]
    head += [f"added, B = {s['n_sample']}" for s in model["samples"]]
    note = (
        "Variance of a row's gradient, summed over the classes, mean over the rows: of cross-entropy's gradient when "
        "the label is drawn from the model, 1 - sum p², and with the labels of the data, the mean of |p - e_y|², with "
        f"its standard error; and what B samples add to it, from {report['draws']} draws, in brackets as a share of "
        "the label's."
    )
    return show(head, rows, note, report)


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
            row.append(with_ratio(value, unit, base))
        rows.append(row)
    head = ["loss", "test perplexity", "seeds", "CPU time a step", "of it head and loss", "peak memory of training"]
    settings = report["settings"]
    note = (
        f"A vocabulary of {settings['different words']} words, {settings['steps']} steps of {settings['words a step']} "
        f"words, {settings['width']} features. Perplexity is exact, with the standard deviation over seeds. In "
        "brackets stands the ratio to cross-entropy."
    )
    return show(head, rows, note, report)


def model_table() -> str:
    """The model of the CUDA kernels' forward before and after their rewrite, beside the time of the scores' bytes."""
    report = result("model")
    sections, rows, shown = ("before", "after"), {}, (("forward", "normal", 6), ("forward", "gumbel", 1))
    for section in sections:
        for c in (c for c in report[section]["cases"] if (c["step"], c["law"], c["k"]) in shown):
            loss = "sampled cross-entropy" if c["law"] == "gumbel" else "top-5"
            row = (f"{c['n_rows']}, {c['n_classes']}", c["dtype"], loss, str(c["n_sample"]))
            rows.setdefault(row, {})[c["gpu"], section] = f"{ms(c['estimate_us'])} us"
            rows[row][c["gpu"], "bytes"] = f"{ms(c['byte_floor_us'])} us"
    gpus = list(dict.fromkeys(c["gpu"] for c in report["after"]["cases"]))
    columns = [(gpu, kind) for gpu in gpus for kind in (*sections, "bytes")]
    head = ["N, L", "dtype", "loss", "B"] + [f"{gpu}, {kind}" for gpu, kind in columns]
    commits = (f"{section}: commit {report[section]['environment']['commit']}" for section in sections)
    note = (
        "A model, of which nothing was measured on a GPU: the forward at epsilon = 1 on standard normal scores, with "
        "K = 5 and normal noise or as a sampled cross-entropy, 2 us of each launch included, and the time of the "
        f"scores' bytes. {'; '.join(commits)}."
    )
    return grid(head, [[*row, *(times[column] for column in columns)] for row, times in rows.items()]) + "\n\n" + note


def triton_table() -> str:
    """Registers, spills and instructions of the Triton kernel that searches, for one of the targets."""
    report = result("triton_static")
    rows = [
        [
            f"{c['n_rows']}, {c['n_classes']}",
            c["dtype"].removeprefix("torch."),
            c["law"] + ", dense" * (c["sampler"] == "dense"),
            c["ranks"].strip("(,)"),
            c["n_sample"],
            *(str(c[name]) for name in ("registers", "spill_loads_and_stores", "instructions")),
        ]
        for c in report["kernels"]
        if (c["target"], c["kernel"]) == ("sm_90", "search_kernel")
    ]
    head = ["N, L", "dtype", "law", "ranks", "B", "registers", "spills", "instructions"]
    return grid(head, rows) + "\n\n" + _counted("The search was compiled for sm_90.", report)


def triton_variants_table() -> str:
    """How many kernels Triton compiles as something varies."""
    report = result("triton_static")
    rows = [[what, str(count)] for what, count in report["variants"].items()]
    return grid(["what varies", "kernels"], rows) + "\n\n" + _counted("The counts include the gradient.", report)


def _counted(note: str, report: dict) -> str:
    about = report["environment"]
    return f"{note} Triton {about['triton']}, commit {about['commit']}, {about['date'][:10]}."


TABLES = {
    "speed": speed_table,
    "goals": goals_table,
    "peers": peers_table,
    "scores": scores_table,
    "instructions": instructions_table,
    "linear": linear_table,
    "head": head_table,
    "gradient": gradient_table,
    "sampling": sampling_table,
    "language model": language_table,
    "model": model_table,
    "triton": triton_table,
    "triton variants": triton_variants_table,
    **STUDY,
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
