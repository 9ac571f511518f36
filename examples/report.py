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


def guesses_text(guesses: dict[str, list[str]]) -> str:
    """One line for each true name, the right guess starred."""
    first = max(map(len, guesses))
    starred = {true: ", ".join(f"*{g}*" if g == true else g for g in five) for true, five in guesses.items()}
    return "\n".join(f"{true.ljust(first)}  {five}" for true, five in starred.items())
