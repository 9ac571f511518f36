"""Reads the committed results for tables and plots."""

import hashlib
import json
from statistics import mean, stdev

from benchmarks import RESULTS


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
