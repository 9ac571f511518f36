"""Contract under test: the public functions on CUDA tensors, through the binding, nvcc's launchers and their argument
structures, have the bits of "cpp" on CPU tensors. The project's kernels run in simt.h's model, torch's on the CPU.
"""

import pytest
import torch

from testing import assert_same, scores_of
from topk_fast import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = {  # rows, classes, K, samples
    "one class": (3, 1, 0, 5),
    "no rows": (0, 40, 3, 5),
    "a warp a row": (5, 700, 5, 5),
    "four warps a row": (2, 3000, 5, 33),
    "rows read twice": (1, 20_011, 5, 5),
    "rows that several blocks collect": (1, 140_000, 5, 2),
    "large k": (1, 2500, 200, 3),
}


def to_device(x, device):
    """A tensor with its strides and offset on a device."""
    if not isinstance(x, torch.Tensor) or device == "cpu":
        return x
    size = x.untyped_storage().nbytes() // x.element_size()
    storage = torch.as_strided(x, (size,), (1,), 0).to(device)
    return torch.as_strided(storage, x.shape, x.stride(), x.storage_offset())


def results(host_kernels, run, scores, others, upstream, device):
    """Result and gradient of ``run(scores, *others, backend)`` on a device."""
    scores = to_device(scores, device).requires_grad_(upstream is not None)
    others = [to_device(x, device) for x in others]
    with host_kernels() if device != "cpu" else torch.enable_grad():
        out = run(scores, *others, "cpp" if device == "cpu" else "cuda")
        if upstream is None:
            return out
        given = to_device(upstream(out.detach().cpu()), device)
        return out.detach(), *torch.autograd.grad(out, scores, given)


def check(host_kernels, run, scores, others=(), upstream=torch.ones_like, note=""):
    """Both devices' results are the same."""
    on_cpu = results(host_kernels, run, scores, others, upstream, "cpu")
    on_device = results(host_kernels, run, scores, others, upstream, "cuda")
    assert all(x.is_cuda for x in on_device)
    assert_same(tuple(x.cpu() for x in on_device), on_cpu, note)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses(host_kernels, shape, dtype):
    n_rows, n_classes, k, n_sample = SHAPES[shape]
    x = scores_of("normal", dtype, n_rows, n_classes, 1)
    y = torch.arange(n_rows) % n_classes
    y[1::3] = -100

    def run(x, y, backend):
        return F.bal_noised_topk_loss(x, y, k, 0.7, n_sample, seed=3, backend=backend)

    check(host_kernels, run, x, (y,))
