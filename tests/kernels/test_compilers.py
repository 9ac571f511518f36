"""Contract under test: the C++ kernels give the same bits from g++ on x86-64 and arm64 and from clang++; the search
touches no byte that is not its own, has no undefined behaviour, and needs no Python.

Two programs that need neither Python nor torch run the noise contract's functions and random searches, and print
checksums of the results. Those of each compiler here, which optimises as setup.py does, are compared with g++'s, whose
sanitizers watch it.
"""

import platform
import runpy
import shutil
import subprocess

import pytest

from testing import ROOT

FLAGS = runpy.run_path(str(ROOT / "setup.py"))["FLAGS"]
SANITIZE = ("-Og", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
KERNELS = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("baseline", "avx2", "avx512", "isa")]
PROGRAMS = {
    "contract_bits": [ROOT / "csrc" / "testing.cpp"],
    "search_fuzz": KERNELS,
}


def outputs(folder, compiler, *options, emulator=(), searches=300):
    """What the two programs print, built by a compiler."""
    if missing := [program for program in (compiler, *emulator[:1]) if shutil.which(program) is None]:
        pytest.skip(f"{missing[0]} is not installed; Debian has it in g++-aarch64-linux-gnu, qemu-user and clang")
    found = {}
    for program, sources in PROGRAMS.items():
        objects = []
        for source in (*sources, ROOT / "tests" / "kernels" / f"{program}.cpp"):
            objects.append(folder / f"{source.stem}.o")
            command = [compiler, *FLAGS, *options, f"-I{ROOT / 'csrc'}", "-c", source, "-o", objects[-1]]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]
        subprocess.run([compiler, *options, *objects, "-o", folder / program], check=True)
        done = subprocess.run([*emulator, folder / program, str(searches)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        found[program] = done.stdout.splitlines()
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """g++'s, quickly compiled: no optimisation changes a bit. Sanitizers stop a program at the first fault."""
    found = outputs(tmp_path_factory.mktemp("g++"), "g++", *SANITIZE, searches=1500)
    assert len(found["contract_bits"]) == 16 and len(found["search_fuzz"]) == 5
    return found | {"search_fuzz": found["search_fuzz"][:1]}


def test_random_requests(expected):
    assert expected["search_fuzz"][0].startswith("ok ")


@pytest.mark.skipif(platform.machine() == "aarch64", reason="g++ of this machine makes code for arm64 already")
def test_arm64_has_the_same_bits(expected, tmp_path):
    assert outputs(tmp_path, "aarch64-linux-gnu-g++", "-static", emulator=("qemu-aarch64",)) == expected


def test_clang_has_the_same_bits(expected, tmp_path):
    assert outputs(tmp_path, "clang++") == expected
