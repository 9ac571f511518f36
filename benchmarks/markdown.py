"""Parts of Markdown tables."""

from benchmarks.committed import median


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
    text = f"{ms(median(case, name))} ms"
    if "cross-entropy" not in case["ms"]:
        return text
    ratio = median(case, name) / median(case, "cross-entropy")
    return f"{text} ({ratio:{'.2g' if ratio < 100 else '.0f'}})"
