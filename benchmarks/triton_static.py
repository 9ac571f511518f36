"""Inspects the compiled Triton kernels without a GPU: registers, spills, instructions, and how many are compiled.

The launchers run as they do on a device, with a driver that compiles for a named architecture and launches nothing.
No PTX may have fused multiply-adds or approximate instructions, which would break the noise contract.

    python -m benchmarks.triton_static              # writes results/triton_static.json
    python -m benchmarks.triton_static --quick      # fewer kernels, as JSON, which the tests read
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock, patch

if os.environ.pop("TRITON_INTERPRET", None):
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # the interpreter compiles nothing

import torch
import triton
from topk_fast.triton_kernels import collect, gradient, launch, layout, search
from triton.backends.compiler import GPUTarget

from benchmarks import RESULTS
from benchmarks.cuda_static import facts_of
from examples.machine import stamp
from examples.report import write

KERNELS = (collect.collect_kernel, search.search_kernel, gradient.gradient_kernel)
LAWS = ("normal", "gumbel")
RESULT = RESULTS / "triton_static.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Case(NamedTuple):
    """A step that is compiled: a search for the excesses at ``ranks``, and their gradient."""

    n_rows: int
    n_classes: int
    dtype: torch.dtype
    ranks: tuple[int, ...]
    n_sample: int
    law: str = "normal"
    sampler: str = "thinned"
    exclude_target: bool = False


# The table's block shapes, aligned rows and not, split rows, both laws and samplers, one rank and several.
CASES = [
    Case(1024, 1000, torch.float32, (6,), 5),
    Case(1024, 10_000, torch.bfloat16, (6,), 5),
    Case(8192, 32_768, torch.bfloat16, (6,), 10),
    Case(2048, 131_072, torch.float32, (6,), 10),
    Case(64, 1_000_000, torch.bfloat16, (6,), 10),
    Case(1024, 24_661, torch.float16, (21,), 32),
    Case(64, 131_072, torch.float32, (101,), 64),
    Case(64, 2_000, torch.float32, (6,), 5, sampler="dense"),
    Case(8192, 32_768, torch.bfloat16, (1,), 16, law="gumbel"),
    Case(1024, 1000, torch.float32, (2, 4, 6), 5, exclude_target=True),
]
QUICK = [CASES[4], CASES[5]._replace(law="gumbel", exclude_target=True)]


def stand_in(target: GPUTarget, device: tuple) -> MagicMock:
    """A Triton driver that names a target, and loads and launches nothing."""
    driver = MagicMock()
    driver.get_current_target.return_value = target
    driver.get_current_device.return_value = device
    driver.get_current_stream.return_value = 0
    driver.utils.get_device_properties.return_value = {"max_shared_mem": 48 << 10}  # what every device has
    driver.utils.load_binary.return_value = object(), object(), 0, 0, 1024
    return driver


def compiled(target: GPUTarget, label, run, kernels=KERNELS) -> list:
    """The kernels among ``kernels`` that ``run()`` launches, compiled for ``target``; ``label`` names the run."""
    device = (target.backend, target.arch, label)
    triton.runtime.driver.set_active(stand_in(target, device))
    layout.HIP, layout.processors = target.backend == "hip", lambda device: 132  # those of an H100
    layout.layout_of.cache_clear()
    launch._COMPILED.clear()
    run()
    return [kernel for function in kernels for kernel in function.device_caches[device][0].values()]


def steps(case: Case, scores=None):
    """The launches of a step; nothing reads these tensors."""
    if scores is None:
        scores = torch.empty(case.n_rows, case.n_classes, dtype=case.dtype)
    target, seed = torch.zeros(case.n_rows, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    search = (seed, case.ranks, 1.0, None, case.n_sample, LAWS.index(case.law), case.sampler == "dense")
    excess, classes = launch.excess(scores, *search, target, -100, case.exclude_target)
    launch.gradient(excess, classes, target, -100, 0, case.n_classes, case.dtype)


class Forgetful(dict):
    """Stands in for the launcher's kernels: it takes note of what is asked for, and has none of it."""

    def get(self, key):
        self[key] = None


def variants(calls) -> tuple[int, int]:
    """How many kernels Triton would compile for ``calls``, and how many the launcher tells apart."""

    def compile_nothing(function, key, signature, device, *rest):
        return function.device_caches[device][0].setdefault(key, MagicMock())

    launcher = Forgetful()
    with patch.object(triton.runtime.JITFunction, "_do_compile", compile_nothing):
        with patch.object(launch, "_COMPILED", launcher):
            kernels = compiled(TARGETS["sm_90"], object(), lambda: [call() for call in calls])
    return len(kernels), len(launcher)


def training_run() -> list:
    """Steps of a run whose last batch is smaller, and of views of its logits in other places of memory."""
    logits = torch.empty(256, 1024)
    views = (logits[:, :1000], logits[:, 3:1003], logits[::2, :1000], logits.flatten()[1:256_001].view(256, 1000))
    return [*(torch.empty(n, 1000) for n in (256, 37, 16, 1)), *views]


def step_of(scores, ranks=(6,), n_sample=5):
    """The launches of a step with these scores, for `variants`."""
    case = Case(*scores.shape, scores.dtype, ranks, n_sample)
    return lambda: steps(case, scores)


VARIANTS = {  # what varies, and the calls in which it does
    "rows, strides, alignment": lambda: map(step_of, training_run()),
    "800 to 1024 classes": lambda: (step_of(torch.empty(64, n)) for n in (800, 900, 1000, 1001, 1008, 1023, 1024)),
    "30 000 to 131 072 classes": lambda: (
        step_of(torch.empty(2200, n, dtype=torch.bfloat16))
        for n in (30_000, 32_768, 32_769, 40_000, 50_257, 65_536, 100_000, 131_072)
    ),
    "2200 to 1 rows of 200 000 classes": lambda: (
        step_of(torch.empty(n, 200_000, dtype=torch.bfloat16)) for n in (2200, 1000, 100, 8, 1)
    ),
    "k from 1 to 21, 1 to 16 samples, several ranks": lambda: (
        *(step_of(torch.empty(64, 1000), (k,), n) for k in (1, 2, 6, 11, 21) for n in (1, 5, 8, 10, 16)),
        *(step_of(torch.empty(64, 1000), ranks) for ranks in ((6, 4, 2), (6, 4, 2, 1), (16, 4, 2, 1))),
    ),
}


def uses(code: str, intrinsic: str) -> int:
    """Calls of an LLVM intrinsic on float32, a vector counted as its lanes."""
    found = re.findall(rf"call [^@\n]*@llvm\.{intrinsic}\.(?:v(\d+))?f32", code)
    return sum(int(lanes or 1) for lanes in found)


def facts(kernel) -> dict:
    """Registers, stack, shared memory and instructions of a kernel, and what its code must not hold."""
    out = {"kernel": kernel.name, "warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
    if "cubin" not in kernel.asm:
        code, assembly = kernel.asm["llir"], kernel.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))  # noqa: E731
        return out | {
            "registers": number("vgpr_count"),
            "spilled_registers": number("vgpr_spill_count"),
            "forbidden": sorted(set(re.findall(r"llvm\.fmuladd|\bcontract\b|\bfast\b|\bafn\b", code)))
            # The backend's correctly rounded root has five fused steps; nothing else may have one.
            + ["llvm.fma"] * (uses(code, "fma") != 5 * uses(code, "amdgcn.rsq")),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (own,) = facts_of(Path(file.name), kernel.asm["ptx"]).values()
    return out | own


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases; prints JSON")
    arguments = parser.parse_args()
    report = []
    for name, target in TARGETS.items():
        for i, case in enumerate(QUICK if arguments.quick else CASES):
            for kernel in compiled(target, i, lambda case=case: steps(case)):
                shape = {field: str(value) for field, value in case._asdict().items()}
                report.append(shape | {"target": name} | facts(kernel))
    if arguments.quick:
        print(json.dumps(report, indent=1))
        return
    note = "compiled and counted, not run: no GPU took part"
    environment = {"triton": triton.__version__, **stamp(), "note": note}
    counts = {name: variants(calls())[0] for name, calls in VARIANTS.items()}
    write(RESULT, {"environment": environment, "variants": counts, "kernels": report})
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
