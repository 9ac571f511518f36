"""Runs everything that only a GPU can show, in limited time: device tests, sanitizers, benchmarks, profile.

Each step has its own time limit, and the next step runs even if one fails or is cut short. A benchmark that is cut
short after it wrote results has not failed. The output of all steps goes to $OUT/gpu.log (out/ by default), their
outcomes to $OUT/steps.json, and their results beside them, to gpu.json, model_gpu.json and linear_gpu.json. The last
line that is printed names the steps that failed.

    make gpu                                   # builds, then runs this; 8 minutes at most
    make gpu ARGS="--set quick"                # fewer cases
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import ROOT, harness
from examples.machine import environment

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


def steps(which: str) -> list[Step]:
    """The steps, the most informative for its time first; 480 seconds in all."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not host", "-rs"]
    pytest += ["-vv", "-o", "faulthandler_timeout=60"]  # The log names a test that hangs, and says where it does.
    # Compilation for the device takes most of the tests' time.
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    loss = [sys.executable, "-m", "benchmarks.loss", "--device", "cuda"]
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
        Step("benchmark", 100, [*loss, "--set", which], results="gpu.json"),
        Step("model", 20, [sys.executable, "-m", "benchmarks.model.measure"], results="model_gpu.json"),
        Step("linear", 45, [sys.executable, "-m", "benchmarks.linear"], results="linear_gpu.json"),
        Step("profile", 30, profile, optional=True),
        synccheck,
    ]


def summary(output: str) -> str:
    """The last lines of pytest and of a sanitizer in the output of a step, if there are any."""
    counts = r"^=*\s*(\d+ (?:passed|failed|skipped|errors?|deselected)\b.* in [\d.]+s)"
    lines = (re.findall(pattern, output, re.MULTILINE) for pattern in (counts, r"\b((?:ERROR|RACECHECK) SUMMARY: .*)"))
    return "; ".join(found[-1] for found in lines if found)


@contextmanager
def heeding_interrupts():
    """Lets the processes that start here be interrupted, which a shell's background job would not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a handler does not outlive exec
    yield
    signal.signal(signal.SIGINT, before)


def stop(process: subprocess.Popen):
    """Interrupts a step, so that it can report, then kills it and the processes that it started."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS)
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(step: Step, log, folder: Path, seconds: float) -> dict:
    """Runs a step for at most ``seconds`` and returns its outcome.

    Its output goes to ``log``, its results to ``folder``.
    """
    results = folder / step.results if step.results else None
    if results:
        results.unlink(missing_ok=True)  # of an earlier run
    print(f"\n== {step.name}: {' '.join(step.command)}", file=log, flush=True)
    begin, start = time.monotonic(), os.path.getsize(log.name)
    ended = {"step": step.name, "optional": step.optional, "command": step.command, "summary": ""}
    if seconds <= 0:
        return ended | {"outcome": "no time left", "seconds": 0.0}
    if shutil.which(step.command[0]) is None:
        return ended | {"outcome": f"{step.command[0]} is not installed", "seconds": 0.0}
    place = {"cwd": ROOT, "env": os.environ | {"OUT": str(folder)}, "start_new_session": True}
    with heeding_interrupts():
        process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT, **place)
    try:
        code = process.wait(min(step.seconds, seconds))
        outcome = "passed" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        stop(process)
        outcome = "cut short, with results" if results and results.exists() else "cut short"
    finally:
        if process.poll() is None:  # this run itself is interrupted
            stop(process)
    with open(log.name, errors="replace") as written:
        written.seek(start)
        words = summary(written.read())
    return ended | {"outcome": outcome, "summary": words, "seconds": round(time.monotonic() - begin, 1)}


def described(ended: dict) -> str:
    return ": ".join(filter(None, (ended["outcome"], ended["summary"])))


def run_all(todo: list[Step], folder: Path, seconds: float) -> list[str]:
    """Runs the steps, writes the outcomes after each, and returns the steps that failed, with their outcomes."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    report = {"environment": environment("cuda" if torch.cuda.is_available() else "cpu"), "steps": []}
    with open(folder / "gpu.log", "w") as log:
        for step in todo:
            ended = run(step, log, folder, end - time.monotonic())
            report["steps"].append(ended)
            harness.write(folder / "steps.json", report)
            print(f"{step.name:10} {ended['seconds']:6.1f} s  {described(ended)}", flush=True)
    good = ("passed", "cut short, with results")
    return [
        f"{step['step']} ({described(step)})"
        for step in report["steps"]
        if not (step["optional"] or step["outcome"] in good)
    ]


def main(argv: list[str] | None = None):
    names = [step.name for step in steps("full")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=["quick", "full"], default="full", help="cases of the benchmark")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run only these steps")
    parser.add_argument("--seconds", type=float, default=480, help="for all steps together; default 480")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("make gpu needs a GPU that torch.cuda sees")
    folder = Path(os.environ.get("OUT", ROOT / "out")).resolve()  # steps run in ROOT
    todo = [step for step in steps(args.set) if step.name in args.only]
    if failed := run_all(todo, folder, args.seconds):
        raise SystemExit(f"failed: {', '.join(failed)}; {folder / 'gpu.log'} has their output")
    print("no step failed")


if __name__ == "__main__":
    main()
