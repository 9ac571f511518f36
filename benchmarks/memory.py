"""Memory of the benchmarks: the peak of a step, a bound on what may be asked for, and what to do where it is not enough."""

import multiprocessing
import re
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def attempt(run: Callable, *args) -> tuple:
    """What it returns and None; or None and a reason, where memory does not suffice."""
    try:
        return run(*args), None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        return None, "out of memory"


def limit():
    """Has allocations beyond the free memory raise here; Linux would grant them, and end the process when they are used."""
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1))
    resource.setrlimit(resource.RLIMIT_DATA, (free, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def peak(make: Callable, *args, device: str) -> int:
    """Bytes that a step takes at its peak beyond its inputs, gradients included; on CPU in a process of its own.

    ``make(*args, small=...)`` returns the step, on small inputs or on those that count; a function of a module.
    """
    if device == "cuda":
        run = make(*args, small=False)
        before = torch.cuda.memory_allocated()  # the inputs; no gradients yet
        run()  # compiles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "topk_fast"])  # processes start in no time
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_peak, make, args).result()


def _peak(make, args) -> int:
    def status(field):
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))

    torch.set_num_threads(1)
    make(*args, small=True)()  # what first calls load is not the loss's
    run = make(*args, small=False)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    run()
    return status("VmHWM") - before
