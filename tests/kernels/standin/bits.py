"""Contract under test: the public functions on CUDA tensors, through the binding, nvcc's launchers and their argument
structures, have the bits of "cpp" on CPU tensors. The project's kernels run in simt.h's model, torch's on the CPU.
"""

import pytest
import torch

from testing import assert_same, randn, scores_of
from topk_fast import functional as F
from topk_fast import ops

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


def target_of(n_rows, n_classes):
    """True classes; every third row is ignored."""
    y = torch.arange(n_rows) * 7 % n_classes
    y[1::3] = -100
    return y


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


def close(given, expected, note=""):
    torch.testing.assert_close(given, expected, equal_nan=True, msg=lambda text: f"{note}: {text}")


def check(host_kernels, run, scores, others=(), upstream=torch.ones_like, note="", same=assert_same):
    """Both devices' results are the same, except for the order of a sum over rows."""
    on_cpu = results(host_kernels, run, scores, others, upstream, "cpu")
    on_device = results(host_kernels, run, scores, others, upstream, "cuda")
    assert all(x.is_cuda for x in on_device)
    for given, expected in zip(on_device, on_cpu):
        (same if expected.dim() else close)(given.cpu(), expected, note)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses(host_kernels, shape, dtype):
    n_rows, n_classes, k, n_sample = SHAPES[shape]
    x = scores_of("normal", dtype, n_rows, n_classes, 1)
    y = target_of(n_rows, n_classes)

    def run(x, y, backend):
        return F.bal_noised_topk_loss(x, y, k, 0.7, n_sample, seed=3, backend=backend)

    check(host_kernels, run, x, (y,))


LOSSES = {  # of scores x, targets y, a positive number for each class v, and the options all share
    "smoothed ranks": lambda x, y, v, **o: F.noised_topk(x, [1, 5, 2], 0.5, **o),
    "one smoothed rank": lambda x, y, v, **o: F.noised_topk(x, 3, 0.5, **o),
    "dense": lambda x, y, v, **o: F.noised_topk(x, 3, 0.5, sampler="dense", **o),
    "excesses": lambda x, y, v, **o: F.noised_excess(x, y, [0, 5, 1], noise="gumbel", **o),
    "excesses over others": lambda x, y, v, **o: F.noised_excess(x, y, [1, 5], exclude_target=True, **o),
    "softplus of others": lambda x, y, v, **o: F.noised_topk_loss(
        x, y, (1, 5), link="softplus", temperature=0.5, exclude_target=True, margin=0.0, reduction="none", **o
    ),
    "weights": lambda x, y, v, **o: F.noised_topk_loss(
        x, y, (1, 5), weight=v, offset=v.log(), rank_weights=(0.3, 2.0), reduction="sum", **o
    ),
    "identity": lambda x, y, v, **o: F.noised_topk_loss(x, y, 2, link="identity", reduction="sum", **o),
    "balanced": lambda x, y, v, **o: F.bal_noised_topk_loss(x, y, 5, 0.7, **o),
    "imbalanced": lambda x, y, v, **o: F.imbal_noised_topk_loss(x, y, 5, v, 0.1, reduction="none", **o),
    "sampled cross-entropy": lambda x, y, v, **o: F.sampled_cross_entropy(x, y, **o),
    "a schedule": lambda x, y, v, **o: F.bal_noised_topk_loss(x, y, 5, v[3].double(), **o),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_family(host_kernels, loss, dtype):
    for n_classes in (90, 2500):
        x, v = scores_of("normal", dtype, 4, n_classes, 2), torch.linspace(0.1, 2.0, n_classes)

        def run(x, y, v, backend):
            return LOSSES[loss](x, y, v, seed=2**63 + 5, backend=backend)

        same = close if loss.startswith("softplus") else assert_same  # exp and log1p are not exactly rounded
        check(host_kernels, run, x, (target_of(4, n_classes), v), UPSTREAMS["expanded"], f"{n_classes} classes", same)


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "an odd offset": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "transposed": lambda x: x.t().contiguous().t(),
    "every second class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}
UPSTREAMS = {
    "packed": lambda out: randn(*out.shape).to(out.dtype),
    "expanded": lambda out: torch.tensor(-0.75, dtype=out.dtype).expand(out.shape),
    "expanded rows": lambda out: randn(1, out.shape[1]).to(out.dtype).expand(out.shape),
    "transposed": lambda out: randn(*out.shape[::-1]).to(out.dtype).t(),
    "every second row": lambda out: randn(2 * len(out), out.shape[1]).to(out.dtype)[::2],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_scores_and_of_the_gradient_that_comes(host_kernels, layout, upstream, dtype):
    x, y = LAYOUTS[layout](scores_of("normal", dtype, 3, 777, 5)), target_of(6, 777)[::2]

    def run(x, y, backend):
        return F.noised_excess(x, y, [0, 5], seed=4, backend=backend)

    check(host_kernels, run, x, (y,), UPSTREAMS[upstream])


def test_classes_along_the_second_of_three_dimensions(host_kernels):
    x, y = scores_of("normal", torch.float32, 6, 400, 6).view(2, 3, 400).movedim(-1, 1), target_of(6, 400).view(2, 3)

    def run(x, y, backend):
        return F.noised_topk_loss(x, y, (1, 5), reduction="none", seed=4, backend=backend)

    check(host_kernels, run, x, (y,), lambda out: randn(3, 2).t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lists_of_a_slice(host_kernels, dtype):
    x = scores_of("ties", dtype, 4, 900, 7)
    for options in ({}, {"sampler": "dense"}, {"noise": "gumbel"}):

        def run(x, backend, options=options):
            place = {"first_row": 2**31, "first_class": 1000}
            return F.noised_topk_candidates(x, 7, 0.5, 4, seed=-3, backend=backend, **place, **options)

        check(host_kernels, run, x, upstream=None, note=str(options))


def test_second_derivatives(host_kernels):
    x, y = scores_of("normal", torch.float64, 3, 60, 8), target_of(3, 60)

    def run(x, y, backend):
        loss = F.noised_topk_loss(x, y, (1, 5), link="softplus", seed=4, backend=backend)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + (slope * slope).sum()

    check(host_kernels, run, x, (y,), same=close)


@pytest.mark.parametrize("strided", ["grad", "classes", "target"])
def test_the_ops_arguments_may_have_any_strides(host_kernels, strided):
    """What the binding copies, and the kernel then reads."""
    grad, classes, y = randn(4, 3), torch.randint(-1, 50, (4, 5, 3)), target_of(4, 50)
    if strided == "grad":
        grad = grad.t().contiguous().t()
    elif strided == "classes":
        classes = classes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    else:
        y = y.repeat_interleave(2)[::2]
    expected = ops.kernel("gradient", "torch")(grad, classes, y, -100, 0, 50, torch.float32)
    arguments = [to_device(x, "cuda") for x in (grad, classes, y)]
    with host_kernels():
        given = ops.kernel("gradient", "cuda")(*arguments, -100, 0, 50, torch.float32)
    assert_same(given.cpu(), expected)
