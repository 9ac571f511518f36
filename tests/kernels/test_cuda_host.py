"""Contract under test: the CUDA backend's host code, without a GPU.

A child process loads a stand-in for the CUDA runtime (`standin/standin.h`) before a CUDA build of torch, and runs the
checks of `standin/*.py` there. Each check is a test here, with all its cases. `make cuda-host` makes the environment.
"""

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
import torch

import find_cuda
import topk_fast
from testing import ROOT

FOLDER = ROOT / "tests" / "kernels" / "standin"
SUITES = [FOLDER / "bits.py", FOLDER / "launches.py", FOLDER / "limits.py"]
CHECKS = [f"{path.stem}::{name}" for path in SUITES for name in re.findall(r"(?m)^def (test_\w+)", path.read_text())]


def toolkit():
    """The root of the CUDA toolkit, whose headers the stand-in needs."""
    return find_cuda.find_toolkit(find_cuda.find_nvcc())[0]


def why_not():
    """Why the checks cannot run here, or None."""
    remedy = "`make cuda-host` makes an environment for it"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is no CUDA build; {remedy}"
    if "cuda" not in topk_fast.available_backends("cuda"):
        return f"{topk_fast.build_info()['backends']['cuda']}; {remedy}"
    if shutil.which("g++") is None:
        return "there is no g++, which the stand-in is compiled with"
    try:
        toolkit()
    except find_cuda.Unavailable as reason:
        return str(reason)
    return None


WHY_NOT = why_not()
pytestmark = [pytest.mark.host, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


def compiled(out):
    command = [
        "g++",
        "-shared",
        "-fPIC",
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        "-fvisibility=hidden",  # the launchers of kernels.cu must not take the place of the extension's
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",  # nvcc knows them
        f"-I{toolkit() / 'include'}",
        *sorted(FOLDER.glob("*.cpp")),
        "-Wl,-soname,libcuda.so.1",  # so that whoever loads the driver finds this library
        "-ldl",
        "-o",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def run_pytest(tmp_path_factory):
    """Runs tests in a process with the stand-in, and returns their cases as JUnit's elements."""
    built = Path(topk_fast.__file__).parent
    sources = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")]
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    (binary,) = built.glob("_C_cuda.*")
    assert newest.stat().st_mtime <= binary.stat().st_mtime, f"{newest} has changed: build the extension again"
    folder = tmp_path_factory.mktemp("standin")
    report, log = folder / "report.xml", folder / "log"
    log.touch()
    environment = os.environ | {
        "LD_PRELOAD": str(compiled(folder / "libstandin.so")),
        "STANDIN_LOG": str(log),
        "PYTHONPATH": str(FOLDER),  # for the plugin
    }
    environment.pop("TRITON_INTERPRET", None)  # conftest.py set it, where no GPU was seen
    found = f"pythonpath={built.parent} {ROOT} {ROOT / 'tests'}"  # this package, wherever it was built
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "host_kernels", "-o", found]
    command += ["-o", "junit_logging=all", f"--junitxml={report}"]

    def run(*arguments):
        report.unlink(missing_ok=True)
        done = subprocess.run(
            [*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
        )
        assert report.exists(), f"the tests broke off:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        return list(xml.parse(report).iter("testcase"))

    return run


@pytest.fixture(scope="module")
def outcomes(run_pytest):
    """The cases of each check."""
    by_check = {}
    for case in run_pytest(*SUITES):
        name = f"{case.get('classname').rpartition('.')[2]}::{case.get('name').partition('[')[0]}"
        by_check.setdefault(name, []).append(case)
    return by_check


def failures(cases):
    """The cases that failed or were skipped; what the others printed is printed."""
    failed = []
    for case in cases:
        said = {part.tag: f"{part.get('message', '')}\n{part.text or ''}" for part in case}
        if said.keys() & {"failure", "error", "skipped"}:
            failed.append(f"{case.get('name')}: {said}")
        elif printed := re.sub(r"-+ [\w ]+ -+\n", "", said.get("system-out", "")).strip():
            print(printed)
    return failed


@pytest.mark.parametrize("name", CHECKS)
def test_under_the_stand_in(outcomes, name):
    assert name in outcomes, f"{name} did not run; these did: {sorted(outcomes)}"
    failed = failures(outcomes[name])
    assert not failed, "\n".join(failed)


def test_the_tests_for_a_device(run_pytest):
    """Those of test_cuda.py for a GPU, in one dtype, so that they are not run for the first time where there is one.

    Not opcheck, whose modes do not go together with `host_kernels`, and not the graph of a whole step, whose replay
    would have to run torch's kernels.
    """
    chosen = "(on_a_device or device-) and not (opcheck or graphs or bfloat16 or float16 or float64)"
    cases = run_pytest(ROOT / "tests" / "kernels" / "test_cuda.py", "-k", chosen)
    print(f"\n{len(cases)} tests for a device")
    failed = failures(cases)
    assert len(cases) > 50 and not failed, "\n".join(failed)
