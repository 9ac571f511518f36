"""What a figure was measured with: hardware, versions, commit and command; and the peaks of memory."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import topk_fast

ROOT = Path(__file__).resolve().parent.parent
# Packages that a figure may depend on; torch and Triton stand in topk_fast.build_info().
PACKAGES = ("numpy", "matplotlib", "tqdm", "pytopk", "difftopk", "liger_kernel", "cut_cross_entropy")


def environment(device: str = "cpu") -> dict:
    """Hardware, threads, versions, commit (or $COMMIT), date and command, without which nobody can repeat a result."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    out = {"cpu": cpu.group(1) if cpu else platform.machine(), "threads": torch.get_num_threads()}
    if device == "cuda":
        out |= {"device": torch.cuda.get_device_name(), "cuda_version": torch.version.cuda}
        out["driver"] = _output("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return out | versions | {"topk_fast": topk_fast.__version__} | topk_fast.build_info() | stamp()


def stamp() -> dict[str, str]:
    """The commit (or $COMMIT), the date and the command of this run."""
    return {
        "commit": os.environ.get("COMMIT") or _output("git describe --always --dirty"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def _output(command: str) -> str:
    """What a command prints, or "unknown" where it is not installed or prints nothing."""
    words = command.split()
    if shutil.which(words[0]) is None:
        return "unknown"
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def measure_peak(step: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that torch's allocator has given out at the peak of a step, beyond those that it had before the step.

    Run the step once before: first calls load libraries, compile, and make what later steps keep. What a kernel takes
    from the C library by itself is not in it: on a CPU, the lists of topk_fast, some 2^16 numbers a thread at most.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler logs that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    return max(accumulate((e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])), initial=0))


class PeakMemory:
    """The peak of this process's memory in bytes, above what the process held when this was made."""

    def __init__(self) -> None:
        self._status = Path("/proc/self/status")
        self._before = self._read("VmRSS")
        self.reset()

    def _read(self, field: str) -> int | None:
        if not self._status.exists():
            return None
        return 1024 * int(re.search(rf"^{field}:\s+(\d+)", self._status.read_text(), re.MULTILINE).group(1))

    def reset(self) -> None:
        """Forgets earlier peaks."""
        if self._before is not None:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int | None:
        """The peak since the last reset; None where there is no /proc, which only Linux has."""
        return None if self._before is None else self._read("VmHWM") - self._before
