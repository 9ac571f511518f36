"""Runs everything that only a GPU can show, in limited time: device tests, sanitizers, benchmarks, profile.

Each step has its own time limit, and the next step runs even if one fails or is cut short. A benchmark that is cut
short after it wrote results has not failed. The output of all steps goes to $OUT/gpu.log (out/ by default), their
outcomes to $OUT/steps.json, and their results beside them, to gpu.json, model_gpu.json and linear_gpu.json. The last
line that is printed names the steps that failed.

    make gpu                                   # builds, then runs this; 8 minutes at most
    make gpu ARGS=--quick                      # fewer cases
    make gpu ARGS="--only tests memcheck"      # two of the steps
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import ROOT
from examples.machine import environment
from examples.report import write

TESTS = ["tests/contract/test_contract.py", "tests/kernels/test_cuda.py", "tests/kernels/test_triton.py"]
# The sanitizers make kernels tens of times slower, so they get only a few cases, which reach each kernel: lists that
# overflow, in CUDA and in Triton; a row that several blocks collect; a warp for each row, with losses and gradients.
FEW = (
    "list_holds or (several_blocks and normal) or (test_cuda and excesses_and_gradients and normal and float32 and 900)"
)
LAST_WORDS = 5  # seconds in which a step that is cut short may still report, as pytest does


class Step(NamedTuple):
    name: str
    seconds: float  # at most
    command: list[str]
    optional: bool = False  # a failure is only reported, since profilers are not allowed everywhere
    results: str = ""  # the file in $OUT; with it, a step that was cut short has not failed


def steps(quick: bool) -> list[Step]:
    """The steps, the most informative for its time first; 480 seconds in all."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not host", "-rs"]
    pytest += ["-vv", "-o", "faulthandler_timeout=60"]  # The log names a test that hangs, and says where it does.
    # Compilation for the device takes most of the tests' time.
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    few, on_gpu = ["--quick"] if quick else [], ["--device", "cuda"]
    loss = [sys.executable, "-m", "benchmarks.loss", *on_gpu]
    counters = ["--metrics", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "--clock-control", "none"]
    profile = ["ncu", "--csv", *counters, "-k", "regex:search_kernel|gradient_kernel", *loss, "--once"]
    # Python packages probe the driver by calls that may fail; only what kernels do counts as an error here.
    sanitizer = ["compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9", "--tool"]
    memcheck, racecheck, synccheck = (
        Step(tool, 45, [*sanitizer, tool, *pytest, *TESTS[1:], "-k", FEW])
        for tool in ("memcheck", "racecheck", "synccheck")
    )
    return [
        Step("tests", 150, [*pytest, *workers, *TESTS]),
        memcheck,
        racecheck,
        Step("benchmark", 100, [*loss, *few], results="gpu.json"),
        Step("model", 20, [sys.executable, "-m", "benchmarks.model.measure"], results="model_gpu.json"),
        Step("linear", 45, [sys.executable, "-m", "benchmarks.linear", *on_gpu, *few], results="linear_gpu.json"),
        Step("profile", 30, profile, optional=True),
        synccheck,
    ]


def summary(output: str) -> str:
    """The last lines of pytest and of a sanitizer in the output of a step, if there are any."""
    counts = r"^=*\s*(\d+ (?:passed|failed|skipped|errors?|deselected)\b.* in [\d.]+s)"
    lines = (re.findall(pattern, output, re.MULTILINE) for pattern in (counts, r"\b((?:ERROR|RACECHECK) SUMMARY: .*)"))
    return "; ".join(found[-1] for found in lines if found)


def run(step: Step, log, folder: Path, seconds: float) -> dict:
    """Runs a step for at most ``seconds``, with its output in ``log`` and its results in ``folder``; its outcome.

    A step that is cut short is interrupted, so that it can report, and killed with the processes that it started.
    """
    results = folder / step.results if step.results else None
    if results:
        results.unlink(missing_ok=True)  # of an earlier run
    print(f"\n== {step.name}: {' '.join(step.command)}", file=log, flush=True)
    begin, start = time.monotonic(), os.path.getsize(log.name)
    ended = {"step": step.name, "optional": step.optional, "command": step.command, "summary": "", "seconds": 0.0}
    if seconds <= 0:
        return ended | {"outcome": "no time left"}
    if shutil.which(step.command[0]) is None:
        return ended | {"outcome": f"{step.command[0]} is not installed"}
    place = {"cwd": ROOT, "env": os.environ | {"OUT": str(folder)}, "start_new_session": True}
    process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT, **place)
    try:
        code = process.wait(min(step.seconds, seconds))
        outcome = "passed" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        outcome = "cut short, with results" if results and results.exists() else "cut short"
    finally:
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with open(log.name, errors="replace") as written:
        written.seek(start)
        words = summary(written.read())
    return ended | {"outcome": outcome, "summary": words, "seconds": round(time.monotonic() - begin, 1)}


def described(ended: dict) -> str:
    return ": ".join(filter(None, (ended["outcome"], ended["summary"])))


def run_all(todo: list[Step], folder: Path, seconds: float) -> list[str]:
    """Runs the steps, writes the outcomes after each, and returns the steps that failed, with their outcomes."""
    folder.mkdir(parents=True, exist_ok=True)
    # A shell's background job ignores interrupts, and so would its steps; a handler does not outlive exec.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    end = time.monotonic() + seconds
    report = {"environment": environment("cuda" if torch.cuda.is_available() else "cpu"), "steps": []}
    with open(folder / "gpu.log", "w") as log:
        for step in todo:
            ended = run(step, log, folder, end - time.monotonic())
            report["steps"].append(ended)
            write(folder / "steps.json", report)
            print(f"{step.name:10} {ended['seconds']:6.1f} s  {described(ended)}", flush=True)
    signal.signal(signal.SIGINT, before)
    good = ("passed", "cut short, with results")
    return [
        f"{step['step']} ({described(step)})"
        for step in report["steps"]
        if not (step["optional"] or step["outcome"] in good)
    ]


def main(argv: list[str] | None = None):
    names = [step.name for step in steps(quick=False)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases of the benchmarks")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run only these steps")
    parser.add_argument("--seconds", type=float, default=480, help="for all steps together; default 480")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("make gpu needs a GPU that torch.cuda sees")
    folder = Path(os.environ.get("OUT", ROOT / "out")).resolve()  # steps run in ROOT
    todo = [step for step in steps(args.quick) if step.name in args.only]
    if failed := run_all(todo, folder, args.seconds):
        raise SystemExit(f"failed: {', '.join(failed)}; {folder / 'gpu.log'} has their output")
    print("no step failed")


if __name__ == "__main__":
    main()
