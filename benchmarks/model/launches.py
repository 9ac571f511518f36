"""What the launchers of csrc/cuda ask a GPU for, and runs of that in the model.

The launchers are compiled for this CPU with launches.h in place of launches; what they launch is looked up by name in
nvcc's machine code and run there, on torch's CPU tensors.
"""

import ctypes
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import ROOT

from . import encode, sass
from .gpus import MEMORY, Gpu, latency_of

HERE = Path(__file__).parent
HOOK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
)
FIELDS = tuple(name for name, _ in encode.Counts._fields_)


class Shape(NamedTuple):
    """A launch: the kernel's readable name, blocks, threads of a block, bytes of shared memory that it asks for."""

    kernel: str
    grid: int
    size: int
    shared: int


class Ran(NamedTuple):
    """A launch that was run, with its counts [instructions, FIELDS] and the cycles of each block."""

    shape: Shape
    counts: np.ndarray
    cycles: np.ndarray
    written_back: int


def compiled(source: Path, out: Path, *flags) -> Path:
    command = ["g++", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", *flags, str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return out


def interpreter(folder: Path):
    return encode.library(compiled(HERE / "run.cpp", folder / "run.so", "-O2"))


def launchers(folder: Path) -> Path:
    """csrc/cuda's launchers for this CPU."""
    before = [word for file in (HERE / "launches.h", ROOT / "tests/kernels/simt.h") for word in ("-include", file)]
    return compiled(sass.SOURCE, folder / "launches.so", "-O0", "-w", *map(str, before), "-x", "c++")


def caller():
    """The class of tests/kernels/test_cuda.py that calls launchers on CPU tensors, with reference.py's arguments."""
    path = ROOT / "tests" / "kernels" / "test_cuda.py"
    sys.path.append(str(ROOT / "tests"))  # it imports from there
    spec = importlib.util.spec_from_file_location("test_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model


def names(path: Path) -> dict[int, str]:
    """Readable names of a library's functions by their places."""
    rows = [row.split(maxsplit=2) for row in sass.run("nm", path).splitlines()]
    rows = [(int(row[0], 16), row[2]) for row in rows if len(row) == 3 and row[1] in "tTwW"]
    return dict(zip((at for at, _ in rows), sass.readable([name for _, name in rows])))


class Device:
    """Runs launches as a GPU of one architecture would; ``kernels`` are sass.compiled's."""

    def __init__(self, lib, gpu: Gpu, kernels: dict[str, sass.Kernel]):
        self.lib, self.gpu, self.kernels, self.programs, self.strange = lib, gpu, kernels, {}, {}

    def program(self, name: str) -> int:
        if name not in self.programs:
            self.programs[name], strange = encode.program(self.lib, self.kernels[name], latency_of)
            if strange:
                self.strange[name] = strange
        return self.programs[name]

    def run(self, shape: Shape, argument: bytes, cache: int, l1_bytes: int) -> Ran:
        """Runs a launch with an L2, which holds what was read or written before, and a part of L1."""
        program, gpu = self.program(shape.kernel), self.gpu
        self.lib.model_forget_memory(program)
        for begin, end in mapped():
            self.lib.model_memory(program, begin, end - begin)
        latencies = (MEMORY[name] for name in ("l1", "l2", "memory", "shared", "barrier", "read"))
        generic = gpu.shared_at == 0  # older targets read the window of shared memory from bank 0
        machine = encode.Machine(gpu.parameters_at, gpu.shared_at, generic, 0, *latencies, l1_bytes)
        constants = self.kernels[shape.kernel].constants
        shared = shape.shared + max(0, self.kernels[shape.kernel].shared - gpu.shared_at)
        launch = encode.Launch(shape.grid, shape.size, shared, len(argument), len(constants), argument, constants)
        counts = np.zeros((len(self.kernels[shape.kernel].lines), len(FIELDS)), np.int64)
        cycles = np.zeros(shape.grid, np.int64)
        before = self.lib.model_written_back(cache)
        failed = self.lib.model_run(
            program, ctypes.byref(machine), cache, ctypes.byref(launch), counts.ctypes.data, cycles.ctypes.data
        )
        if failed:
            raise RuntimeError(
                f"{shape.kernel}: {self.explained(shape.kernel, self.lib.model_error(program).decode())}"
            )
        return Ran(shape, counts, cycles, self.lib.model_written_back(cache) - before)

    def explained(self, name: str, error: str) -> str:
        found = re.search(r"instruction (\d+)$", error)
        return f"{error}: {self.kernels[name].lines[int(found[1])]}" if found else error


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A copy that starts at a multiple of 512 bytes, as tensors on a GPU do."""
    spare = 512 // x.element_size()
    buffer = torch.empty(x.numel() + spare, dtype=x.dtype)
    start = -buffer.data_ptr() % 512 // x.element_size()
    return buffer[start : start + x.numel()].view(x.shape).copy_(x)


def mapped() -> list[tuple[int, int]]:
    """This process's writable memory, neighbours joined."""
    out: list[tuple[int, int]] = []
    for row in Path("/proc/self/maps").read_text().splitlines():
        bounds, permissions = row.split()[:2]
        begin, end = (int(bound, 16) for bound in bounds.split("-"))
        if not permissions.startswith("rw"):
            continue
        if out and out[-1][1] == begin:
            out[-1] = (out[-1][0], end)
        else:
            out.append((begin, end))
    return sorted(out, key=lambda bounds: bounds[0] - bounds[1])  # the large ones first


class Calls:
    """Calls the launchers; ``take(shape, argument)`` gets each launch."""

    def __init__(self, path: Path):
        self.model = caller()(path)
        self.names = names(path)
        library = self.model.library
        place = {name: at for at, name in self.names.items()}["launches_hook"]
        self.base = ctypes.cast(library.launches_hook, ctypes.c_void_p).value - place
        self.take = lambda shape, argument: None
        self.hook = HOOK(self._launched)  # kept, for the library calls it
        self.failed: Exception | None = None

    def _launched(self, kernel, grid, size, shared, argument, n):
        if self.failed:
            return
        try:
            self.take(Shape(self.names[kernel - self.base], grid, size, shared), ctypes.string_at(argument, n))
        except Exception as error:  # nothing passes through C
            self.failed = error

    def __call__(self, name: str, *arguments, take, **gpu):
        """A call of the model's method ``name``, as for a GPU with the fields ``gpu`` of csrc/cuda/launch.h's."""
        self.take, self.failed = take, None
        vars(self.model).update(gpu)
        self.model.library.launches_hook(self.hook)
        out = getattr(self.model, name)(*arguments)
        if self.failed:
            raise self.failed
        return out
