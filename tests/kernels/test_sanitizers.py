"""Contract under test: the CPU search touches no byte that is not its own, has no undefined behaviour, and needs no
Python.
"""

import shutil
import subprocess

import pytest

from testing import ROOT

FLAGS = "-Og -std=c++17 -w -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all".split()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizers")
def test_random_requests(tmp_path):
    kernels = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("baseline", "avx2", "avx512", "isa")]
    sources = [*kernels, ROOT / "tests" / "kernels" / "search_fuzz.cpp"]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    for source, target in zip(sources, objects):
        subprocess.run(["g++", *FLAGS, *SANITIZE, f"-I{ROOT / 'csrc'}", "-c", source, "-o", target], check=True)
    subprocess.run(["g++", *SANITIZE, *objects, "-o", tmp_path / "fuzz"], check=True)
    done = subprocess.run([tmp_path / "fuzz", "1500"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("ok "), done.stderr[-4000:]
