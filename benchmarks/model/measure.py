"""Measures the model's cases on a GPU, and prints each time beside the model's, which it may refute.

A step is captured in a CUDA graph, so that Python's time is not in it, and L2 is emptied before each replay. The
model's figures are those of the last section of results/model.json for a GPU whose name the device's has.

    python -m benchmarks.model.measure             # writes $OUT/model_gpu.json (out/ by default)
"""

import json
import os
import statistics
from pathlib import Path

import torch

from benchmarks import ROOT, harness
from examples.machine import environment

from .cases import Case, Problem
from .gpus import GPUS

RESULT = ROOT / "benchmarks" / "results" / "model.json"
REPEATS = 20


def modelled(device_name: str) -> list[tuple[Case, float]]:
    """Cases with the model's microseconds, those of the losses (k = 6) first; all cases of an H100 for other GPUs."""
    (*_, section) = json.loads(RESULT.read_text()).values()
    known = next((name for name in GPUS if name in device_name.split()), None)
    rows = [row for row in section["cases"] if row["gpu"] == (known or "H100")]
    cases = [(Case(*(row[name] for name in Case._fields)), row["estimate_us"] if known else None) for row in rows]
    return sorted(cases, key=lambda item: (item[0].k != 6, item[0].law != "normal"))


def measured(case: Case) -> float:
    """Microseconds of a step, without Python's time."""
    problem = Problem(case, case.n_rows, device="cuda")
    problem.results()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.results()
    times = [harness.time_passes([graph.replay], "cuda")[0] for _ in range(REPEATS + 3)]
    return 1e3 * statistics.median(times[3:])


def main():
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.model.measure needs a GPU that torch.cuda sees")
    report = {"environment": environment("cuda"), "cases": []}
    path = Path(os.environ.get("OUT", ROOT / "out")) / "model_gpu.json"
    for case, model in modelled(torch.cuda.get_device_name()):
        time = round(measured(case), 2)
        report["cases"].append(case._asdict() | {"measured_us": time, "model_us": model})
        harness.write(path, report)
        beside = f"model {model} us, measured / model {time / model:.2f}" if model else "not modelled"
        print(f"{case}: measured {time} us; {beside}", flush=True)


if __name__ == "__main__":
    main()
