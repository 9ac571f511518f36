"""Contract under test: launches keep a device's limits and memory stays small, where no host can hold the data."""

import ctypes

import pytest
import torch

from testing import LARGE_SEARCHES
from topk_fast import noise, ops


@pytest.fixture
def only_launched(monkeypatch):
    monkeypatch.setenv("STANDIN_EXECUTE", "0")
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


SEARCHES = {  # rows, classes, dtype, k, samples
    "many rows": (2**20, 1000, torch.float32, 6, 5),
    "many short rows": (2**24, 3, torch.bfloat16, 2, 5),
    "the longest row": (1, 2**31 - 1, torch.float32, 6, 5),
    "a long row of doubles": (1, 2**30, torch.float64, 6, 5),
    "more than 2**32 scores": (2**13 + 1, 2**19, torch.bfloat16, 6, 5),
    "k beyond a block": (4, 100_000, torch.float32, 1025, 5),
    "k as large as the row": (2, 5001, torch.float64, 5001, 3),
    "a thousand samples": (64, 100_000, torch.float32, 6, 1000),
    "all at once": (300, 70_001, torch.float64, 1025, 1000),
}


@pytest.mark.parametrize("sampler", ["thinned", "dense"])
@pytest.mark.parametrize("law", [noise.NORMAL, noise.GUMBEL], ids=["normal", "gumbel"])
@pytest.mark.parametrize("shape", SEARCHES)
def test_extreme_searches_keep_the_limits_of_a_launch(only_launched, calls, noise_on, shape, law, sampler):
    n_rows, n_classes, dtype, k, n_sample = SEARCHES[shape]
    x = torch.empty(n_rows, n_classes, dtype=dtype, device="cuda")
    y = torch.empty(n_rows, dtype=torch.int64, device="cuda")
    wanted = noise_on("cuda", k, n_sample=n_sample, law=law, dense=sampler == "dense")
    calls.take()
    ops.kernel("excess", "cuda")(x, *wanted, y, -100, False)
    launches = calls.launches()
    assert launches and all(call["ours"] and call["error"] == 0 for call in launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_rows, n_classes", [(2**20, 1000), (1, 2**31 - 1), (2**22, 1025), (2**26, 65)])
def test_extreme_gradients_keep_the_limits_of_a_launch(only_launched, calls, n_rows, n_classes, dtype):
    classes = torch.empty(n_rows, 5, 1, dtype=torch.int64, device="cuda")
    grad = torch.empty(n_rows, 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="cuda")
    calls.take()
    out = ops.kernel("gradient", "cuda")(grad, classes, classes[:, 0, 0].contiguous(), -100, 0, n_classes, dtype)
    assert out.shape == (n_rows, n_classes)
    (launch,) = [call for call in calls.launches() if call["ours"]]
    assert launch["error"] == 0


@pytest.mark.parametrize("n_rows, n_classes, dtype, k, n_sample", LARGE_SEARCHES)
def test_a_search_allocates_little_beside_the_scores(only_launched, noise_on, n_rows, n_classes, dtype, k, n_sample):
    """The shapes of test_cuda.py's test of the workspace, now by torch's own count, results included."""
    x = torch.empty(n_rows, n_classes, dtype=dtype, device="cuda")
    wanted = noise_on("cuda", k, n_sample=n_sample)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.kernel("excess", "cuda")(x, *wanted, None, -100, False)
    extra = torch.cuda.max_memory_allocated() - before
    assert 0 < extra <= x.nbytes / 50


def test_no_memory_left_is_said(only_launched, noise_on):
    x = torch.empty(2**30, 2, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match=r"a tensor of shape \[1073741824, 33, 2\] cannot be .*out of memory"):
        ops.kernel("candidates", "cuda")(x, *noise_on("cuda", 2, n_sample=33), 0, 0)


class Size(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


@pytest.mark.parametrize(
    "grid, block, shared, error",
    [
        ((2**31 - 1, 1, 1), (1024, 1, 1), 48 << 10, 0),
        ((2**31, 1, 1), (32, 1, 1), 0, 9),
        ((1, 65_536, 1), (32, 1, 1), 0, 9),
        ((1, 1, 65_536), (32, 1, 1), 0, 9),
        ((0, 1, 1), (32, 1, 1), 0, 9),
        ((1, 1, 1), (1025, 1, 1), 0, 9),
        ((1, 1, 1), (32, 33, 1), 0, 9),
        ((1, 1, 1), (32, 1, 1), (48 << 10) + 1, 1),
    ],
)
def test_the_stand_in_has_the_limits_of_a_device(grid, block, shared, error):
    """cudaErrorInvalidConfiguration is 9, cudaErrorInvalidValue 1; more shared memory has to be asked for."""
    runtime, stub = ctypes.CDLL(None), ctypes.create_string_buffer(1)
    name = ctypes.create_string_buffer(b"nobody_kernel")
    runtime.__getattr__("__cudaRegisterFunction")(None, stub, None, name, -1, None, None, None, None, None)

    def launch(bytes):
        code = runtime.cudaLaunchKernel(stub, Size(*grid), Size(*block), None, ctypes.c_size_t(bytes), None)
        assert runtime.cudaGetLastError() == code
        return code

    assert launch(shared) == error
    assert runtime.cudaFuncSetAttribute(stub, 8, (227 << 10) + 1) == 1 == runtime.cudaGetLastError()
    assert runtime.cudaFuncSetAttribute(stub, 8, 227 << 10) == 0
    assert launch(227 << 10) == (9 if error == 9 else 0) and launch((227 << 10) + 1) == max(error, 1)
