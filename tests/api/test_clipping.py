"""Contract under test: clipping by norm and optimizers treat a row-sparse gradient as torch treats the dense one.

The tests of optimizers say what docs/choosing.md says: which of them take such a gradient, and what they do with it.
"""

import math

import pytest
import torch
from torch import nn

from testing import INF, NAN, randn
from topk_fast import BalNoisedTopK, LinearHead, clip_grad_norm_

D, L, N, K = 8, 300, 6, 3


def model(sparse, steps=1):
    """A trunk and a head with the gradients of a batch, or of several that are added up."""
    torch.manual_seed(0)
    modules = nn.ModuleList([nn.Linear(5, D), LinearHead(D, L, BalNoisedTopK(K, 0.5, seed=1), sparse_grad=sparse)])
    for step in range(steps):
        modules[1](modules[0](randn(N, 5, seed=step)), torch.arange(N) + step).backward()
    return modules


def dense_gradients(modules):
    return [p.grad.clone().to_dense() for p in modules.parameters()]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("steps", [1, 3], ids=["one batch", "batches added up"])
@pytest.mark.parametrize("norm_type", [1, 2.0, 3.5, INF, "inf"])
@pytest.mark.parametrize("max_norm", [0.01, 1e6, INF], ids=["scales", "leaves as it is", "measures"])
def test_clipping_is_that_of_dense_gradients(max_norm, norm_type, steps, foreach):
    given, expected = model(True, steps), model(False, steps)
    assert sum(p.grad.is_sparse for p in given.parameters()) == 2
    before = dense_gradients(expected)
    norm = clip_grad_norm_(given.parameters(), max_norm, norm_type, foreach=foreach)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(expected.parameters(), max_norm, norm_type))
    torch.testing.assert_close(dense_gradients(given), dense_gradients(expected))
    changed = not torch.equal(before[0], given[0].weight.grad)
    assert changed == (max_norm == 0.01) and norm > 0.01


def test_dense_gradients_are_clipped_as_by_torch():
    given, expected = model(False), model(False)
    assert torch.equal(clip_grad_norm_(given.parameters(), 0.1), nn.utils.clip_grad_norm_(expected.parameters(), 0.1))
    assert all(map(torch.equal, dense_gradients(given), dense_gradients(expected)))


def test_a_row_that_stands_twice_counts_as_its_sum():
    p = nn.Parameter(torch.zeros(4, 1))
    rows, values = torch.tensor([[2, 2, 0]]), torch.tensor([[3.0], [-3.0], [4.0]])
    p.grad = torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=True)
    assert clip_grad_norm_(p, 1.0) == 4.0
    torch.testing.assert_close(p.grad.to_dense(), torch.tensor([[1.0], [0.0], [0.0], [0.0]]))


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_gradients_without_rows_and_parameters_without_gradients(norm_type):
    """A batch without loss has a sparse gradient of no rows, for which torch has no largest value."""
    p, q = nn.Parameter(torch.zeros(4, 1)), nn.Parameter(torch.zeros(2))
    assert clip_grad_norm_([p, q], 1.0, norm_type) == 0
    p.grad = torch.sparse_coo_tensor(torch.zeros(1, 0).long(), torch.zeros(0, 1), p.shape, check_invariants=True)
    assert clip_grad_norm_([p, q], 1.0, norm_type) == 0
    q.grad = torch.tensor([0.0, 5.0])
    assert clip_grad_norm_((t for t in (p, q)), 1.0, norm_type) == 5
    torch.testing.assert_close(q.grad, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("value", [NAN, INF])
def test_norms_that_are_not_finite(value):
    given, expected = model(True), model(False)
    for modules in (given, expected):
        modules[0].bias.grad[0] = value
    before = dense_gradients(given)
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(given.parameters(), 1.0, error_if_nonfinite=True)
    assert all(torch.equal(a[a.isfinite()], b[b.isfinite()]) for a, b in zip(before, dense_gradients(given)))
    clip_grad_norm_(given.parameters(), 1.0)
    nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    # A zero times NaN is NaN: torch makes every entry of a dense gradient NaN, and here the rows that are held.
    held = given[1].weight.grad.coalesce().indices()[0]
    torch.testing.assert_close(given[1].weight.grad.to_dense()[held], expected[1].weight.grad[held], equal_nan=True)


@pytest.mark.parametrize("norm_type", [0, -1.0, -INF, NAN])
def test_norms_that_a_sparse_gradient_does_not_have(norm_type):
    with pytest.raises(ValueError, match="norm_type must be > 0 where a gradient is sparse, got"):
        clip_grad_norm_(model(True).parameters(), 1.0, norm_type)


def test_plain_gradients_beside_dtensors(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        sharded.grad = distribute_tensor(torch.tensor([0.0, 0.0, 3.0, 4.0]), mesh, [Shard(0)])
        with pytest.raises(ValueError, match="some gradients are DTensors and others are not: clip each kind"):
            clip_grad_norm_([sharded, *model(True).parameters()], 1.0)
        assert clip_grad_norm_(sharded, 1.0).full_tensor() == 5
        torch.testing.assert_close(sharded.grad.full_tensor(), torch.tensor([0.0, 0.0, 0.6, 0.8]))
    finally:
        dist.destroy_process_group()


# Optimizers


def stepped(make, sparse, rows):
    """The weight after a step for each of ``rows``, which name the rows of that step's gradient."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 2))
    before, optimizer = p.detach().clone(), make([p])
    for step, held in enumerate(rows):
        index = torch.tensor([held])
        p.grad = torch.sparse_coo_tensor(index, randn(len(held), 2, seed=step), p.shape, check_invariants=True)
        p.grad = p.grad.coalesce() if sparse else p.grad.to_dense()
        optimizer.step()
    return p.detach(), (p != before).any(1).nonzero()[:, 0].tolist()


SAME_AS_DENSE = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD with Nesterov's momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01),
}


@pytest.mark.parametrize("name", SAME_AS_DENSE)
def test_optimizers_that_step_as_with_the_dense_gradient(name):
    rows = [[0, 3], [3, 5], [0]]
    given, touched = stepped(SAME_AS_DENSE[name], True, rows)
    torch.testing.assert_close(given, stepped(SAME_AS_DENSE[name], False, rows)[0])
    assert touched == [0, 3, 5]


def test_momentum_of_sgd_moves_a_row_in_every_later_step():
    once, twice = (stepped(SAME_AS_DENSE["SGD with momentum"], True, rows)[0] for rows in ([[0]], [[0], [3]]))
    assert (once[0] != twice[0]).all()


def test_sparse_adam_leaves_rows_without_an_entry_where_adam_moves_them():
    once, twice = (stepped(lambda p: torch.optim.SparseAdam(p, lr=0.1), True, rows)[0] for rows in ([[0]], [[0], [3]]))
    assert torch.equal(once[0], twice[0])
    once, twice = (stepped(lambda p: torch.optim.Adam(p, lr=0.1), False, rows)[0] for rows in ([[0]], [[0], [3]]))
    assert (once[0] != twice[0]).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SparseAdam(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
    ],
    ids=["SGD with decay", "Adagrad with decay", "SparseAdam with decay", "AdamW", "RMSprop"],
)
def test_optimizers_that_refuse_a_sparse_gradient(make):
    with pytest.raises((RuntimeError, TypeError)):
        stepped(make, True, [[0]])


def test_decay_by_hand_is_that_of_adamw_for_all_rows():
    """The two lines of docs/choosing.md."""
    lr, decay = 0.1, 0.01
    p, q = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    p.grad, q.grad = torch.zeros(3, 2).to_sparse(1), torch.zeros(3, 2)
    with torch.no_grad():
        p.mul_(1 - lr * decay)
    torch.optim.SparseAdam([p], lr=lr).step()
    torch.optim.AdamW([q], lr=lr, weight_decay=decay).step()
    torch.testing.assert_close(p, q)
    assert math.isclose(p[0, 0].item(), 1 - lr * decay, rel_tol=1e-6)
