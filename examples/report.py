"""A run's tables on the terminal and what a reader of its JSON needs to repeat it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "torchmetrics", "matplotlib", "tqdm", "pytopk")


def environment() -> dict:
    """Command, date, versions and processor of this run."""
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


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
