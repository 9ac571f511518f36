"""What the build of the CUDA kernels needs: nvcc, its toolkit, the runtime to link to, and GPU architectures.

Each function finds or checks one of them, or raises ``Unavailable`` with the reason.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

BLACKWELL_FROM = (12, 8)  # nvcc's version


def default_architectures(version):
    """TORCH_CUDA_ARCH_LIST for T4, A100, H100 and, where nvcc knows them, B200 and RTX 50.

    The PTX serves every later GPU, but only with a driver that is no older than nvcc.
    """
    knows_blackwell = tuple(map(int, version.split("."))) >= BLACKWELL_FROM
    return "7.5;8.0;9.0;10.0;12.0+PTX" if knows_blackwell else "7.5;8.0;9.0+PTX"


class Unavailable(Exception):
    """Something that the build needs is missing or does not fit; the message says what, and the remedy."""


def find_nvcc():
    """CUDA's compiler: under CUDA_HOME where that is set, else on PATH or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if not found:
            raise Unavailable(f"CUDA_HOME={home} has no bin/nvcc: set it to the root of a CUDA toolkit, or unset it")
        return found
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise Unavailable("nvcc is not on PATH: install the CUDA toolkit, or set CUDA_HOME to the root of one")
    return found


def find_toolkit(nvcc):
    """Root folder and version of the CUDA toolkit of an nvcc, which may be a wrapper script in another folder."""

    def ask(option, pattern):
        done = subprocess.run([nvcc, *option], capture_output=True, text=True)
        match = re.search(pattern, done.stdout + done.stderr)
        if not match:
            raise Unavailable(f"`{nvcc} {' '.join(option)}` printed no {pattern!r}: {done.stderr.strip()[-500:]}")
        return match[1]

    root = ask(["--dryrun", "x.cu"], r"(?m)^#\$ TOP=(.+)$")  # x.cu need not exist
    return Path(root).resolve(), ask(["--version"], r"release (\d+\.\d+)")


def check_versions(nvcc, version, torch):
    ours, theirs = version.split(".")[0], torch.version.cuda.split(".")[0]
    if ours != theirs:
        raise Unavailable(
            f"{nvcc} is of CUDA {version}, but torch {torch.__version__} was built with CUDA {torch.version.cuda}: the "
            f"major versions must be equal. Set CUDA_HOME to a CUDA {theirs} toolkit, or install a torch built with "
            f"CUDA {ours}"
        )


def find_cudart(root, version, torch):
    """The CUDA runtime to link to; toolkits and torch's own packages from pip have no lib64 and no libcudart.so."""
    name = f"libcudart.so.{version.split('.')[0]}"
    packages = Path(torch.__file__).parent.parent
    for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib"), *packages.glob("nvidia/*/lib")):
        if (folder / name).exists():
            return str(folder / name)
    raise Unavailable(f"{name} is neither in {root} nor in {packages}/nvidia: install the CUDA runtime")


def choose_architectures(version, torch):
    """TORCH_CUDA_ARCH_LIST with "native" resolved, or the default of nvcc's version, as numbers between semicolons."""
    default = default_architectures(version)
    asked = (os.environ.get("TORCH_CUDA_ARCH_LIST") or default).strip().replace(" ", ";")
    if asked == "native":
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        if not found:
            raise Unavailable(
                f"TORCH_CUDA_ARCH_LIST=native needs a GPU and torch sees none: list architectures, such as "
                f"TORCH_CUDA_ARCH_LIST='{default}'"
            )
        return ";".join("{}.{}".format(*capability) for capability in sorted(found))
    for name in asked.split(";"):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST must be like '{default}' or 'native', got {asked!r}")
    return asked
