"""A run's tables on the terminal."""

from __future__ import annotations


def table(rows: dict[str, dict[str, float | None]], unit: float = 100.0, digits: int = 1) -> str:
    """Rows of figures, each multiplied by `unit`, under their names; a missing figure is a dash."""
    columns = list(next(iter(rows.values())))
    first = max(map(len, rows))

    def cell(value: float | None, column: str) -> str:
        text = "-" if value is None else f"{unit * value:.{digits}f}"
        return text.rjust(max(len(column), 6))

    lines = [f"{'':{first}}  " + "  ".join(c.rjust(6) for c in columns)]
    lines += [f"{name.ljust(first)}  " + "  ".join(cell(row[c], c) for c in columns) for name, row in rows.items()]
    return "\n".join(lines)
