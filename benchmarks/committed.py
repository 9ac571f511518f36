"""The committed results for tables and plots, and parts of Markdown tables."""

import hashlib
import json
from statistics import mean, stdev

from benchmarks import RESULTS

TITLES = {"topk_fast": "balanced noised top-K"}  # in tables and plots, where the results have other names


def title(name: str) -> str:
    return TITLES.get(name, name)


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def digest(*names: str) -> str:
    """A digest of the results that a plot is drawn from."""
    content = b"".join((RESULTS / f"{name}.json").read_bytes() for name in names)
    return hashlib.sha256(content).hexdigest()[:16]


def median(case: dict, name: str) -> float:
    if name not in case["ms"]:
        raise KeyError(
            f"{name} has no time at N, L = {case['N']}, {case['L']}: {case['left_out'].get(name, 'not asked')}"
        )
    return case["ms"][name]["median"]


def bias_is_seen(q: dict, report: dict) -> bool:
    """Whether the bias exceeds two standard errors, which include the error of the limit, itself an estimate."""
    return q["bias_squared"] > 2 * (q["bias_squared_error"] + q["unit_variance"] / report["exact_samples"])


def spread(runs: list[dict], metric: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds, in percent (of a metric in [0, 1])."""
    values = [100 * r[metric] for r in runs]
    return mean(values), stdev(values)


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def where(e: dict) -> str:
    return f"{e['cpu']}, one thread, torch {e['torch']}, commit {e['commit']}, {e['date'][:10]}."


def ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def with_ratio(value: float, unit: str, base: float) -> str:
    """A figure, in brackets its ratio to another one."""
    return f"{value:.0f} {unit} ({value / base:.2f})"


def show(head: list[str], rows: list[list[str]], note: str, report: dict) -> str:
    """A table, and below it what it has and what it was measured with."""
    return f"{grid(head, rows)}\n\n{note} {where(report['environment'])}"


def time_and_ratio(case: dict, name: str) -> str:
    """A time, in brackets its ratio to cross-entropy where that was measured."""
    if "cross-entropy" not in case["ms"]:
        return f"{ms(median(case, name))} ms"
    return ratio_to(median(case, name), median(case, "cross-entropy"))


def ratio_to(time: float, base: float) -> str:
    """A time, in brackets its ratio to another one."""
    ratio = time / base
    return f"{ms(time)} ms ({ratio:{'.2g' if ratio < 100 else '.0f'}})"
