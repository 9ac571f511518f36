"""Contract under test: the sources compile for every supported torch; what keeps CUDA from being built is named and
leaves the CPU kernels; an installed wheel works without a compiler, in any Python from 3.10 on.
"""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import find_cuda
from testing import ROOT

HEADERS = ROOT / ".cache" / "headers"
PINNED = "the installed torch"
SOURCES = sorted(str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*.cpp"))
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++: nothing can be compiled")


def headers(version):
    """The include folder of a torch; wheels for macOS have the headers of those for Linux at a sixth of their size."""
    if version == PINNED:
        return Path(torch.__file__).parent / "include"
    folder = HEADERS / version
    if not folder.exists():
        wheels = HEADERS / "wheels"
        platforms = ["--python-version=3.11", "--platform", "macosx_11_0_arm64", "--platform", "macosx_14_0_arm64"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--retries=1",
                "--no-deps",
                "--only-binary=:all:",
                *platforms,
                f"--dest={wheels}",
                f"torch=={version}",
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"the wheel of torch {version}, which has its headers, cannot be had: {done.stderr[-300:]}")
        (wheel,) = wheels.glob(f"torch-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(HEADERS / f"{version}.part", names)
        wheel.unlink()
        (HEADERS / f"{version}.part").rename(folder)
    return folder / "torch" / "include"


@NEEDS_COMPILER
@pytest.mark.parametrize("version", ["2.11.0", "2.12.0", PINNED])
def test_the_sources_compile(version):
    """The CUDA binding too, which needs no header of CUDA's: it alone knows both torch and CUDA."""
    folders = [f"-I{ROOT / 'csrc'}", "-isystem", headers(version), f"-I{sysconfig.get_paths()['include']}"]
    flags = [
        "-fsyntax-only",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DPy_LIMITED_API=0x030A0000",
        "-DUSE_CUDA",
        '-DTOPK_FAST_CUDA_ARCHITECTURES="8.0"',
    ]
    with_torch = ["cpu/binding.cpp", "cuda/binding.cpp"]  # the only ones that its version concerns
    assert set(with_torch) < set(SOURCES)
    for source in SOURCES if version == PINNED else with_torch:
        done = subprocess.run(["g++", *flags, *folders, ROOT / "csrc" / source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def no_cuda(monkeypatch, tmp_path):
    """An environment that names no CUDA, with nothing but a folder of fakes and the system's shell on PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "TOPK_FAST_BUILD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return monkeypatch


def make_nvcc(path, root, version="13.0"):
    """A script that answers as nvcc does, and compiles nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f"--dryrun) echo '#$ _HERE_={root}/bin' >&2; echo '#$ TOP={root}/bin/..' >&2;;\n"
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.88';;\n"
        "*) echo 'nvcc fatal: this is a script' >&2; exit 1;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return path


def fake_torch(packages, cuda="13.0", capabilities=()):
    devices = SimpleNamespace(device_count=lambda: len(capabilities), get_device_capability=capabilities.__getitem__)
    return SimpleNamespace(
        __version__="2.11.0", __file__=f"{packages}/torch/__init__.py", version=SimpleNamespace(cuda=cuda), cuda=devices
    )


@NEEDS_COMPILER
@pytest.mark.parametrize("flag", ["-ffast-math", "-ffinite-math-only"])
def test_fast_math_does_not_compile(flag, tmp_path):
    """The build switches it off where CFLAGS have it; other builds of the sources are stopped."""
    source = tmp_path / "contract.cpp"
    source.write_text('#include "noise.h"\n')
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", "-I", str(ROOT / "csrc"), str(source)]
    done = subprocess.run([*compiler, flag], capture_output=True, text=True)
    assert done.returncode and "fast-math breaks the noise contract" in done.stderr
    flags = runpy.run_path(str(ROOT / "setup.py"))["FLAGS"]
    assert subprocess.run([*compiler, flag, *flags]).returncode == 0


def test_a_wrapper_script_tells_the_real_root(no_cuda, tmp_path):
    root = tmp_path / "cuda-13.0"
    real = make_nvcc(root / "bin" / "nvcc", root)
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    found = find_cuda.find_nvcc()
    assert found == str(wrapper)
    assert find_cuda.find_toolkit(found) == (root, "13.0")


def test_cuda_home_comes_before_path(no_cuda, tmp_path):
    make_nvcc(tmp_path / "bin" / "nvcc", tmp_path)
    mine = make_nvcc(tmp_path / "mine" / "bin" / "nvcc", tmp_path / "mine")
    no_cuda.setenv("CUDA_HOME", str(tmp_path / "mine"))
    assert find_cuda.find_nvcc() == str(mine)


def test_a_home_without_nvcc_is_named(no_cuda, tmp_path):
    make_nvcc(tmp_path / "bin" / "nvcc", tmp_path)
    no_cuda.setenv("CUDA_HOME", str(tmp_path / "empty"))
    with pytest.raises(find_cuda.Unavailable, match=r"CUDA_HOME=.*empty has no bin/nvcc"):
        find_cuda.find_nvcc()


def test_no_nvcc_at_all(no_cuda):
    no_cuda.setattr(find_cuda.shutil, "which", lambda name, path=None: None)
    with pytest.raises(find_cuda.Unavailable, match="nvcc is not on PATH: install the CUDA toolkit"):
        find_cuda.find_nvcc()


def test_a_wrapper_whose_nvcc_is_gone(no_cuda, tmp_path):
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\nexec /nowhere/nvcc\n")
    wrapper.chmod(0o755)
    with pytest.raises(find_cuda.Unavailable, match="/nowhere/nvcc"):
        find_cuda.find_toolkit(str(wrapper))


def test_major_versions_must_be_equal(tmp_path):
    find_cuda.check_versions("nvcc", "13.2", fake_torch(tmp_path, "13.0"))
    with pytest.raises(find_cuda.Unavailable, match=r"of CUDA 12\.6, but torch 2\.11\.0 was built with CUDA 13\.0"):
        find_cuda.check_versions("nvcc", "12.6", fake_torch(tmp_path, "13.0"))


@pytest.mark.parametrize("folder", ["root/lib64", "root/lib", "root/targets/sbsa-linux/lib", "site/nvidia/cu13/lib"])
def test_the_runtime_is_found_without_a_link_to_it(tmp_path, folder):
    library = tmp_path / folder / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    (library.parent / "libcudart.so.12").touch()
    assert find_cuda.find_cudart(tmp_path / "root", "13.0", fake_torch(tmp_path / "site")) == str(library)


def test_no_runtime_is_named(tmp_path):
    with pytest.raises(find_cuda.Unavailable, match=r"libcudart\.so\.13 is neither in"):
        find_cuda.find_cudart(tmp_path, "13.0", fake_torch(tmp_path))


@pytest.mark.parametrize(
    "version, asked, capabilities, expected",
    [
        ("12.6", None, [], "7.5;8.0;9.0+PTX"),
        ("12.8", None, [], "7.5;8.0;9.0;10.0;12.0+PTX"),
        ("13.0", None, [], "7.5;8.0;9.0;10.0;12.0+PTX"),
        ("13.0", "8.6 9.0a+PTX", [], "8.6;9.0a+PTX"),
        ("13.0", "native", [(10, 0), (9, 0), (9, 0)], "9.0;10.0"),
    ],
)
def test_architectures(no_cuda, tmp_path, version, asked, capabilities, expected):
    if asked:
        no_cuda.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert find_cuda.choose_architectures(version, fake_torch(tmp_path, capabilities=capabilities)) == expected


@pytest.mark.parametrize("asked, message", [("native", "needs a GPU and torch sees none"), ("sm_80", "got 'sm_80'")])
def test_architectures_that_cannot_be_had(no_cuda, tmp_path, asked, message):
    no_cuda.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(find_cuda.Unavailable, match=message):
        find_cuda.choose_architectures("13.0", fake_torch(tmp_path))


# Runs setup.py as a CUDA build of torch would.
CUDA_BUILD = """
import runpy, sys, torch
torch.version.cuda, torch.__version__ = "12.6", "2.11.0"
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[2]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize("build", ["", "require", "cpu"])
@pytest.mark.parametrize(
    "version, reason",
    [
        ("13.0", r"nvcc is of CUDA 13\.0, but torch 2\.11\.0 was built with CUDA 12\.6"),
        # torch's own check, which comes before any compilation: the script below is no g++ that CUDA supports
        ("12.6", r"the build of topk_fast\._C_cuda failed: .*minimum required version by CUDA 12\.6"),
    ],
    ids=["versions", "compiler"],
)
def test_trouble_with_cuda_leaves_the_cpu_kernels(no_cuda, tmp_path, version, reason, build):
    root, compiler = tmp_path / "cuda", tmp_path / "g++"
    make_nvcc(root / "bin" / "nvcc", root, version)
    (root / "lib64").mkdir()
    (root / "lib64" / "libcudart.so.12").touch()
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do case "$1" in -o|-MF) : > "$2";; esac; shift; done\n')
    compiler.chmod(0o755)  # it makes empty files, at once
    no_cuda.setenv("PATH", f"{Path(sys.executable).parent}:{os.defpath}")
    no_cuda.setenv("CUDA_HOME", str(root))
    no_cuda.setenv("TOPK_FAST_BUILD", build)
    for name in ("CC", "CXX"):
        no_cuda.setenv(name, str(compiler))
    command = [sys.executable, "-c", CUDA_BUILD, tmp_path / "lib", tmp_path / "temp"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert bool(re.search(reason, done.stderr)) == (build != "cpu"), done.stdout + done.stderr
    if build == "require":
        assert done.returncode != 0 and "TOPK_FAST_BUILD=require" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert [path.name for path in tmp_path.glob("lib/topk_fast/*.so")] == ["_C.abi3.so"]


def configured():
    """What setup.py passes to setuptools."""
    return runpy.run_path(str(ROOT / "setup.py"))["configure"]()


@pytest.mark.parametrize("free_threaded", [False, True])
def test_a_free_threaded_python_has_binaries_of_its_own(monkeypatch, free_threaded):
    variables = sysconfig.get_config_vars() | {"Py_GIL_DISABLED": int(free_threaded)}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sysconfig, "get_config_var", variables.get)
    made = configured()
    assert {extension.py_limited_api for extension in made["ext_modules"]} == {not free_threaded}  # with CUDA: two
    assert ("bdist_wheel" in made["options"]) != free_threaded


def test_windows_is_left_with_the_reference(monkeypatch, capsys):
    importlib.import_module("torch.utils.cpp_extension")  # which asks for the platform itself
    monkeypatch.delenv("TOPK_FAST_BUILD", raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert configured()["ext_modules"] == []
    assert "vector types of g++ and clang++, which MSVC does not have" in capsys.readouterr().err


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel built from it, as `make wheel` makes them; those of `make test-wheel`."""
    if made := os.environ.get("TOPK_FAST_DIST"):
        (source,), (wheel,) = Path(made).glob("*.tar.gz"), Path(made).glob("*.whl")
        return source, wheel
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder], cwd=ROOT, check=True)
    (source,) = folder.glob("*.tar.gz")
    build = ["wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=folder, check=True)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@NEEDS_COMPILER
def test_distributions_are_complete(distributions):
    source, wheel = distributions
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert "csrc/cuda/kernels.cu" in kernels and kernels | {"find_cuda.py", "setup.py", "LICENSE"} <= names
    assert re.search(r"-cp310-abi3-(many)?linux_[\w.]+\.whl$", wheel.name)
    glibc = re.search(r"manylinux_2_(\d+)", wheel.name)
    assert glibc is None or int(glibc[1]) <= 28, "torch's wheels run on glibc 2.28"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "topk_fast").glob("*.py")}
    triton = {f"topk_fast/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").glob("*.py")}
    assert "topk_fast/triton_kernels/search.py" in triton and python | triton | {"topk_fast/_C.abi3.so"} <= names
    assert all(name.startswith(("topk_fast/", "topk_fast-")) for name in names)


@NEEDS_COMPILER
def test_the_wheel_runs_without_a_compiler(distributions, tmp_path):
    """README's first example, in a fresh environment that borrows the torch at hand."""
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", distributions[1]]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # the checkout would count as installed
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], env=environment, check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "torch_at_hand.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    example = re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    example += "import topk_fast\nprint(topk_fast.__file__, *topk_fast.available_backends())\n"
    done = subprocess.run(
        [python, "-c", example], cwd=tmp_path, env={"PATH": str(empty)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    file, *backends = done.stdout.split()
    assert Path(file).is_relative_to(packages) and backends[0] == "cpp"
