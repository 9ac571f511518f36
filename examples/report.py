"""A run's figures: a table on the terminal, and JSON."""

import json
from pathlib import Path


def table(rows: dict[str, dict[str, float | None]], unit: float = 100.0, digits: int = 1) -> str:
    """Rows of figures, each multiplied by `unit`, under their names; a missing figure is a dash."""
    columns = list(next(iter(rows.values()), ()))
    first = max(map(len, rows), default=0)

    def cell(value: float | None, column: str) -> str:
        text = "-" if value is None else f"{unit * value:.{digits}f}"
        return text.rjust(max(len(column), 6))

    lines = [f"{'':{first}}  " + "  ".join(c.rjust(6) for c in columns)]
    lines += [f"{name.ljust(first)}  " + "  ".join(cell(row[c], c) for c in columns) for name, row in rows.items()]
    return "\n".join(lines)


def write(path: Path, result: dict) -> None:
    """Writes a result whole or not at all: a run that is cut short leaves the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)
