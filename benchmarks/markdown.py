"""Parts of Markdown tables."""


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def where(e: dict) -> str:
    return f"{e['cpu']}, one thread, torch {e['torch']}, commit {e['commit']}, {e['date'][:10]}."
