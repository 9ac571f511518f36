"""Contract under test: a head that was saved on some ranks, and its optimizer, go on training on any other number.

Training goes on with the dense sampler, whose losses have the same bits for any number of ranks but for the matmul's.
"""

import datetime
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from topk_fast import LinearHead, NoisedTopKLoss

L, D = 11, 4


pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo"
)


class Training:
    """A head, its optimizer, and steps on one batch."""

    def __init__(self, sparse, first_weights, group):
        torch.manual_seed(first_weights)
        criterion = NoisedTopKLoss(2, weight=torch.linspace(1, 2, L), seed=0, sampler="dense")
        self.head = LinearHead(D, L, criterion, sparse_grad=sparse, process_group=group)
        make = torch.optim.SparseAdam if sparse else torch.optim.Adam
        self.optimizer = make(self.head.parameters(), lr=0.1)
        self.head.register_optimizer(self.optimizer)

    def step(self):
        x = torch.randn(6, D, generator=torch.Generator().manual_seed(1))
        self.optimizer.zero_grad()
        loss = self.head(x, torch.arange(6))
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def state(self):
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}


def save(group, folder, sparse):
    training = Training(sparse, 0, group)
    for _ in range(3):  # so that a lost number of steps would show
        training.step()
    dcp.save(training.state(), checkpoint_id=folder)
    return [training.step(), training.step()]


def load(group, folder, sparse):
    training = Training(sparse, 5, group)
    training.step()  # makes the optimizer's state
    state = training.state()
    dcp.load(state, checkpoint_id=folder)
    training.head.load_state_dict(state["head"])
    training.optimizer.load_state_dict(state["optimizer"])
    losses = [training.step(), training.step()]
    dcp.save(training.state(), checkpoint_id=f"{folder}_again_{0 if group is None else group.size()}")
    return losses


def load_full(group, state, sparse):
    training = Training(sparse, 5, group)
    training.head.load_state_dict(state)
    whole = training.head.state_dict()
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in whole.items()}


def serve(rank, world, store, out, run, args):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    method, limit = f"file://{store}", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=limit)
    torch.save(run(dist.group.WORLD if world > 1 else None, *args), out)
    dist.barrier()
    os._exit(0)  # without Python's tear-down, with which gloo's threads may race


@pytest.fixture
def on_ranks(tmp_path):
    """Runs a function on some ranks; what each returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "topk_fast"])

    def run(world, function, *args):
        outs = [tmp_path / f"{function.__name__}{world}_{rank}.pt" for rank in range(world)]
        store = tmp_path / f"{function.__name__}{world}"
        ranks = [
            context.Process(target=serve, args=(rank, world, store, outs[rank], function, args))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
            if process.is_alive():
                process.kill()
        return [torch.load(out) for out in outs]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_three(on_ranks, tmp_path, sparse):
    folder = tmp_path / "checkpoint"
    expected, again = on_ranks(2, save, folder, sparse)
    assert expected == again and expected[0] != expected[1]
    for world in (1, 3):
        for losses in on_ranks(world, load, folder, sparse):
            assert losses == pytest.approx(expected, rel=1e-5)


def refuse(group, n_classes, full):
    """What each rank says to a state of another number of classes."""
    other = LinearHead(D, n_classes, NoisedTopKLoss(2), bias=False, process_group=None if full else group).state_dict()
    try:
        LinearHead(D, L, NoisedTopKLoss(2), bias=False, process_group=group).load_state_dict(other)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("full", [True, False], ids=["full", "sharded"])
@pytest.mark.parametrize("n_classes", [6, 10, 12])  # 6 are the classes of rank 0
def test_all_ranks_refuse_another_number_of_classes(on_ranks, n_classes, full):
    expected = f"size mismatch: a head of [{L}, {D}] over all ranks cannot load [{n_classes}, {D}]"
    assert on_ranks(2, refuse, n_classes, full) == [expected] * 2


def save_adafactor(group):
    head = LinearHead(D, L, NoisedTopKLoss(2), bias=False, process_group=group)
    optimizer = torch.optim.Adafactor(head.parameters())
    head.register_optimizer(optimizer)
    head(torch.ones(2, D), torch.arange(2)).backward()
    optimizer.step()
    try:
        optimizer.state_dict()
    except RuntimeError as error:
        return str(error)


def test_state_that_is_not_of_rows_is_refused(on_ranks):
    for said in on_ranks(2, save_adafactor):
        assert "takes optimizers whose state of a parameter has its shape, got row_var of shape [" in said


def test_full_tensors_load_into_a_sharded_head(on_ranks):
    whole = Training(False, 0, None).head.state_dict()
    for state in on_ranks(2, load_full, whole, False):
        assert {*state} == {*whole} == {"weight", "bias", "criterion.weight"}
        for name, x in whole.items():
            assert torch.equal(state[name], x), name
