"""The peak memory of a step."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

from examples.machine import PeakMemory


def measure_peak(make: Callable, case, *args) -> int:
    """Bytes that a run takes at its peak beyond its inputs, gradients included.

    On a CPU, a new process measures it.

    Args:
        make: A module's function; ``make(case, *args)`` returns the run.
        args: The last of them is the device.
    """
    if args[-1] == "cuda":
        run = make(case, *args)
        before = torch.cuda.memory_allocated()  # the inputs; no gradients yet
        run()  # compiles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "topk_fast"])  # new processes have them from the start
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measure_peak_here, make, case, args).result()


def _measure_peak_here(make, case, args) -> int:
    torch.set_num_threads(1)
    make(case.shrink(), *args)()  # libraries that the first call loads do not count
    run = make(case, *args)
    memory = PeakMemory()
    run()
    return memory.peak()
