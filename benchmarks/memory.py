"""The memory of a step: its peak, a limit on allocations, and steps for which the memory does not suffice."""

import multiprocessing
import re
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from examples.machine import PeakMemory


def attempt(run: Callable, *args) -> tuple:
    """The result of ``run(*args)`` and None; or None and a reason, where the memory does not suffice."""
    try:
        return run(*args), None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        return None, "out of memory"


def limit():
    """Makes allocations beyond the free memory raise; Linux would grant them, and kill the process that uses them."""
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1))
    resource.setrlimit(resource.RLIMIT_DATA, (free, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def measure_peak(make: Callable, *args, device: str) -> int:
    """Bytes that a step takes at its peak beyond its inputs, gradients included; on a CPU, a new process measures it.

    Args:
        make: A module's function; ``make(*args, small=...)`` returns the step, on small inputs or on the measured ones.
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
    context.set_forkserver_preload(["torch", "topk_fast"])  # new processes have them from the start
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measure_peak_here, make, args).result()


def _measure_peak_here(make, args) -> int:
    torch.set_num_threads(1)
    make(*args, small=True)()  # libraries that the first call loads do not count
    run = make(*args, small=False)
    memory = PeakMemory()
    run()
    return memory.peak()
