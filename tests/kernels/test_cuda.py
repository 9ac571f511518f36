"""Contract under test: the CUDA kernels give the bits of the other backends; here they run on the CPU, in simt.h's model.

The model runs the same source, each thread a fiber, in several orders; what it cannot show is a device's memory order.
Where the extension is built and there is a GPU, the same cases run on it too.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from testing import KINDS, ROOT, assert_same, scores_of
from topk_fast import available_backends, ops, reference
from topk_fast.functional import noised_topk_candidates

SOURCES = ROOT / "csrc"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of topk_cuda.h's ScoreType
CANDIDATES, SMOOTHED, LOSS = range(3)
SANITIZED = "TOPK_FAST_SIMT_LIBRARY"  # names the library to use, built with sanitizers, in a process that has them
NEEDS_GXX = pytest.mark.skipif(shutil.which("g++") is None, reason="the model is C++, and there is no g++")
POINTER, LONG, DOUBLE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int32


class Search(ctypes.Structure):
    _fields_ = [
        ("scores", POINTER), ("n_rows", LONG), ("n_classes", LONG), ("row_stride", LONG), ("class_stride", LONG),
        ("target", POINTER), ("margins", POINTER), ("seed", POINTER), ("ignore_index", LONG), ("first_row", LONG),
        ("first_class", LONG), ("k", LONG), ("n_sample", LONG), ("epsilon", DOUBLE), ("scale", DOUBLE), ("dtype", INT),
        ("mode", INT), ("dense", INT), ("n_processors", INT), ("values", POINTER), ("classes", POINTER),
        ("n_valid", POINTER), ("workspace", POINTER),
    ]  # fmt: skip


class Gradient(ctypes.Structure):
    _fields_ = [
        ("grad", POINTER), ("result", POINTER), ("classes", POINTER), ("target", POINTER), ("grad_stride", LONG),
        ("n_rows", LONG), ("n_sample", LONG), ("first_class", LONG), ("n_classes", LONG), ("scale", DOUBLE),
        ("dtype", INT), ("out", POINTER),
    ]  # fmt: skip


def compiled(out, sources=SOURCES, flags=("-O2",)):
    """The kernels, whose sources lie in a folder, as a library for this CPU."""
    command = ["g++", "-x", "c++", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
               "-Wno-unused-parameter", *flags, "-include", str(ROOT / "tests" / "kernels" / "simt.h"),
               str(sources / "topk_cuda.cu"), "-o", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


class Model:
    """Calls a library's launchers on CPU tensors; ``order`` seeds the order of threads."""

    def __init__(self, path, order=0):
        self.library, self.order = ctypes.CDLL(str(path)), order
        self.library.topk_cuda_workspace.restype = LONG
        self.library.simt_error.restype = ctypes.c_char_p
        self.library.simt_start.argtypes = [ctypes.c_uint64]

    def _run(self, function, argument):
        self.library.simt_start(self.order)
        function(ctypes.byref(argument), None)
        if error := self.library.simt_error():
            raise RuntimeError(error.decode())

    def search(self, mode, x, k, epsilon, n_sample, *, seed=5, dense=False, first_row=0, first_class=0, target=None,
               margins=None, scale=1.0, ignore_index=-100, processors=1):  # fmt: skip
        n_rows, wide, seed = x.shape[0], reference.arithmetic(x.dtype), torch.tensor(seed)
        shape = (n_rows, n_sample, k) if mode == CANDIDATES else (n_rows, n_sample)
        values = torch.empty(shape if mode == CANDIDATES else (n_rows,), dtype=wide)
        classes, n_valid = torch.empty(shape, dtype=torch.int64), torch.empty((), dtype=wide)
        request = Search(
            x.data_ptr(), *x.shape, *x.stride(), *(None if t is None else t.data_ptr() for t in (target, margins)),
            seed.data_ptr(), ignore_index, first_row, first_class, k, n_sample, epsilon, scale, DTYPES.index(x.dtype),
            mode, dense, processors, values.data_ptr(), classes.data_ptr(), n_valid.data_ptr(), None,
        )  # fmt: skip
        size = self.library.topk_cuda_workspace(ctypes.byref(request))
        workspace = torch.full((size // 8,), -(2**60), dtype=torch.int64)  # nobody may count on zeros
        request.workspace = workspace.data_ptr()
        self._run(self.library.topk_cuda_search, request)
        return values, classes, n_valid

    def candidates(self, *args, **more):
        return self.search(CANDIDATES, *args, **more)[:2]

    def gradient(self, grad, result, classes, target, scale, first_class, n_classes, dtype):
        out = torch.empty((classes.shape[0], n_classes), dtype=dtype)
        request = Gradient(
            grad.data_ptr(), result.data_ptr(), classes.data_ptr(), None if target is None else target.data_ptr(),
            grad.stride(0), *classes.shape, first_class, n_classes, scale, DTYPES.index(dtype), out.data_ptr(),
        )  # fmt: skip
        self._run(self.library.topk_cuda_gradient, request)
        return out


class Device:
    """The same calls on a GPU."""

    @staticmethod
    def there(x):
        """A CPU tensor on the GPU with its strides and offset, which `to` would not keep."""
        storage = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to("cuda")
        return torch.as_strided(storage, x.shape, x.stride(), x.storage_offset())

    def search(self, mode, x, k, epsilon, n_sample, *, seed=5, dense=False, first_row=0, first_class=0, target=None,
               margins=None, scale=1.0, ignore_index=-100, processors=1):  # fmt: skip
        x, seed = self.there(x), torch.tensor(seed, device="cuda")
        target, margins = (None if t is None else self.there(t) for t in (target, margins))
        if mode == CANDIDATES:
            args = (x, seed, k, epsilon, n_sample, first_row, first_class, dense)
        elif mode == SMOOTHED:
            args = (x, seed, k, epsilon, n_sample, dense)
        else:
            args = (x, target, margins, seed, k, epsilon, n_sample, scale, ignore_index, dense)
        found = ops.kernel(("candidates", "smoothed", "loss")[mode], "cuda")(*args)
        return (*(t.cpu() for t in found), None)[:3]

    def candidates(self, *args, **more):
        return self.search(CANDIDATES, *args, **more)[:2]

    def gradient(self, *args):
        args = (self.there(a) if isinstance(a, torch.Tensor) else a for a in args)
        return ops.kernel("gradient", "cuda")(*args).cpu()


ON_GPU = "cuda" in available_backends("cuda") and torch.cuda.is_available()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return os.environ.get(SANITIZED) or compiled(tmp_path_factory.mktemp("simt") / "kernels.so")


def places(*orders):
    """Where a test runs: in the model, with its threads in several orders, and on the GPU where there is one."""
    in_the_model = [pytest.param(order, id=f"order{order}", marks=(pytest.mark.host, NEEDS_GXX)) for order in orders]
    return in_the_model + ["device"] * ON_GPU


@pytest.fixture(params=places(0, 1, 2))
def model(request):
    if request.param == "device":
        return Device()
    return Model(request.getfixturevalue("library"), request.param)  # which only the model has to compile


@pytest.fixture(params=places(7))
def one_order(request):
    if request.param == "device":
        return Device()
    return Model(request.getfixturevalue("library"), request.param)


def expected(x, k, epsilon, n_sample, *, dense=False, **more):
    return noised_topk_candidates(
        x, k, epsilon, n_sample, sampler="dense" if dense else "thinned", **({"seed": 5} | more)
    )


# A warp a row that is kept in shared memory, four warps a row, rows that are read twice; and what changes the layout.
SHAPES = {
    "one class": (3, 1, 1, 2),
    "fewer classes than k": (2, 5, 9, 5),
    "a warp a row": (5, 700, 6, 5),
    "a warp a row, many samples": (2, 300, 3, 33),
    "four warps a row": (2, 3000, 6, 10),
    "rows read twice": (2, 20_011, 6, 5),
    "k beyond a warp": (1, 1500, 100, 3),
    "bags in the workspace": (1, 2500, 200, 13),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(model, shape, dtype):
    n_rows, n_classes, k, n_sample = SHAPES[shape]
    x = scores_of("normal", dtype, n_rows, n_classes, 1)
    more = dict(first_row=2**31, first_class=1000)
    assert_same(model.candidates(x, k, 0.7, n_sample, **more), expected(x, k, 0.7, n_sample, **more))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_scores(one_order, kind, dtype):
    for n_classes, dense in ((90, True), (700, False), (2100, False)):
        x = scores_of(kind, dtype, 2, n_classes, 2)
        for epsilon in (1.0, 0.0):
            given = one_order.candidates(x, 5, epsilon, 3, dense=dense)
            assert_same(given, expected(x, 5, epsilon, 3, dense=dense), f"{n_classes} classes, epsilon {epsilon}")


@pytest.mark.parametrize("kind", ["normal", "rising", "99 % masked", "a NaN in the last class", "zeros"])
def test_rows_that_several_blocks_collect(one_order, kind):
    x = scores_of(kind, torch.bfloat16, 1, 140_000, 3)
    assert_same(one_order.candidates(x, 6, 1.0, 4, processors=100), expected(x, 6, 1.0, 4))


def test_more_contenders_than_a_list_holds(one_order):
    """Groups that the plan does not look at are full of high scores: lists overflow, and the row itself is searched."""
    group, stride, _ = reference.noise.plan(70_000, 6)
    assert stride > 1
    x = torch.full((1, 70_000), 9.0)
    x.view(1, -1)[:, : 70_000 // (group * stride) * group * stride].view(1, -1, stride, group)[:, :, 0] = 1.0
    x += scores_of("normal", torch.float32, 1, 70_000, 4) / 4
    for processors in (1, 100):
        assert_same(one_order.candidates(x, 3, 0.5, 2, processors=processors), expected(x, 3, 0.5, 2))


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "an odd offset": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "transposed": lambda x: x.t().contiguous().t(),
    "every second class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(3, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_classes", [777, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(one_order, dtype, n_classes, layout):
    x = LAYOUTS[layout](scores_of("normal", dtype, 3, n_classes, 5))
    assert_same(one_order.candidates(x, 6, 1.0, 5), expected(x, 6, 1.0, 5))


@pytest.mark.parametrize("n_classes", [60, 900, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "some NaN", "99 % masked"])
def test_losses_and_gradients(model, kind, dtype, n_classes):
    n_rows, n_sample = 6, 5
    x, wide = scores_of(kind, dtype, n_rows, n_classes, 6), reference.arithmetic(dtype)
    target = torch.tensor([0, n_classes - 1, -100, 5, -100, 7])
    margins = torch.linspace(0, 1, n_classes, dtype=wide)
    for m, scale in ((None, 1.0), (margins, 30.0)):
        args = (x, target, m, torch.tensor(5), 4, 0.5, n_sample, scale, -100, False)
        wanted = ops.kernel("loss", "torch")(*args)
        given = model.search(LOSS, x, 4, 0.5, n_sample, target=target, margins=m, scale=scale)
        losses, classes, n_valid = given
        assert_same((losses, classes, n_valid), wanted)
        grad = torch.arange(1.0, 13.0, dtype=wide)[::2]
        for first, width in ((0, n_classes), (3, 40)):
            entries = (grad, losses, classes, target, scale, first, width, dtype)
            assert_same(model.gradient(*entries), ops.kernel("gradient", "torch")(*entries))
    top, classes, _ = model.search(SMOOTHED, x, 4, 0.5, n_sample)
    assert_same((top, classes), ops.kernel("smoothed", "torch")(x, torch.tensor(5), 4, 0.5, n_sample, False))
    entries = (torch.ones(1, dtype=wide).expand(n_rows), top, classes, None, 1.0, 0, n_classes, dtype)
    assert_same(model.gradient(*entries), ops.kernel("gradient", "torch")(*entries))


GRADIENTS = {
    "every second number": lambda grad: grad.repeat_interleave(2)[::2],
    "a column": lambda grad: torch.stack([grad, -grad], 1)[:, 0],
    "one number expanded": lambda grad: grad[:1].expand(len(grad)),
}


@pytest.mark.parametrize("layout", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_gradients(one_order, dtype, layout):
    """A row's gradient is read where its stride says; those between are wrong ones or not there."""
    grad = GRADIENTS[layout](torch.arange(1.0, 6.0, dtype=reference.arithmetic(dtype)))
    assert grad.stride() in [(2,), (0,)]
    classes = torch.tensor([[3, 3, 8], [-1, -1, -1], [9, 0, 5], [5, 5, 5], [1, 2, 3]])
    result, target = torch.ones(5, dtype=grad.dtype), torch.tensor([3, 2, 9, 5, 7])
    for y in (target, None):
        entries = (grad, result, classes, y, 0.5, 0, 50, dtype)
        wanted = ops.kernel("gradient", "torch")(*entries)
        assert wanted.any(1).sum() >= 3  # rows whose gradient shows
        assert_same(one_order.gradient(*entries), wanted)


def test_no_rows_and_all_ignored(one_order):
    x = torch.randn(2, 40)
    values, classes, n_valid = one_order.search(LOSS, x[:0], 3, 1.0, 2, target=torch.zeros(0, dtype=torch.int64))
    assert values.shape == (0,) and classes.shape == (0, 2) and n_valid == 0
    values, classes, n_valid = one_order.search(LOSS, x, 3, 1.0, 2, target=torch.full((2,), -100))
    assert not values.any() and (classes == -1).all() and n_valid == 0


@pytest.mark.host
@NEEDS_GXX
@pytest.mark.parametrize("label", [-1, 40])
def test_a_wrong_label_stops_the_device(library, label):
    with pytest.raises(RuntimeError, match="trap"):  # in the model alone: a device would be lost to later tests
        Model(library).search(LOSS, torch.randn(1, 40), 3, 1.0, 2, target=torch.tensor([label]))


# On a GPU

on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU and the CUDA extension: graphs, streams, autograd there")


@on_gpu
def test_graphs_streams_and_autograd_on_a_device():
    from topk_fast.functional import bal_noised_topk_loss

    x = scores_of("normal", torch.float32, 64, 3000, 1).cuda().requires_grad_()
    y, seed = torch.arange(64, device="cuda"), torch.tensor(3, device="cuda")

    def step():
        x.grad = None
        bal_noised_topk_loss(x, y, 5, seed=seed, backend="cuda").backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number in (3, 4):
        seed.fill_(number)
        graph.replay()
        on_cpu = x.detach().cpu().requires_grad_()
        bal_noised_topk_loss(on_cpu, y.cpu(), 5, seed=number).backward()
        assert_same(x.grad.cpu(), on_cpu.grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_opcheck_on_a_device():
    x, seed = torch.randn(3, 150, device="cuda"), torch.tensor(3, device="cuda")
    y = torch.tensor([1, -100, 149], device="cuda")
    torch.library.opcheck(ops.kernel("loss", "cuda"), (x, y, None, seed, 5, 1.0, 4, 1.0, -100, False))
    torch.library.opcheck(ops.kernel("candidates", "cuda"), (x, seed, 5, 1.0, 4, 2, 1000, False))


# The model finds what it is for

BUGS = {  # in the source, and how they show: as an error of the model or as wrong bits
    "no barrier after the collection": (
        "prefix[1 + warp] = count;\n      Threads::sync();", "prefix[1 + warp] = count;", None,
    ),
    "no barrier before a reduction is read": (
        "scratch[warp()] = (int64_t)v;\n    sync();", "scratch[warp()] = (int64_t)v;", None,
    ),
    "a barrier that some threads miss": (
        "    Threads::sync();\n    reach = infinity<S>();", "    if (rank) Threads::sync();\n    reach = infinity<S>();", "divergent",
    ),
    "a mask without the caller": ("__ballot_sync(kFull, found)", "__ballot_sync(1u, found)", "leaves it out|wrong mask"),
    "an entry too far": ("if (hit && to < capacity)", "if (hit && to <= capacity)", None),
    "the last score of a vector left out": ("i < (int)(16 / sizeof(T))", "i + 1 < (int)(16 / sizeof(T))", None),
}  # fmt: skip


def with_bug(folder, right, wrong):
    """A copy of the sources in which one place is wrong."""
    sources = shutil.copytree(SOURCES, folder / "csrc")
    (place,) = (path for path in sources.rglob("*") if path.is_file() and right in path.read_text())
    text = place.read_text()
    assert text.count(right) == 1
    place.write_text(text.replace(right, wrong))
    return sources


@pytest.mark.host
@NEEDS_GXX
@pytest.mark.parametrize("bug", [b for b in BUGS if b != "an entry too far"])
def test_planted_bugs_are_found(tmp_path, bug):
    right, wrong, error = BUGS[bug]
    path = compiled(tmp_path / "bug.so", with_bug(tmp_path, right, wrong), ("-O1", "-Wno-unused"))
    found = []
    for order in range(6):
        for kind in ("normal", "rising"):
            x = scores_of(kind, torch.float32, 3, 2500, 8)
            try:
                given = Model(path, order).candidates(x, 6, 1.0, 5)
                found.append(all(torch.equal(a, b) for a, b in zip(given, expected(x, 6, 1.0, 5))))
            except RuntimeError as message:
                found.append(str(message))
    if error:
        assert any(isinstance(f, str) and re.search(error, f) for f in found), found
    else:
        assert not all(f is True for f in found)


def sanitized(tmp_path, sources, select):
    """A run of this file's tests on a library with sanitizers, in a process that has their run time."""
    flags = (
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-Wno-unused",
        "-Wno-clobbered",
    )
    path = compiled(tmp_path / "sanitized.so", sources, flags)
    found = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
             for name in ("libasan.so", "libubsan.so", "libstdc++.so")]  # fmt: skip
    environment = os.environ | {
        SANITIZED: str(path), "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "CUDA_VISIBLE_DEVICES": "",  # CUDA does not start under AddressSanitizer, which takes the addresses it wants
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", str(__file__), "-k", select]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.host
@NEEDS_GXX
@pytest.mark.skipif(SANITIZED in os.environ, reason="this is the process with the sanitizers")
def test_under_sanitizers(tmp_path):
    done = sanitized(tmp_path, SOURCES, "order0 and float32 or list_holds")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.host
@NEEDS_GXX
@pytest.mark.skipif(SANITIZED in os.environ, reason="this is the process with the sanitizers")
def test_sanitizers_see_an_entry_too_far(tmp_path):
    right, wrong, _ = BUGS["an entry too far"]
    done = sanitized(tmp_path, with_bug(tmp_path, right, wrong), "list_holds")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr + done.stdout


@pytest.mark.host
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc: nothing is compiled for a GPU")
@pytest.mark.skipif("triton" not in available_backends("cuda"), reason="NVIDIA's disassembler comes with Triton")
@pytest.mark.skipif(SANITIZED in os.environ, reason="this is the process with the sanitizers")
def test_compiled_for_gpus_within_the_budget():
    """No spills, 128 registers, 16-byte loads and stores, and in PTX no fused or approximate step."""
    command = [sys.executable, str(ROOT / "benchmarks" / "cuda_static.py"), "--quick"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert len(facts) == 2 * 4 * 4  # architectures, dtypes, kernels
    for row in facts:
        assert row["registers"] <= 128 and row["spill_bytes"] == 0 and row["stack_bytes"] == 0, row
        assert row["forbidden"] == [], row
        wide = {"search_kernel": 5, "collect_kernel": 4, "gradient_kernel": 0}[row["kernel"].split()[0]]
        assert row["loads_of_16_bytes"] >= wide, row
        assert row["stores_of_16_bytes"] >= (row["kernel"].startswith("gradient")), row
