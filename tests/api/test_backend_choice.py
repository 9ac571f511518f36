"""Contract under test: which backend runs, and that a backend that is not there says why, with the remedy.

No binary keeps the package from being imported, "auto" never takes the slow reference in silence, and a GPU for which
nothing was built is found before a kernel fails on it. Devices that are not at hand are stand-ins.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from testing import ROOT
from topk_fast import BalNoisedTopK, available_backends, backends, build_info, ops
from topk_fast.functional import bal_noised_topk_loss, linear_noised_topk_loss, noised_topk

NAMES = ["cpp", "cuda", "triton", "torch"]
BUILD = "`pip install --no-build-isolation .` (or `python setup.py build_ext --inplace` in a checkout)"
X, Y = torch.arange(18.0).view(2, 9), torch.tensor([3, 8])
MODULES = {"cpp": "_C", "cuda": "_C_cuda"}


# Binaries that do not load


def nothing(path):
    pass


def garbage(path):
    path.write_bytes(b"This is no shared object.\n" * 100)


def compile_shared(path, code, *flags):
    path.with_suffix(".cpp").write_text(code)
    command = ["g++", "-shared", "-fPIC", str(path.with_suffix(".cpp")), "-o", str(path), *flags]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def for_another_torch(path):
    module = path.name.partition(".")[0]
    compile_shared(
        path, f'extern "C" void gone_from_torch(); extern "C" void PyInit_{module}() {{ gone_from_torch(); }}'
    )


def without_its_library(path):
    module, library = path.name.partition(".")[0], path.parent / "libgone.so.13"
    compile_shared(library, 'extern "C" void gone() {}')
    compile_shared(path, f'extern "C" void gone(); extern "C" void PyInit_{module}() {{ gone(); }}', str(library))
    library.unlink()


def for_another_python(path):
    garbage(path.with_name(path.name.partition(".")[0] + ".cpython-39-x86_64-linux-gnu.so"))


BINARIES = {  # what lies in the package, and what is said of it
    "not built": (nothing, "kernels are not built; install"),
    "garbage": (garbage, "kernels do not load ("),
    "another torch": (for_another_torch, "undefined symbol: gone_from_torch): they were built for another torch"),
    "a missing library": (
        without_its_library,
        "libgone.so.13: cannot open shared object file: No such file or directory): they",
    ),
    "another Python": (for_another_python, "kernels were built for another Python than cpython-3"),
}


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of the package, without any binary."""
    for name in ("topk_fast", "triton_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def python(code, folder):
    """Output and errors of code in a process of its own, which imports the package in ``folder``."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", BINARIES)
def test_a_binary_that_does_not_load(what, package):
    write, reason = BINARIES[what]
    if write in (for_another_torch, without_its_library) and shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the broken binary")
    for module in MODULES.values():
        write(package / "topk_fast" / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}")
    code = (
        "import json, torch, topk_fast\n"
        "found = {'info': topk_fast.build_info(), 'names': topk_fast.available_backends()}\n"
        "found['losses'] = [topk_fast.BalNoisedTopK(2, 1.0, seed=1)(torch.ones(2, 9), torch.ones(2).long()).item()"
        " for _ in range(2)]\n"
        "for name in ('cpp', 'cuda'):\n"
        "    try: topk_fast.NoisedTopK(2, backend=name)(torch.ones(2, 9))\n"
        "    except RuntimeError as error: found[name] = str(error)\n"
        "found['file'] = topk_fast.__file__\n"
        "print(json.dumps(found))"
    )
    out, err = python(code, package)
    found = json.loads(out)
    assert found["file"].startswith(str(package)) and found["names"] == ["torch"]
    for name in MODULES:
        why = found["info"]["backends"][name]
        assert reason in why and why.endswith(BUILD)
        assert found[name] == f"backend {name!r} is not available: {why}"
    assert found["info"]["compiler"] is found["info"]["cuda_architectures"] is None
    expected = bal_noised_topk_loss(torch.ones(2, 9), torch.ones(2).long(), 2, seed=1).item()
    assert found["losses"] == [expected] * 2
    assert err.count("UserWarning") == 1 and found["info"]["backends"]["cpp"] in err  # once, although "auto" ran twice


@pytest.mark.slow
@pytest.mark.parametrize("broken, other", [("cpp", "cuda"), ("cuda", "cpp")])
def test_one_that_does_not_load_leaves_the_other(broken, other, package):
    garbage(package / "topk_fast" / f"{MODULES[broken]}{sysconfig.get_config_var('EXT_SUFFIX')}")
    (package / "topk_fast" / f"{MODULES[other]}.py").write_text(
        "def compiler(): return 'g++'\ndef isas(): return []\ndef architectures(): return '9.0'\n"
    )
    out, _ = python("import json, topk_fast; print(json.dumps(topk_fast.build_info()['backends']))", package)
    found = json.loads(out)
    assert found[other] == "available" and "do not load" in found[broken]


def test_import_asks_no_device(package):
    (package / "topk_fast" / "_C_cuda.py").write_text("def architectures(): raise AssertionError('asked at import')\n")
    code = (
        "import torch\n"
        "def fail(*args): raise AssertionError('device work at import')\n"
        "for name in ('_lazy_init', 'is_available', 'device_count', 'current_device', 'get_device_capability'):\n"
        "    setattr(torch.cuda, name, fail)\n"
        "import topk_fast\n"
        "assert 'cuda' in topk_fast.backends._MODULES"
    )
    python(code, package)


# Devices: stand-ins for a GPU and its kernels


def tensor_on(device, dtype=torch.float32, shape=(2, 9)):
    """What the choice sees of a tensor."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=torch.Size(shape))


@pytest.fixture
def have(monkeypatch):
    """have(names, ...): only these backends are there; GPUs have these capabilities."""

    def have(*names, architectures="8.0;9.0+PTX", capabilities=()):
        binaries = {"cpp": backends._MODULES.get("cpp"), "cuda": SimpleNamespace(architectures=lambda: architectures)}
        monkeypatch.setattr(backends, "_MODULES", {name: binaries[name] for name in names if name in binaries})
        absent = {name: f"no {name}, build it" for name in NAMES[:3] if name not in names}
        monkeypatch.setattr(backends, "_ABSENT", absent)
        monkeypatch.setattr(backends, "HAS_TRITON", "triton" in names)
        monkeypatch.setattr(backends, "_WARNINGS", set())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: len(capabilities) - 1)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda index: asked.append(index) or capabilities[index]
        )
        backends._why_uncovered.cache_clear()
        return asked

    asked = []
    yield have
    backends._why_uncovered.cache_clear()


@pytest.mark.parametrize(
    "architectures, covered, uncovered",
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (7, 9), (9, 0), (10, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.0+PTX", [(8, 0), (8, 6), (9, 0), (12, 1)], [(7, 5)]),
        ("8.6+PTX", [(8, 6), (9, 0)], [(8, 0), (7, 9)]),
        ("8.0;9.0+PTX", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0)], [(7, 0), (7, 5)]),
        ("7.5;8.0;9.0+PTX", [(7, 5), (8, 6), (12, 0)], [(7, 0), (6, 1)]),
        ("7.5 9.0", [(7, 5), (9, 0)], [(8, 0), (10, 0), (7, 2)]),
        ("9.0a", [(9, 0)], [(9, 1), (10, 0), (8, 0)]),
        ("9.0a+PTX", [(9, 0)], [(9, 1), (10, 0)]),
        ("8.0;9.0a", [(8, 6), (9, 0)], [(9, 1)]),
        ("10.0f", [(10, 0)], [(10, 3), (11, 0)]),
        ("12.0", [(12, 0), (12, 1)], [(1, 2), (2, 0), (11, 9)]),
        ("8.0;", [(8, 0)], [(9, 0)]),
        ("native", [(7, 5), (12, 0)], []),
        ("8.0;Hopper", [(7, 5), (9, 0)], []),
    ],
)
def test_is_covered(architectures, covered, uncovered):
    assert [c for c in covered if not backends.is_covered(c, architectures)] == []
    assert [c for c in uncovered if backends.is_covered(c, architectures)] == []


def test_a_gpu_that_is_covered(have):
    asked = have("cuda", "triton", capabilities=[(9, 0), (8, 6)])
    for _ in range(3):
        for device in ("cuda:0", "cuda:1"):
            assert backends.resolve("auto", tensor_on(device), 3) == "cuda"
            assert backends.resolve("cuda", tensor_on(device, torch.float64), 3) == "cuda"
    assert available_backends("cuda") == ["cuda", "triton", "torch"]
    assert asked == [0, 1]  # each device once


@pytest.mark.parametrize("others, expected", [(["triton"], "triton"), ([], "torch")])
def test_a_gpu_that_is_not_covered(have, others, expected):
    asked = have("cuda", *others, capabilities=[(9, 0), (7, 5)])
    reason = (
        "the CUDA kernels are built for 8.0;9.0+PTX, and cuda:1 has compute capability 7.5; to build them for it, set "
        f'TORCH_CUDA_ARCH_LIST="7.5;8.0;9.0+PTX" and run {BUILD}'
    )
    with warnings.catch_warnings(record=True) as caught:
        assert backends.resolve("auto", tensor_on("cuda:1"), 3) == expected
    assert [reason in str(w.message) for w in caught] == [True] * (expected == "torch")
    with pytest.raises(RuntimeError) as raised:
        backends.resolve("cuda", tensor_on("cuda:1"), 3)
    assert str(raised.value) == f"backend 'cuda' is not available: {reason}"
    assert backends.resolve("auto", tensor_on("cuda:0"), 3) == "cuda"
    assert available_backends("cuda:1") == available_backends("cuda") == [*others, "torch"]  # 1 is the current one
    assert available_backends("cuda:0") == ["cuda", *others, "torch"]
    assert build_info()["backends"]["cuda"] == reason
    assert asked == [1, 0]


def test_fake_tensors_ask_no_device(have):
    asked = have("cuda", "triton")
    with FakeTensorMode():
        assert backends.resolve("auto", torch.empty(2, 9, device="cuda"), 3) == "cuda"
    assert available_backends("cuda") == ["cuda", "triton", "torch"] and not asked


@pytest.mark.parametrize(
    "backend, input, message",
    [
        ("cpp", tensor_on("meta"), "backend 'cpp' runs on CPU tensors, got input on meta"),
        ("cpp", tensor_on("cuda:0"), "backend 'cpp' runs on CPU tensors, got input on cuda:0"),
        ("cuda", tensor_on("cpu"), "backend 'cuda' runs on CUDA tensors, got input on cpu"),
        (
            "triton",
            tensor_on("xpu:0"),
            "backend 'triton' runs on CUDA and HIP tensors (with TRITON_INTERPRET=1 in the "
            "environment on CPU tensors too, for debugging), got input on xpu:0",
        ),
        (
            "triton",
            tensor_on("cuda:0", torch.float64),
            "backend 'triton' takes float32, bfloat16 or float16 input, got torch.float64",
        ),
        (
            "triton",
            tensor_on("cuda:0", shape=(1, 2**31 - 1)),
            "backend 'triton' takes up to 2147352576 classes, got 2147483647",
        ),
    ],
)
def test_input_that_a_named_backend_does_not_take(have, backend, input, message):
    have("cpp", "cuda", "triton", capabilities=[(9, 0)])
    with pytest.raises(ValueError) as raised:
        backends.resolve(backend, input, 3)
    assert str(raised.value) == message


# The slow reference is not taken in silence


def warned(call, *args, **options):
    """The call's result and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return call(*args, **options), caught


WEIGHT = torch.ones(9, 9)
CALLS = {
    "value": lambda x, **more: noised_topk(x, 2, seed=1, **more),
    "loss": lambda x, **more: bal_noised_topk_loss(x, Y.to(x.device), 2, seed=1, **more),
    "module": lambda x, **more: BalNoisedTopK(2, 1.0, seed=1, **more)(x, Y.to(x.device)),
    "linear": lambda x, **more: linear_noised_topk_loss(
        x, WEIGHT.to(x.device), Y.to(x.device), k=2, epsilon=1.0, seed=1, **more
    ),
}
every_call = pytest.mark.parametrize("name", CALLS)


@every_call
def test_auto_warns_once_where_nothing_is_built(have, name):
    have("triton")
    expected, caught = warned(CALLS[name], X)
    assert [str(w.message) for w in caught] == [
        "backend='auto' runs the PyTorch reference on this cpu input, which is many times slower than the "
        "compiled kernels. Backend 'cpp' is not available: no cpp, build it. "
        "Pass backend='torch' to choose the reference without this warning."
    ]
    assert caught[0].category is UserWarning
    assert caught[0].filename == __file__  # the caller's line, not one of the package or of torch
    for again in (name, "loss"):
        assert warned(CALLS[again], X)[1] == []
    assert torch.equal(CALLS[name](X, backend="torch"), expected)


@every_call
def test_no_warning_where_the_reference_is_named_or_nothing_runs(have, name):
    have()
    assert warned(CALLS[name], X, backend="torch")[1] == []
    if name != "linear":  # whose question to autocast torch refuses for the device "meta"
        assert warned(CALLS[name], X.to("meta"))[1] == []
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert warned(CALLS[name], torch.empty(2, 9))[1] == []
        assert warned(backends.resolve, "auto", torch.empty(2, 9, device="cuda"), 3) == ("torch", [])
    assert backends._WARNINGS == set()


@pytest.mark.skipif("cpp" not in available_backends(), reason="the C++ kernels are not built")
@every_call
def test_no_warning_where_the_kernels_are_built(have, name):
    have("cpp")
    assert warned(CALLS[name], X)[1] == []


@pytest.mark.slow
@every_call
def test_a_warning_does_not_break_a_graph(have, name):
    have()
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager", dynamic=True)
    found, caught = warned(compiled, X)
    mine = [w for w in caught if "backend='auto'" in str(w.message)]
    assert len(mine) == 1 and mine[0].filename == __file__
    assert torch.equal(found, CALLS[name](X, backend="torch"))
    _, caught = warned(compiled, torch.ones(4, 9)) if name == "value" else warned(compiled, X + 1)
    assert [w for w in caught if "backend='auto'" in str(w.message)] == []
    torch._dynamo.reset()


def test_a_warning_that_is_made_an_error_stays_one(have):
    have()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="no cpp, build it"):
                noised_topk(X, 2)


def test_input_that_triton_does_not_take_warns_once_for_each_reason(have):
    have("triton", capabilities=[(9, 0)])
    calls = [
        (tensor_on("cuda:0"), 128, "triton", None),
        (tensor_on("cuda:0", torch.float64), 3, "torch", "takes float32, bfloat16 or float16 input"),
        (tensor_on("cuda:0", torch.float64), 4, "torch", None),
        (tensor_on("cuda:0"), 129, "torch", "searches for up to 128 scores (K + 1 for the losses)"),
        (tensor_on("cuda:0"), 2000, "torch", None),
        (tensor_on("cuda:0", shape=(1, 2**31 - 1)), 3, "torch", "takes up to 2147352576 classes"),
    ]
    for input, k, expected, reason in calls:
        name, caught = warned(backends.resolve, "auto", input, k)
        assert name == expected
        assert len(caught) == (reason is not None)
        if reason is not None:
            assert (
                "on this cuda input, which is many times slower than the compiled kernels. Backend 'cuda' is not "
                f"available: no cuda, build it. Backend 'triton' {reason}. Pass"
            ) in str(caught[0].message)


@pytest.mark.parametrize("device", ["xpu:0", "mps:0"])
def test_devices_without_kernels_warn_as_well(have, device):
    have("cpp", "cuda", "triton")
    name, caught = warned(backends.resolve, "auto", tensor_on(device), 3)
    assert (
        name == "torch"
        and "There are kernels for CPU, CUDA and HIP tensors only: pass input.cpu() and target.cpu()"
        in str(caught[0].message)
    )
    assert warned(backends.resolve, "auto", tensor_on(device), 3) == ("torch", [])


# Names and facts


@pytest.mark.parametrize("op", ["candidates", "excess", "gradient", "linear_candidates", "linear_excess"])
def test_each_name_has_its_op(op):
    for name in NAMES:
        assert ops.kernel(op, name) is getattr(torch.ops.topk_fast, f"{op}_{name}").default


@pytest.mark.parametrize("name", available_backends())
def test_a_named_backend_is_taken(name):
    assert backends.resolve(name, X, 3) == name


def test_auto_takes_the_first():
    assert backends.resolve("auto", X, 3) == available_backends()[0]


def test_build_info():
    info = build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["torch"] == torch.__version__ and info["contract"] == 2
    assert list(info["backends"]) == NAMES and info["backends"]["torch"] == "available"
    there = {name for device in ("cpu", "cuda") for name in available_backends(device)}
    assert {name for name, said in info["backends"].items() if said == "available"} == there
    assert (info["triton"] is not None) == ("triton" in there)
    assert bool(info["compiler"]) == bool(info["instruction_sets"]) == ("cpp" in there)


def test_build_info_of_cuda(have):
    have("cuda", architectures="9.0a", capabilities=[(9, 0)])
    info = build_info()
    assert info["cuda_architectures"] == "9.0a" and info["backends"]["cuda"] == "available"
    assert info["backends"]["cpp"] == "no cpp, build it" and info["triton"] is None


def test_triton_under_the_name_of_another_package(have, monkeypatch):
    """ROCm's wheels of Triton are not called triton."""
    have("triton")
    monkeypatch.setattr(backends, "packages_distributions", lambda: {"triton": ["pytest"]})
    assert build_info()["triton"] == pytest.__version__
