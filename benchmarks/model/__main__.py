"""Prints what a model of the CUDA kernels says they cost, for GPUs that are not at hand; needs nvcc and Triton's tools.

The compiled machine code runs on the CPU, on a share of each case's rows, and its results are compared with the CPU
kernels'. The counts are those of the code; times follow from them by figures of the GPUs (gpus.py), of which latencies
are assumed. A time is the largest of several bounds, so a GPU may be slower, and nothing here was measured.

    python -m benchmarks.model --cases "8192, 32768" --gpus H100
    python -m benchmarks.model --quick             # one case, which the tests run; prints JSON
    python -m benchmarks.model --write after       # all cases, into that section of results/model.json
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks import RESULTS
from examples.machine import stamp

from . import launches, sass
from .cases import Case, all_cases
from .gpus import GPUS
from .report import modelled, text

RESULT = RESULTS / "model.json"
QUICK = [Case(1024, 1000, "float32", "normal", 5, 6)]


def run(cases: list[Case], gpus: list[str], depth: int, say) -> list[dict]:
    out = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lib, path = launches.interpreter(folder), launches.launchers(folder)
        for gpu in (GPUS[name] for name in gpus):
            device = launches.Device(lib, gpu, sass.compiled(gpu.target, folder))
            calls = launches.Calls(path)
            for case in cases:
                out.append(modelled(case, calls, gpu, device, depth))
                say(text(out[-1], case))
    return out


def written(report: dict) -> str:
    """JSON with a case a line."""
    sections = []
    for name, section in report.items():
        cases = ",\n".join(json.dumps(case) for case in section["cases"])
        environment = json.dumps(section["environment"], indent=1)
        sections.append(f'{json.dumps(name)}: {{\n"environment": {environment},\n"cases": [\n{cases}\n]}}')
    return "{\n" + ",\n".join(sections) + "\n}\n"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="only those whose description has this text")
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--depth", type=int, default=1, help="functions by which stages are divided")
    parser.add_argument("--quick", action="store_true", help="one case on an H100, as JSON")
    parser.add_argument("--write", metavar="SECTION", help="of results/model.json, which is replaced")
    args = parser.parse_args(argv)
    if shutil.which("nvcc") is None:
        raise SystemExit("benchmarks.model needs nvcc on the PATH")
    torch.set_num_threads(1)
    if args.quick:
        print(json.dumps(run(QUICK, ["H100"], args.depth, lambda text: None), indent=1))
        return
    cases = [case for case in all_cases() if args.cases in str(case)]
    results = run(cases, args.gpus, args.depth, lambda text: print(text, flush=True))
    if args.write:
        environment = {
            "nvcc": re.search(r"release ([\d.]+)", sass.run("nvcc", "--version"))[1],
            **stamp(),
            "note": "a model: machine code was run on a CPU and counted; no GPU took part",
        }
        report = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        report[args.write] = {"environment": environment, "cases": results}
        RESULT.write_text(written(report))


if __name__ == "__main__":
    main()
