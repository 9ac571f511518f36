"""What the Triton kernels compile to, without a GPU: registers, spills, instructions, and what must not be there.

The launchers run as they do on a device, with a driver that compiles for a named architecture and launches nothing.
PTX is searched for what would break the noise contract: fused multiply-adds and approximate instructions.

    python benchmarks/triton_static.py              # all cases, as JSON
    python benchmarks/triton_static.py --quick      # fewer of them; what the tests read
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if os.environ.pop("TRITON_INTERPRET", None):
    os.execv(sys.executable, [sys.executable, *sys.argv])  # the interpreter compiles nothing

import torch
import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from topk_fast.triton_kernels import contenders, gradient, launch, search  # noqa: E402

KERNELS = (contenders.collect_kernel, search.search_kernel, gradient.gradient_kernel)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# (N, L, dtype, k, n_sample, sampler): the table's block shapes, aligned rows and not, split rows, both samplers.
CASES = [
    (1024, 1000, torch.float32, 6, 5, "thinned"),
    (1024, 10_000, torch.bfloat16, 6, 5, "thinned"),
    (8192, 32_768, torch.bfloat16, 6, 10, "thinned"),
    (2048, 131_072, torch.float32, 6, 10, "thinned"),
    (64, 1_000_000, torch.bfloat16, 6, 10, "thinned"),
    (1024, 24_661, torch.float16, 21, 32, "thinned"),
    (64, 131_072, torch.float32, 101, 64, "thinned"),
    (64, 2_000, torch.float32, 6, 5, "dense"),
]
QUICK = [CASES[i] for i in (0, 2, 4, 6, 7)]


class Compiler:
    """Stands in for a Triton driver: names a target, loads and launches nothing."""

    def __init__(self, target, device):
        self.target, self.device, self.utils = target, device, self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 48 << 10}  # what every device has

    def load_binary(self, name, kernel, shared, device):
        return object(), object(), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        return lambda *args: None

    def get_benchmarker(self):
        return lambda run, quantiles: (run(), [1.0] * len(quantiles))[1]


def compiled(target: GPUTarget, label, run, kernels=KERNELS) -> list:
    """What ``run()`` launches of ``kernels``, compiled for ``target``; ``label`` names the run."""
    device = (target.backend, target.arch, label)
    triton.runtime.driver.set_active(Compiler(target, device))
    launch.HIP, launch.processors = target.backend == "hip", lambda device: 132  # those of an H100
    run()
    return [kernel for function in kernels for kernel in function.device_caches[device][0].values()]


def steps(n, length, dtype, k, n_sample, sampler):
    """The launches of a loss with its backward; nothing reads these tensors."""
    scores = torch.empty(n, length, dtype=dtype)
    target, seed = torch.zeros(n, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    losses, classes, _ = launch.loss(scores, target, None, seed, k, 1.0, n_sample, 1.0, -100, sampler == "dense")
    launch.gradient(losses, losses, classes, target, 1.0, length, dtype)


def disassembled(kernel) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout


def instructions(text: str) -> list[str]:
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][\w.]+)", text, re.MULTILINE)


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
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    ops = instructions(disassembled(kernel))
    return out | {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "instructions": len(ops),
        "spill_loads_and_stores": sum(op.startswith(("LDL", "STL")) for op in ops),
        "loads_of_16_bytes": sum(op.startswith("LDG.E.128") for op in ops),
        "stores_of_16_bytes": sum(op.startswith("STG.E.128") for op in ops),
        "forbidden": sorted(
            set(re.findall(r"\b(?:fma|mad\.(?:rn|rz)|[\w.]+\.approx|div\.full)[\w.]*", kernel.asm["ptx"]))
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases; prints JSON")
    arguments = parser.parse_args()
    report = []
    for name, target in TARGETS.items():
        for i, case in enumerate(QUICK if arguments.quick else CASES):
            for kernel in compiled(target, i, lambda case=case: steps(*case)):
                shape = dict(zip(("N", "L", "dtype", "k", "n_sample", "sampler"), map(str, case)))
                report.append(shape | {"target": name} | facts(kernel))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
