"""Contract under test: the model of the kernels' time counts what machine code does, no more and no less.

A kernel with known counts is compiled and run, with loops, divergent branches and inlined functions; its results and
correctly rounded quotients are compared too. Then the model runs csrc/cuda as it stands.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from testing import ROOT

pytest.importorskip("triton", reason="NVIDIA's disassembler comes with Triton, which is not installed")
from benchmarks.model import launches, sass
from benchmarks.model.cases import Case, shapes
from benchmarks.model.gpus import GPUS, KIB, blocks_at_once

NEEDS_COMPILERS = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("g++") is None, reason="the model runs nvcc's code by a g++ program"
)
pytestmark = pytest.mark.host
SOURCE = Path(__file__).with_name("counted.cu")
THREADS, TRIPS = 64, 11


def test_control_bits():
    """Of `LDG.E.64 R4, desc[UR36][R4.64]` and of the instruction that takes its result, in a kernel for sm_90."""
    load, use = 0x000EA4000C1E1B00, 0x004FC8000BF25070
    assert sass.control_of(load) == (2, 2, sass.NONE, 0)
    assert sass.control_of(use) == (4, sass.NONE, sass.NONE, 1 << 2)


def test_blocks_at_once():
    h100 = GPUS["H100"]
    assert blocks_at_once(h100, registers=128, shared=1024, size=128) == 4  # by registers
    assert blocks_at_once(h100, registers=32, shared=57 << 10, size=128) == 4  # by shared memory
    assert blocks_at_once(h100, registers=16, shared=1024, size=1024) == 2  # by warps
    assert blocks_at_once(h100, registers=16, shared=1024, size=32) == 32  # by blocks


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    return launches.Calls(launches.launchers(tmp_path_factory.mktemp("launchers")))


T4 = GPUS["L4"]._replace(processors=40, shared_bytes=64 * KIB)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the launchers are compiled by g++")
@pytest.mark.parametrize("gpu", [*GPUS.values(), T4], ids=[*GPUS, "T4"])
@pytest.mark.parametrize(
    "n_classes, dtype, k, n_sample", [(709, "float32", 6, 5), (887, "float32", 32, 5), (9000, "float64", 6, 9)]
)
def test_all_blocks_of_a_search_run_at_a_time(calls, gpu, n_classes, dtype, k, n_sample):
    """Each takes many rows, so that blocks that had to wait would come when most are done."""
    (shape,) = shapes(Case(4000, n_classes, dtype, "normal", n_sample, k), 4000, calls, gpu, gpu.processors)
    registers = 72 if dtype == "float64" else 64
    at_once = gpu.processors * blocks_at_once(gpu, registers, shape.shared + KIB, shape.size)
    assert at_once / 2 < shape.grid <= at_once


class Args(ctypes.Structure):
    _fields_ = [("input", ctypes.c_void_p), ("out", ctypes.c_void_p), ("n", ctypes.c_int)]


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    return launches.interpreter(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=GPUS)
def device(request, interpreter, tmp_path_factory):
    gpu = GPUS[request.param]
    return launches.Device(interpreter, gpu, sass.compiled(gpu.target, tmp_path_factory.mktemp("model"), SOURCE))


CACHE = 1 << 20


def run(device, kernel, given, n, n_out, grid, size, others=()):
    """A launch, or the last of several, between which ``others`` bring so many bytes into L2."""
    out = launches.aligned(torch.full((n_out,), -1.0))
    name = f"{kernel}(Args)"
    argument = bytes(Args(given.data_ptr(), out.data_ptr(), n))
    cache = device.lib.model_cache(CACHE)
    for before in (0, *others):
        device.lib.model_start_launch(cache, before, 0)
        ran = device.run(launches.Shape(name, grid, size, 0), argument, cache, 1 << 15)
    device.lib.model_cache_free(cache)
    return out, ran, device.kernels[name].lines


@NEEDS_COMPILERS
def test_known_counts(device):
    given = launches.aligned(torch.arange(THREADS * 8) + 1.0)
    out, ran, lines = run(device, "counted", given, TRIPS, 192, grid=2, size=THREADS)
    places = {text.split("// ")[-1]: i for i, text in enumerate(SOURCE.read_text().splitlines(), 1) if "//" in text}

    def total(what, name, place):
        """Sums over the instructions of a name whose outermost source line ends in ``place``."""
        column = launches.FIELDS.index(what)
        chosen = [
            i for i, line in enumerate(lines) if line.name == name and line.chain[-1] == (SOURCE.name, places[place])
        ]
        assert chosen
        return ran.counts[chosen, column].sum()

    warps, own_trips = 2 * THREADS // 32, [lane % 7 for lane in range(32)]
    assert total("issued", "SHFL", "loop") == warps * TRIPS
    assert total("issued", "SHFL", "unrolled") == warps * 5
    assert total("issued", "SHFL", "first") == total("issued", "SHFL", "second") == warps
    assert total("issued", "STG", "lanes' own loop") == warps * max(own_trips)
    assert total("lanes", "STG", "lanes' own loop") == warps * sum(own_trips)
    assert (total("issued", "STG", "taken"), total("lanes", "STG", "taken")) == (warps, warps * 8)
    assert (total("issued", "STG", "not taken"), total("lanes", "STG", "not taken")) == (warps, warps * 24)
    assert total("issued", "BAR", "barrier") == warps
    # Each lane reads a sector of its own, four to a line of 128 bytes; the second block finds them in L2.
    assert total("read", "LDG", "strided load") == warps * 32
    assert total("wavefronts", "LDG", "strided load") == warps * 8
    assert total("from_memory", "LDG", "strided load") == total("from_l2", "LDG", "strided load") == warps / 2 * 32
    assert total("wavefronts", "STS", "shared store") == warps * 2  # two lanes a bank
    assert total("written", "STG", "second") == warps * 4
    assert ran.cycles.min() > ran.counts[:, launches.FIELDS.index("stalled")].sum() / warps  # and waits

    x = given[::8].view(2, 32)
    for _ in range(TRIPS):
        x = x.view(2, 16, 2).flip(2).reshape(2, 32) + 1
    x = x.sum(1, keepdim=True).expand(2, 32)
    lane = torch.arange(32)
    taken = torch.where(lane < 8, x.flip(0), x / given[1])
    assert out[:64].equal(taken.flatten())
    assert out[64:128].equal(torch.tensor([t - 1.0 for t in own_trips] * 2))
    assert out[128:].equal((x + 1).flatten())


@NEEDS_COMPILERS
@pytest.mark.parametrize("others, stays", [([CACHE], True), ([CACHE // 2, CACHE // 2 + 1], True), ([CACHE + 1], False)])
def test_what_was_used_last_stays_in_l2(device, others, stays):
    given = launches.aligned(torch.arange(THREADS * 8) + 1.0)
    _, ran, _ = run(device, "counted", given, TRIPS, 192, grid=2, size=THREADS, others=others)
    from_memory = ran.counts[:, launches.FIELDS.index("from_memory")].sum()
    assert from_memory == 0 if stays else from_memory >= THREADS


@NEEDS_COMPILERS
def test_quotients_and_roots_are_correctly_rounded(device):
    """Of all magnitudes, with zeros, infinities and subnormal numbers."""
    n = 4096
    given = torch.randint(0, 2**31, (2 * n,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    given = given.view(torch.float32).nan_to_num(1.5)
    given[:8] = torch.tensor([0.0, 1.0, 1e-40, float("inf"), 1.0, 3.0, 1e-45, 2.0])
    out, ran, lines = run(device, "divided", given, n, 2 * n, grid=n // 128, size=128)
    a, b = given.double()[:n], given.double()[n:]
    # Rounding a quotient or a root of float32 numbers to float64 first changes only subnormal quotients.
    wanted = torch.where((a / b).abs() < 2.0**-126, given[:n] / given[n:], (a / b).float())
    assert out[:n].equal(wanted) and out[n:].equal(a.sqrt().float())
    slow = [i for i, line in enumerate(lines) if "slowpath" in line.chain[-1][0]]
    assert slow and ran.counts[slow, launches.FIELDS.index("issued")].any()


@NEEDS_COMPILERS
def test_packed_halves(device):
    n = 1024
    given = torch.randint(-(2**31), 2**31, (2 * n,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    out, _, _ = run(device, "packed", given.view(torch.float32), n, 3 * n, grid=n // 128, size=128)
    mask, half, bfloat16 = (out[i * n : (i + 1) * n] for i in range(3))
    x, y = given.view(torch.float16).view(2, -1)
    assert (x.isnan() | y.isnan()).any()
    assert mask.view(torch.int16).equal(-(~(x <= y)).short())
    for given_bits, dtype in ((half, torch.float16), (bfloat16, torch.bfloat16)):
        x, y = given.view(dtype).view(2, -1).float()
        assert given_bits.view(dtype).float().allclose(x.fmax(y), rtol=0, atol=0, equal_nan=True)


@NEEDS_COMPILERS
def test_the_kernels_as_they_stand():
    """nvcc's code gives the CPU kernels' bits here, and reads each score at least once."""
    command = [sys.executable, "-m", "benchmarks.model", "--quick"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert result["bits_equal"] and result["same_layout"]
    largest = sum(max(launch["microseconds"].values()) for launch in result["launches"])
    assert result["estimate_us"] > largest > result["byte_floor_us"]
    row = 4 * result["n_classes"] / 32
    assert row <= sum(stage["from_memory"] for stage in result["stages"]) < 1.5 * row
