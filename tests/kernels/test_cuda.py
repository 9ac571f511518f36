"""Contract under test: the CUDA kernels give the reference's bits; here they run on the CPU, in simt.h's model.

The model runs the same source, each thread a fiber, in several orders; it cannot show a device's memory order.
Where the extension is built and there is a GPU, the same cases run on it too.
"""

import ctypes
import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from testing import KINDS, LARGE_SEARCHES, ROOT, assert_same, scores_of
from topk_fast import available_backends, noise, ops, reference
from topk_fast.criterion import REDUCTIONS, Criterion
from topk_fast.request import Labels, Noise, Place, Slice

SOURCES = ROOT / "csrc"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of request.h's ScoreType
ORIGIN = Place()
LAWS = [noise.NORMAL, noise.GUMBEL]
SANITIZED = "TOPK_FAST_SIMT_LIBRARY"  # names the library to use, built with sanitizers, in a process that has them
NEEDS_GXX = pytest.mark.skipif(shutil.which("g++") is None, reason="the model is C++, and there is no g++")
POINTER, LONG, DOUBLE, INT, BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int32, ctypes.c_bool


class Search(ctypes.Structure):
    _fields_ = [
        ("scores", POINTER),
        ("type", INT),
        ("n_rows", LONG),
        ("n_classes", LONG),
        ("row_stride", LONG),
        ("class_stride", LONG),
        ("target", POINTER),
        ("ignore_index", LONG),
        ("exclude_target", BOOL),
        ("seed", POINTER),
        ("epsilon", DOUBLE),
        ("schedule", POINTER),
        ("first_row", LONG),
        ("first_class", LONG),
        ("k", LONG),
        ("n_sample", LONG),
        ("n_ranks", INT),
        ("ranks", INT * 32),
        ("law", INT),
        ("dense", BOOL),
        ("values", POINTER),
        ("classes", POINTER),
    ]


class Gradient(ctypes.Structure):
    _fields_ = [
        ("grad", POINTER),
        ("classes", POINTER),
        ("target", POINTER),
        ("ignore_index", LONG),
        ("n_rows", LONG),
        ("n_sample", LONG),
        ("n_ranks", LONG),
        ("first_class", LONG),
        ("n_classes", LONG),
        ("type", INT),
        ("out", POINTER),
        ("slope", POINTER),
        ("divisor", POINTER),
        ("grad_stride", LONG),
    ]


class Link(ctypes.Structure):
    _fields_ = [
        ("excess", POINTER),
        ("target", POINTER),
        ("ignore_index", LONG),
        ("n_rows", LONG),
        ("n_ranks", LONG),
        ("n_classes", LONG),
        ("margins", POINTER),
        ("weight", POINTER),
        ("temperature", DOUBLE),
        ("margin", DOUBLE),
        ("scale", DOUBLE),
        ("rank_weights", DOUBLE * 32),
        ("kind", INT),
        ("reduction", INT),
        ("is_double", BOOL),
        ("losses", POINTER),
        ("rows", POINTER),
        ("slope", POINTER),
        ("divisor", POINTER),
    ]


class Gpu(ctypes.Structure):
    _fields_ = [("processors", INT), ("shared_memory", INT), ("cache", LONG), ("has_slow_memory", ctypes.c_bool)]


H100_SHARED_MEMORY = 228 << 10


def compiled(out, sources=SOURCES, flags=("-O1",)):
    """The kernels, whose sources lie in a folder, as a library for this CPU."""
    command = [
        "g++",
        "-x",
        "c++",
        "-std=c++17",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
        *flags,
        "-include",
        str(ROOT / "tests" / "kernels" / "simt.h"),
        str(sources / "cuda" / "kernels.cu"),
        "-o",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def pointer(x):
    return None if x is None else x.data_ptr()


class Model:
    """Calls a library's launchers on CPU tensors, with reference.py's functions and arguments.

    ``order`` seeds the order of threads; a layout is chosen as for a GPU with so many ``processors``, and so many bytes
    of shared memory in each, and so many bytes of ``cache`` in which rows should stay.
    """

    def __init__(self, path, order=0):
        self.library, self.order = ctypes.CDLL(str(path)), order
        self.processors, self.shared_memory, self.cache, self.has_slow_memory = 1, H100_SHARED_MEMORY, 0, True
        self.library.topk_cuda_workspace.restype = LONG
        self.library.simt_error.restype = ctypes.c_char_p
        self.library.simt_start.argtypes = [ctypes.c_uint64]

    def _run(self, function, *arguments):
        self.library.simt_start(self.order)
        function(*arguments, None)
        if error := self.library.simt_error():
            raise RuntimeError(error.decode())

    def _search(self, x, wanted, place, labels, ranks, shape):
        values = torch.empty(shape[0], dtype=reference.arithmetic(x.dtype))
        classes = torch.empty(shape[1], dtype=torch.int64)
        request = Search(
            x.data_ptr(),
            DTYPES.index(x.dtype),
            *x.shape,
            *x.stride(),
            pointer(labels.target),
            labels.ignore_index,
            labels.exclude_target,
            wanted.seed.data_ptr(),
            wanted.epsilon,
            pointer(wanted.schedule),
            *place,
            wanted.k,
            wanted.n_sample,
            len(ranks),
            (INT * 32)(*ranks),
            wanted.law,
            wanted.dense,
            values.data_ptr(),
            classes.data_ptr(),
        )
        gpu = Gpu(self.processors, self.shared_memory, self.cache, self.has_slow_memory)
        size = self.library.topk_cuda_workspace(ctypes.byref(request), ctypes.byref(gpu))
        workspace = torch.full((size // 8,), -(2**60), dtype=torch.int64)  # nobody may count on zeros
        arguments = ctypes.byref(request), ctypes.byref(gpu), POINTER(workspace.data_ptr())
        self._run(self.library.topk_cuda_search, *arguments)
        return values, classes

    def candidates(self, x, wanted, place=ORIGIN):
        shape = (x.shape[0], wanted.n_sample, wanted.k)
        return self._search(x, wanted, place, Labels(None), (), (shape, shape))

    def excess(self, x, wanted, labels):
        n_rows, ranks = x.shape[0], wanted.ranks
        shapes = (n_rows, len(ranks)), (n_rows, wanted.n_sample, len(ranks))
        return self._search(x, wanted, Place(), labels, ranks, shapes)

    def gradient(self, grad, classes, labels, of, slope=None, divisor=None):
        """With a slope ``grad`` has a number for each row, or one for all of them."""
        out = torch.empty((classes.shape[0], of.n_classes), dtype=of.dtype)
        request = Gradient(
            grad.contiguous().data_ptr(),
            classes.data_ptr(),
            pointer(labels.target),
            labels.ignore_index,
            *classes.shape,
            of.first_class,
            of.n_classes,
            DTYPES.index(of.dtype),
            out.data_ptr(),
            pointer(slope),
            pointer(divisor),
            grad.dim(),
        )
        self._run(self.library.topk_cuda_gradient, ctypes.byref(request))
        return out

    def link(self, excess, labels, criterion):
        n_ranks = excess.shape[1]
        link, temperature, margin, margins, scale, rank_weights, weight, reduction = criterion.arguments(n_ranks)
        shape = excess.shape[:1] if criterion.reduction == "none" else ()
        losses, slope, divisor = excess.new_empty(shape), torch.empty_like(excess), excess.new_empty(())
        request = Link(
            excess.data_ptr(),
            labels.target.data_ptr(),
            labels.ignore_index,
            *excess.shape,
            max(len(x) if x is not None else 0 for x in (margins, weight)),
            pointer(margins),
            pointer(weight),
            temperature,
            margin,
            scale,
            (DOUBLE * 32)(*rank_weights),
            link,
            reduction,
            excess.dtype == torch.float64,
            losses.data_ptr(),
            losses.data_ptr() if criterion.reduction == "none" else None,
            slope.data_ptr(),
            divisor.data_ptr(),
        )
        self._run(self.library.topk_cuda_link, ctypes.byref(request))
        return losses, slope, divisor


class Device:
    """The same calls on a GPU."""

    processors = shared_memory = cache = 0  # its own

    @staticmethod
    def there(x):
        """A CPU tensor on the GPU with its strides and offset, which `to` would not keep."""
        if not isinstance(x, torch.Tensor):
            return x
        storage = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to("cuda")
        return torch.as_strided(storage, x.shape, x.stride(), x.storage_offset())

    def _run(self, name, *arguments):
        found = ops.kernel(name, "cuda")(*(self.there(x) for x in arguments))
        return found.cpu() if isinstance(found, torch.Tensor) else tuple(x.cpu() for x in found)

    def candidates(self, x, wanted, place=ORIGIN):
        return self._run("candidates", x, *wanted, *place)

    def excess(self, x, wanted, labels):
        return self._run("excess", x, *wanted, *labels)

    def gradient(self, grad, classes, labels, of, slope=None, divisor=None):
        entries = (classes, labels.target, labels.ignore_index, *of)
        if slope is None:
            return self._run("gradient", grad, *entries)
        return self._run("linked_gradient", grad, slope, divisor, *entries)

    def link(self, excess, labels, criterion):
        return self._run("link", excess, *labels[:2], *criterion.arguments(excess.shape[1]))


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


def noise_of(*ranks, epsilon=1.0, schedule=None, n_sample=5, law=noise.NORMAL, dense=False):
    if schedule is not None:
        schedule = torch.tensor(schedule, dtype=torch.float64)
    return Noise(torch.tensor(5), ranks, epsilon, schedule, n_sample, law, dense)


# A warp a row that is kept in shared memory, four warps a row, rows that are read twice; and what changes the layout.
SHAPES = {
    "one class": (3, 1, 1, 2),
    "fewer classes than k": (2, 5, 9, 5),
    "four warps a short row": (5, 700, 6, 5),
    "a warp a row": (17, 700, 6, 5),
    "a warp a row, many samples": (16, 300, 3, 33),
    "four warps a row": (5, 3000, 6, 10),
    "eight warps a row": (2, 3000, 6, 10),
    "rows read twice": (2, 20_011, 6, 5),
    "k beyond a warp": (1, 1500, 100, 3),
    "lists in the workspace": (1, 2500, 200, 9),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(model, shape, dtype, law):
    n_rows, n_classes, k, n_sample = SHAPES[shape]
    x = scores_of("normal", dtype, n_rows, n_classes, 1)
    wanted = noise_of(k, epsilon=0.7, n_sample=n_sample, law=law)
    place = Place(first_row=2**31, first_class=1000)
    assert_same(model.candidates(x, wanted, place), reference.candidates(x, wanted, place))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_scores(one_order, kind, dtype, law):
    for n_classes, dense in ((90, True), (700, False), (2100, False)):
        x = scores_of(kind, dtype, 2, n_classes, 2)
        for epsilon in (1.0, 0.0):
            wanted = noise_of(5, epsilon=epsilon, n_sample=3, law=law, dense=dense)
            note = f"{n_classes} classes, epsilon {epsilon}"
            assert_same(one_order.candidates(x, wanted), reference.candidates(x, wanted), note)


@pytest.mark.parametrize("kind", ["normal", "rising", "99 % masked", "a NaN in the last class", "zeros"])
def test_rows_that_several_blocks_collect(one_order, kind):
    """A row whose target is ignored is not collected, and its lists are not read."""
    one_order.processors = 100
    x = scores_of(kind, torch.bfloat16, 2, 140_000, 3)
    wanted, labels = noise_of(6, 2, n_sample=4), Labels(torch.tensor([-100, 139_999]))
    assert_same(one_order.excess(x, wanted, labels), reference.excess(x, wanted, labels))


def test_more_contenders_than_a_list_holds(one_order):
    """Groups that the plan does not look at are full of high scores: lists overflow, and the row itself is searched."""
    group, stride, _ = noise.plan(70_000, 6)
    assert stride > 1
    x = torch.full((1, 70_000), 9.0)
    x.view(1, -1)[:, : 70_000 // (group * stride) * group * stride].view(1, -1, stride, group)[:, :, 0] = 1.0
    x += scores_of("normal", torch.float32, 1, 70_000, 4) / 4
    wanted = noise_of(3, epsilon=0.5, n_sample=2)
    for one_order.processors in (1, 100):
        assert_same(one_order.candidates(x, wanted), reference.candidates(x, wanted))


@pytest.mark.parametrize("kind", ["by frequency", "shuffled", "in blocks"])
@pytest.mark.parametrize("processors", [1, 100])
def test_contenders_that_stand_together(one_order, processors, kind):
    """Zipf-like scores: where classes are sorted by frequency, the contenders are the first few thousand classes."""
    one_order.processors = processors
    n_classes = 70_000
    x = -torch.arange(1.0, n_classes + 1).log()[None] + scores_of("normal", torch.float32, 1, n_classes, 5) / 50
    if kind == "shuffled":
        x = x[:, torch.randperm(n_classes, generator=torch.Generator().manual_seed(1))]
    elif kind == "in blocks":
        x = x.view(7, 10_000).t().reshape(1, -1)
    for law in LAWS:
        wanted = noise_of(6, epsilon=0.5, n_sample=3, law=law)
        assert_same(one_order.candidates(x, wanted), reference.candidates(x, wanted))


@pytest.mark.parametrize("shared_memory", [64 << 10, 100 << 10], ids=["64 KB", "100 KB"])
@pytest.mark.parametrize("n_rows, n_classes, k, n_sample", [(16, 900, 6, 33), (2, 9000, 40, 16), (1, 3000, 6, 5)])
def test_multiprocessors_with_less_memory(one_order, n_rows, n_classes, k, n_sample, shared_memory):
    """Fewer samples are searched side by side, and lists lie in the workspace."""
    one_order.shared_memory = shared_memory
    x, wanted = scores_of("normal", torch.float32, n_rows, n_classes, 6), noise_of(k, n_sample=n_sample)
    assert_same(one_order.candidates(x, wanted), reference.candidates(x, wanted))


def test_fewer_rows_at_work_where_they_should_stay_in_a_cache(one_order):
    """Two blocks take seven rows, or three of them, whose lists in the workspace are as many."""
    x, wanted = scores_of("normal", torch.float32, 7, 2500, 6), noise_of(200, n_sample=3)
    for one_order.cache in (1, 30_000):
        assert_same(one_order.candidates(x, wanted), reference.candidates(x, wanted))


@pytest.mark.host
@NEEDS_GXX
@pytest.mark.parametrize("n_rows, n_classes, dtype, k, n_sample", LARGE_SEARCHES)
def test_the_workspace_is_small_beside_the_scores(library, n_rows, n_classes, dtype, k, n_sample):
    """On a GPU of 132 multiprocessors: only blocks that run at a time have lists, however many rows there are."""
    request = Search(type=DTYPES.index(dtype), n_rows=n_rows, n_classes=n_classes, k=k, n_sample=n_sample)
    gpu = Gpu(132, H100_SHARED_MEMORY)
    size = Model(library).library.topk_cuda_workspace(ctypes.byref(request), ctypes.byref(gpu))
    assert size <= n_rows * n_classes * dtype.itemsize / 50


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
    assert_same(one_order.candidates(x, noise_of(6)), reference.candidates(x, noise_of(6)))


@pytest.mark.parametrize("ranks", [(4,), (4, 2, 9, 5, 4)], ids=["one rank", "several ranks"])
@pytest.mark.parametrize("n_classes", [60, 900, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "some NaN", "99 % masked", "some +inf"])
def test_excesses_and_gradients(one_order, kind, dtype, n_classes, ranks):
    """Rows with a target, without one, and ignored ones; lists that hold their target and lists that do not."""
    x, target = scores_of(kind, dtype, 6, n_classes, 6), torch.tensor([0, n_classes - 1, -100, 5, -100, 7])
    target[3] = x[3].float().argmax()
    targets = {"target": Labels(target), "none": Labels(None), "others only": Labels(target, -100, True)}
    grad = torch.linspace(-2.5, 1.0, 6 * len(ranks), dtype=reference.arithmetic(dtype)).view(6, -1)
    for law in LAWS:
        wanted = noise_of(*ranks, epsilon=0.5, law=law)
        for note, labels in targets.items():
            excess, classes = one_order.excess(x, wanted, labels)
            assert_same((excess, classes), reference.excess(x, wanted, labels), note)
            for of in (Slice(0, n_classes, dtype), Slice(3, 40, dtype)):
                given = one_order.gradient(grad, classes, labels, of)
                assert_same(given, reference.gradient(grad, classes, labels, of), note)


@pytest.mark.parametrize("n_classes", [300, 2500])
def test_every_order_of_threads_writes_the_same(model, n_classes):
    """As many ranks as there may be, some of them beyond a warp's list; more samples than are searched side by side."""
    x, target = scores_of("ties", torch.float32, 3, n_classes, 9), torch.tensor([4, -100, 7])
    wanted, labels = noise_of(*range(64, 1, -2), n_sample=19), Labels(target, -100, True)
    assert len(wanted.ranks) == 32
    excess, classes = model.excess(x, wanted, labels)
    assert_same((excess, classes), reference.excess(x, wanted, labels))
    grad, of = torch.linspace(-1.0, 2.0, 96).view(3, 32), Slice(0, n_classes, torch.float32)
    assert_same(model.gradient(grad, classes, labels, of), reference.gradient(grad, classes, labels, of))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 1e-40, 0.3])
def test_a_schedule_replaces_epsilon(one_order, dtype, epsilon, law):
    """The kernel reads it on the device. It has the bits of the same number as epsilon, and that number is not used."""
    x = scores_of("normal", dtype, 2, 2500, 7)
    wanted = noise_of(3, epsilon=7.0, schedule=epsilon, law=law)
    given = one_order.candidates(x, wanted)
    assert_same(given, one_order.candidates(x, wanted._replace(epsilon=epsilon, schedule=None)))
    assert_same(given, reference.candidates(x, wanted))


def test_a_row_with_a_nan_excess_marks_all_its_ids(one_order):
    """An infinite true score against an infinite entry: the other rank's excess stays a number."""
    x = torch.randn(2, 40)
    x[0, :2] = torch.inf
    excess, classes = one_order.excess(x, noise_of(1, 3), Labels(torch.tensor([1, 1])))
    assert excess.isnan().tolist() == [[True, False], [False, False]] and excess[0, 1] == -torch.inf
    assert (classes[0] == -2).all() and (classes[1] >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_many_rows_in_one_block(one_order, dtype):
    """Rows shorter than a block's share and rows longer than it, with NaN rows, ignored ones and repeated classes."""
    for n_rows, n_classes in ((300, 10), (3, 9001)):
        generator = torch.Generator().manual_seed(n_classes)
        classes = torch.randint(-1, n_classes, (n_rows, 3, 2), generator=generator)
        classes[1::7] = -2
        target = torch.randint(n_classes, (n_rows,), generator=generator)
        target[::5] = -100
        grad = torch.randn(n_rows, 2, generator=generator, dtype=reference.arithmetic(dtype)).abs()
        for labels in (Labels(target), Labels(None)):
            entries = (grad, classes, labels, Slice(0, n_classes, dtype))
            assert_same(one_order.gradient(*entries), reference.gradient(*entries))


CRITERIA = {
    "hinge": Criterion(),
    "scaled hinge, margins": Criterion(margin=torch.linspace(0.01, 0.3, 40), scale=50.0),
    "several ranks, weights": Criterion(
        margin=-0.3, scale=0.7, rank_weights=(0.3, 2.0, 1.1), weight=torch.linspace(0, 2, 40)
    ),
    "identity": Criterion("identity", margin=0.0),
    "softplus": Criterion("softplus", 0.3, margin=0.1, rank_weights=(1.0, 0.5), weight=torch.linspace(0.1, 2, 40)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_links(model, name, dtype):
    """Each row has the bits of torch's formula, except for the softplus, whose exp and log1p may round otherwise.

    Sums over rows differ by their order: by N units of the sum of the terms' magnitudes at most.
    """
    chosen = CRITERIA[name]
    tensors = {field: x.to(dtype) for field, x in chosen._asdict().items() if isinstance(x, torch.Tensor)}
    chosen, unit = chosen._replace(**tensors), torch.finfo(dtype).eps
    step = torch.finfo(dtype).smallest_normal * unit  # between subnormal numbers
    close = partial(torch.testing.assert_close, rtol=8 * unit, atol=2 * step)
    same = close if chosen.is_curved else assert_same
    generator = torch.Generator().manual_seed(1)
    for n_rows in (1, 7, 1500):
        excess = torch.randn(n_rows, len(chosen.rank_weights or [1]), generator=generator, dtype=dtype)
        excess[::5] *= 100
        labels = Labels(torch.randint(40, (n_rows,), generator=generator))
        labels.target[1::3] = -100
        leaf = excess.clone().requires_grad_()
        terms = chosen._replace(reduction="none").reduced(leaf, labels)
        terms.sum().backward()
        valid = labels.target != -100
        shares = valid.to(dtype) if chosen.weight is None else chosen.weight[labels.known] * valid
        for reduction in REDUCTIONS:
            losses, slope, divisor = model.link(excess, labels, chosen._replace(reduction=reduction))
            same(slope[valid], leaf.grad[valid])
            error = n_rows * unit
            if reduction == "none":
                same(losses, terms.detach())
            else:
                assert losses.shape == () and abs(losses * divisor - terms.sum()) <= 2 * error * terms.abs().sum()
            torch.testing.assert_close(
                divisor, shares.sum() if reduction == "mean" else shares.new_ones(()), rtol=error, atol=0
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_link(one_order, dtype):
    """The bits of a gradient that is divided and multiplied by the slope before: for all rows, or a number a row."""
    generator, of = torch.Generator().manual_seed(3), Slice(0, 30, dtype)
    classes = torch.randint(-1, 30, (9, 5, 2), generator=generator)
    labels = Labels(torch.tensor([3, -100, 0, 29, 5, 5, -100, 7, 1]))
    slope = torch.randn(9, 2, generator=generator, dtype=reference.arithmetic(dtype))
    divisor = slope.new_tensor(7.0)
    for grad in (slope.new_tensor(-0.3), slope.new_tensor(range(9)) / 3):
        given = one_order.gradient(grad, classes, labels, of, slope, divisor)
        assert_same(given, reference.gradient((grad / divisor).expand(9)[:, None] * slope, classes, labels, of))


def test_a_link_of_no_rows(one_order):
    """As torch's: a mean over no rows is NaN, a sum is 0."""
    for reduction, wanted in (("mean", torch.nan), ("sum", 0.0)):
        labels = Labels(torch.zeros(0, dtype=torch.int64))
        loss, slope, _ = one_order.link(torch.zeros(0, 1), labels, Criterion(reduction=reduction))
        assert_same(loss, torch.tensor(wanted)), slope.shape == (0, 1)


def test_no_rows_no_classes_and_all_ignored(one_order):
    x, wanted = torch.randn(2, 40), noise_of(3, n_sample=2)
    nobody = Labels(torch.zeros(0, dtype=torch.int64))
    excess, classes = one_order.excess(x[:0], wanted, nobody)
    assert excess.shape == (0, 1) and classes.shape == (0, 2, 1)
    assert one_order.gradient(excess, classes, nobody, Slice(0, 40, torch.float32)).shape == (0, 40)
    ignored = Labels(torch.full((2,), -100))
    excess, classes = one_order.excess(x, wanted, ignored)
    assert not excess.any() and (classes == -1).all()
    assert one_order.gradient(excess, classes, ignored, Slice(7, 0, torch.float32)).shape == (2, 0)


@pytest.mark.host
@NEEDS_GXX
@pytest.mark.parametrize("label", [-1, 40])
def test_a_wrong_label_stops_the_device(library, label):
    with pytest.raises(
        RuntimeError, match="target out of bounds"
    ):  # in the model: a device would be lost to later tests
        Model(library).excess(torch.randn(1, 40), noise_of(3), Labels(torch.tensor([label])))


# On a GPU

on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU and the CUDA extension: graphs, streams, autograd there")


@on_gpu
def test_graphs_streams_and_autograd_on_a_device():
    from topk_fast.functional import bal_noised_topk_loss

    x = scores_of("normal", torch.float32, 64, 3000, 1).cuda().requires_grad_()
    y, seed = torch.arange(64, device="cuda"), torch.tensor(3, device="cuda")
    epsilon = torch.tensor(1.0, dtype=torch.float64, device="cuda")

    def step():
        x.grad = None
        bal_noised_topk_loss(x, y, 5, epsilon, seed=seed, backend="cuda").backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number, level in ((3, 1.0), (4, 1.0), (4, 0.25)):
        seed.fill_(number), epsilon.fill_(level)
        graph.replay()
        on_cpu = x.detach().cpu().requires_grad_()
        bal_noised_topk_loss(on_cpu, y.cpu(), 5, level, seed=number).backward()
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
    schedule = torch.tensor(0.5, device="cuda", dtype=torch.float64)
    wanted = Noise(seed, (6, 2), 1.0, schedule, 4, noise.GUMBEL, False)
    torch.library.opcheck(ops.kernel("candidates", "cuda"), (x, *wanted, 2, 1000))
    for labels in (Labels(None), Labels(y, -100, True)):
        torch.library.opcheck(ops.kernel("excess", "cuda"), (x, *wanted, *labels))
        _, classes = ops.kernel("excess", "cuda")(x, *wanted, *labels)
        grad = torch.randn(3, 2, device="cuda")
        entries = (grad, classes, labels.target, -100, 0, 150, torch.float32)
        torch.library.opcheck(ops.kernel("gradient", "cuda"), entries)


@on_gpu
@pytest.mark.parametrize("name", ["seed", "schedule", "target"])
def test_tensors_elsewhere_are_refused_on_a_device(name):
    tensors = {"seed": torch.tensor(3), "schedule": torch.tensor(1.0).double(), "target": torch.tensor([1, 2])}
    given = {other: x if other == name else x.cuda() for other, x in tensors.items()}
    wanted = Noise(given["seed"], (6, 2), 1.0, given["schedule"], 4, noise.NORMAL, False)
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of the scores"):
        ops.kernel("excess", "cuda")(torch.randn(2, 150, device="cuda"), *wanted, given["target"], -100, False)


@on_gpu
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: x[:1, :1].expand(x.shape),
    ],
    ids=["transposed", "every second row", "expanded rows", "one number expanded"],
)
def test_a_strided_gradient_comes_on_a_device(strided):
    from topk_fast.functional import noised_excess

    x, y = scores_of("normal", torch.bfloat16, 5, 900, 4), torch.tensor([3, -100, 899, 0, 7])
    grad = strided(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
    found = []
    for device, backend in (("cuda", "cuda"), ("cpu", "torch")):
        scores, target = x.to(device).requires_grad_(), y.to(device)
        excess = noised_excess(scores, target, [0, 5, 1], seed=2, backend=backend)
        given = grad if device == "cpu" else Device.there(grad)
        assert given.stride() == grad.stride() and not given.is_contiguous()
        found.append(torch.autograd.grad(excess, scores, given)[0].cpu())
    assert_same(*found)


# The model finds what it is for

BUGS = {  # in the source, and how they show: as an error of the model or as wrong bits
    "no barrier after the collection": (
        "if (found.nan) listed.nan = true;\n  Threads::sync();",
        "if (found.nan) listed.nan = true;",
        None,
    ),
    "hits that an earlier list has are listed again": (
        "at = full ? Progress{at.tile, at.taken + wanted}",
        "at = full ? Progress{at.tile, at.taken}",
        None,
    ),
    "no barrier before the targets' places are read": (
        "if (lane_of() == 0) places[b] = place;\n    }\n    Threads::sync();",
        "if (lane_of() == 0) places[b] = place;\n    }",
        None,
    ),
    "a barrier that some threads miss": (
        "      Threads::sync();\n      const S reach",
        "      if (rank) Threads::sync();\n      const S reach",
        "divergent",
    ),
    "a mask without the caller": (
        "__ballot_sync(kFull, i < k && classes_of(sample)[i] == c)",
        "__ballot_sync(1u, i < k && classes_of(sample)[i] == c)",
        "leaves it out|wrong mask",
    ),
    "an entry too far": ("place >= 0 && place < wanted", "place >= 0 && place <= wanted", None),
    "places after those of the lanes": (
        "before + __popc(lanes & lanes_before())",
        "before + __popc(lanes)",
        None,
    ),
    "the last score of a vector left out": (
        "for (int i = 0; i < W; ++i) {\n    const int bit",
        "for (int i = 0; i + 1 < W; ++i) {\n    const int bit",
        None,
    ),
    "a bound that only the best of the pilot attain": (
        "for (int left = k; left > 0;)",
        "for (int left = 1; left > 0;)",
        None,
    ),
}


def float32_sources(folder, right="", wrong=""):
    """A copy of the sources for float32 only, which compiles in a third of the time; one place in it may be wrong."""
    sources = shutil.copytree(SOURCES, folder / "csrc")
    kernels = sources / "cuda" / "kernels.cu"
    kernels.write_text(re.sub(r"case ScoreType::k(Float64|BFloat16|Float16):.*", "", kernels.read_text()))
    if right:
        (place,) = (path for path in sources.rglob("*") if path.is_file() and right in path.read_text())
        text = place.read_text()
        assert text.count(right) == 1
        place.write_text(text.replace(right, wrong))
    return sources


def outcomes(path):
    """Whether a library has the reference's bits, in several orders of threads, or an error's text."""
    labels = Labels(torch.tensor([3, 2499, 7]), -100, True)
    for order in range(6):
        for kind in ("normal", "rising"):
            x = scores_of(kind, torch.float32, 3, 2500, 8)
            x[0, 3] = 9.0  # a target that every list holds
            x[2] = torch.arange(2500.0)  # its first contenders are the least: more words survive than there is room for
            x[2, :5] = 1e6
            try:
                given = Model(path, order).excess(x, noise_of(6, 2), labels)
                wanted = reference.excess(x, noise_of(6, 2), labels)
                yield all(torch.equal(a, b) for a, b in zip(given, wanted))
            except RuntimeError as message:
                yield str(message)


def in_a_child(function):
    """What a function returns in a process of its own, or how that process ended: a bug may write anywhere."""
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)

    def run():
        faulthandler.disable()  # what it would say of a bug that was planted is no news
        sender.send(function())

    child = processes.Process(target=run)
    child.start()
    child.join(100)
    if not receiver.poll():
        child.kill()
        return [f"ended with {child.exitcode}"]
    return receiver.recv()


@pytest.mark.host
@NEEDS_GXX
@pytest.mark.parametrize("bug", [b for b in BUGS if b != "an entry too far"])
def test_planted_bugs_are_found(tmp_path, bug):
    right, wrong, error = BUGS[bug]
    path = compiled(tmp_path / "bug.so", float32_sources(tmp_path, right, wrong), ("-Og", "-Wno-unused", "-Wno-switch"))
    found = in_a_child(lambda: list(outcomes(path)))
    if error:
        assert any(isinstance(f, str) and re.search(error, f) for f in found), found
    else:
        assert not all(f is True for f in found)


@pytest.mark.host
@NEEDS_GXX
def test_without_a_bug_all_is_well(library):
    assert all(f is True for f in outcomes(library))


def sanitized(tmp_path, sources, select):
    """A run of this file's tests on a library with sanitizers, in a process that has their run time."""
    flags = (
        "-Og",  # compiles in a third of -O1's time
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-Wno-unused",
        "-Wno-switch",
        "-Wno-clobbered",
    )
    path = compiled(tmp_path / "sanitized.so", sources, flags)
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        SANITIZED: str(path),
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "CUDA_VISIBLE_DEVICES": "",  # CUDA does not start under AddressSanitizer, which takes the addresses it wants
    }
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", str(__file__), "-k", select]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.host
@NEEDS_GXX
@pytest.mark.skipif(SANITIZED in os.environ, reason="this is the process with the sanitizers")
def test_under_sanitizers(tmp_path):
    """Of the normal law; the functions of both, by which they differ, are under sanitizers in test_compilers.py."""
    select = "order0 and float32 and not float32-1 or every_order and order1 or list_holds"
    done = sanitized(tmp_path, float32_sources(tmp_path), select)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.host
@NEEDS_GXX
@pytest.mark.skipif(SANITIZED in os.environ, reason="this is the process with the sanitizers")
def test_sanitizers_see_an_entry_too_far(tmp_path):
    right, wrong, _ = BUGS["an entry too far"]
    done = sanitized(tmp_path, float32_sources(tmp_path, right, wrong), "list_holds")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr + done.stdout


@pytest.mark.host
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc: nothing is compiled for a GPU")
@pytest.mark.skipif("triton" not in available_backends("cuda"), reason="NVIDIA's disassembler comes with Triton")
@pytest.mark.skipif(SANITIZED in os.environ, reason="this is the process with the sanitizers")
def test_compiled_for_gpus_within_the_budget():
    """No spills, 64 registers or 72 for float64, 16-byte loads and stores, and in PTX no fused or approximate step."""
    command = [sys.executable, "-m", "benchmarks.cuda_static", "--quick"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    # Architectures; dtypes, kernels: searches by law and team, and three others; less the searches of large teams in
    # float64, of which there are none; and the link's two types.
    assert len(facts) == len({row["target"] for row in facts}) * (4 * (2 * 3 + 3) - 2 + 2)
    assert {row["target"] for row in facts} >= {"sm_75", "sm_80", "sm_90"}
    for row in facts:
        most = 72 if "double" in row["kernel"] else 64
        assert row["registers"] <= most and row["spill_loads_and_stores"] == 0 and row["stack_bytes"] == 0, row
        # The link's softplus has CUDA's exp and log1p.
        assert row["forbidden"] == [] or row["kernel"].startswith("link"), row
        wide = {"search_kernel": 6, "cut_kernel": 1, "collect_kernel": 4, "gradient_kernel": 0, "link_kernel": 0}
        assert row["loads_of_16_bytes"] >= wide[row["kernel"].split()[0]], row
        assert row["stores_of_16_bytes"] >= (row["kernel"].startswith("gradient")), row
