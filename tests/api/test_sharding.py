"""Contract under test: classes sharded over ranks give the loss and the gradients of one process with all classes.

Processes are started once for each number of ranks and run every case; the tests compare what came out with one process
here. Bit for bit with the dense sampler; in distribution with the thinned one.
"""

import copy
import datetime
import functools
import math
import multiprocessing
import os
import re
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import stats
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

from testing import BACKENDS
from topk_fast import (
    BalNoisedTopK,
    ImbalNoisedTopK,
    LinearHead,
    clip_grad_norm_,
    sharding,
)
from topk_fast.functional import (
    bal_noised_topk_loss,
    imbal_noised_topk_loss,
    linear_noised_topk_loss,
    linear_topk,
    noised_topk_loss,
    sampled_cross_entropy,
)

pytestmark = [
    pytest.mark.slow,  # its processes take twenty seconds to start
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo"
    ),
]
N, L, D, K = 9, 60, 8, 4
WORLDS = (1, 2, 4)
SIZES = {  # how the L classes lie on 4 ranks; fewer ranks take neighbours together
    "even": (15, 15, 15, 15),
    "ragged": (1, 40, 12, 7),
    "empty and single": (0, 1, 59, 0),
    "all on the last": (0, 0, 0, 60),
}
MARGINS = torch.linspace(0.1, 0.6, L)


def sizes_of(name, world):
    step = 4 // world
    return [sum(SIZES[name][i : i + step]) for i in range(0, 4, step)]


def part_of(sizes, rank):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def batch(dtype=torch.float32):
    target = torch.tensor([0, 59, 15, -100, 1, 2, 30, 58, 14])  # on every rank, and ignored
    return randn(N, L, dtype=dtype), target


def layer(dtype=torch.float32):
    return randn(N, D, seed=1, dtype=dtype), randn(L, D, seed=2, dtype=dtype), randn(L, seed=3, dtype=dtype)


LOSSES = {
    "balanced": lambda x, y, **more: bal_noised_topk_loss(x, y, K, 0.5, **more),
    "imbalanced": lambda x, y, **more: imbal_noised_topk_loss(x, y, K, MARGINS, 0.5, 7.0, **more),
}
OFFSET, WEIGHT = torch.linspace(-2.0, 1.0, L).round(), torch.linspace(0.5, 2.0, L)
FAMILY = dict(link="softplus", margin=MARGINS, rank_weights=(1.0, 0.5), offset=OFFSET, weight=WEIGHT)
LOSSES_OF_CLASSES = {
    "family": lambda x, y, **more: noised_topk_loss(x, y, (1, K), 0.5, **FAMILY, **more),
    "family without the target": lambda x, y, **more: noised_topk_loss(x, y, (1, K), exclude_target=True, **more),
    "sampled": lambda x, y, **more: sampled_cross_entropy(x, y, 6, offset=OFFSET, weight=WEIGHT, **more),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What the ranks run. A case gets (rank, world) and returns what is to be compared.


def scores_case(rank, world, sizes, name, dtype, reduction, backend, sampler="dense", change=None):
    scores, target = batch(DTYPES[dtype])
    if change:
        scores, target = change(scores, target)
    own = slice(None) if world == 0 else part_of(sizes_of(sizes, world), rank)
    x = scores[:, own].clone().requires_grad_()
    group = None if world == 0 else dist.group.WORLD
    loss = (LOSSES | LOSSES_OF_CLASSES)[name](
        x, target, seed=5, reduction=reduction, sampler=sampler, backend=backend, process_group=group
    )
    loss.sum().backward()
    return loss.detach(), x.grad


def linear_case(
    rank, world, sizes, dtype="float32", bias=True, normalize=False, sparse=False, chunk=None, margins=None, **criterion
):
    x, weight, b = layer(DTYPES[dtype])
    own = slice(None) if world == 0 else part_of(sizes_of(sizes, world), rank)
    x.requires_grad_()
    weight, b = weight[own].clone().requires_grad_(), b[own].clone().requires_grad_()
    loss = linear_noised_topk_loss(
        x,
        weight,
        batch()[1],
        epsilon=0.5,
        linear_bias=b if bias else None,
        **(dict(k=K, margin=1.0 if margins is None else margins, scale=3.0) | criterion),
        normalize=normalize,
        sparse_grad=sparse,
        chunk_size=chunk,
        seed=5,
        sampler="dense",
        reduction="none",
        process_group=None if world == 0 else dist.group.WORLD,
    )
    loss.sum().backward()
    grads = [g.to_dense() if sparse else g for g in (weight.grad, b.grad if bias else torch.zeros(()))]
    return loss.detach(), x.grad, *grads


def with_nan_and_masks(scores, target):
    scores[0, 20], scores[2, :50], scores[4] = float("nan"), -float("inf"), 1.0
    return scores, target


def with_all_ignored(scores, target):
    return scores, torch.full_like(target, -100)


def with_more_dimensions(scores, target):
    return scores.view(3, 3, L).transpose(1, 2), target.view(3, 3)


def linear_family_case(rank, world, sizes, sparse):
    return linear_case(rank, world, sizes, sparse=sparse, k=(1, K), **FAMILY)


def dtensor_case(rank, world, sizes, kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    scores, target = batch()
    x, weight, b = layer()
    if world == 0:
        leaves = [t.requires_grad_() for t in ([scores] if kind.endswith("scores") else [x, weight, b])]
    else:
        shape, placements = ((2, 2), (Replicate(), Shard(0))) if kind == "2d mesh" else ((world,), (Shard(0),))
        mesh = init_device_mesh("cpu", shape)
        if kind.endswith("scores"):
            placement = Replicate() if kind.startswith("replicated") else Shard(1)
            leaves = [distribute_tensor(scores, mesh, [placement]).requires_grad_()]
            target = distribute_tensor(target, mesh, [Replicate()])
        else:
            leaves = [x, *(distribute_tensor(t, mesh, placements) for t in (weight, b))]
            leaves = [t.requires_grad_() for t in leaves]
    common = dict(seed=5, sampler="dense")
    if kind == "family of scores":
        loss = LOSSES_OF_CLASSES["family"](leaves[0], target, **common)
    elif kind.endswith("scores"):
        loss = bal_noised_topk_loss(leaves[0], target, K, 0.5, **common)
    elif kind == "linear family":
        more = dict(linear_bias=leaves[2], **FAMILY, **common)
        loss = linear_noised_topk_loss(leaves[0], leaves[1], target, (1, K), 0.5, **more)
    else:
        loss = linear_noised_topk_loss(leaves[0], leaves[1], target, K, 0.5, linear_bias=leaves[2], **common)
    loss.backward()
    if world == 0:
        return loss.detach(), *(t.grad for t in leaves)
    assert isinstance(loss, DTensor) and all(p.is_replicate() for p in loss.placements)
    for t in leaves:
        assert type(t.grad) is type(t) and getattr(t.grad, "placements", 0) == getattr(t, "placements", 0)
    return loss.full_tensor().detach(), *(t.grad.full_tensor() if isinstance(t, DTensor) else t.grad for t in leaves)


def wrong_dtensor_case(rank, world, sizes):
    """DTensors that are not sharded by class, or come with what they know already: what each says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    scores, target = batch()
    x, weight, _ = layer()
    by_row, by_class = (distribute_tensor(scores, mesh, [Shard(dim)]) for dim in (0, 1))
    weight = distribute_tensor(weight, mesh, [Shard(0)])
    said = []
    for call in (
        lambda: bal_noised_topk_loss(by_row, target, K),
        lambda: bal_noised_topk_loss(by_class, target, K, process_group=dist.group.WORLD),
        lambda: linear_noised_topk_loss(x, weight, target, k=K, epsilon=0.5, sparse_grad=True),
    ):
        try:
            call()
        except ValueError as error:
            said.append(f"{error}")
    return said


def seeds_case(rank, world, sizes):
    """Ranks with their own generators: the loss and what they drew."""
    scores, target = batch()
    own = slice(None) if world == 0 else part_of(sizes_of(sizes, world), rank)
    torch.manual_seed(100 + rank)
    criterion = BalNoisedTopK(K, 0.5, sampler="dense", process_group=None if world == 0 else dist.group.WORLD)
    return torch.stack([criterion(scores[:, own], target) for _ in range(3)])


def messages_case(rank, world, sizes, kind):
    """How often the ranks talk: forward, backward."""
    counts, calls = [], []

    def counting(function):
        @functools.wraps(function)
        def call(*args, **more):
            calls.append((function.__name__, args[0].numel()))
            return function(*args, **more)

        return call

    kept = sharding._all_gather, dist.all_reduce
    sharding._all_gather, dist.all_reduce = map(counting, kept)
    try:
        own = part_of(sizes_of(sizes, world), rank)
        x, weight, b = (t.requires_grad_() for t in layer())
        if kind == "scores":
            scores, target = batch()
            loss = bal_noised_topk_loss(scores[:, own].requires_grad_(), target, K, 0.5, process_group=dist.group.WORLD)
        else:
            loss = linear_noised_topk_loss(x, weight[own], batch()[1], k=K, epsilon=0.5, process_group=dist.group.WORLD)
        counts.append(list(calls))
        calls.clear()
        loss.backward()
        counts.append(list(calls))
    finally:
        sharding._all_gather, dist.all_reduce = kept
    return counts


WRONG = {  # what rank 1 does otherwise than rank 0, and what each of them must hear
    "k": (lambda a: a | {"k": 3}, "all ranks must pass the same k", "all ranks must pass the same k"),
    "epsilon": (lambda a: a | {"epsilon": 0.25}, "the same epsilon", "the same epsilon"),
    "n_sample": (lambda a: a | {"n_sample": 4}, "the same n_sample", "the same n_sample"),
    "scale": (lambda a: a | {"scale": 2.0}, "the same scale", "the same scale"),
    "sampler": (lambda a: a | {"sampler": "thinned"}, "the same sampler", "the same sampler"),
    "ignore_index": (lambda a: a | {"ignore_index": -1}, "the same ignore_index", "the same ignore_index"),
    "seed": (lambda a: a | {"seed": 6}, "the same seed", "the same seed"),
    "no seed": (lambda a: a | {"seed": None}, "the same seed", "the same seed"),
    "rows": (
        lambda a: a | {"input": a["input"][1:], "target": a["target"][1:]},
        "the same number of rows",
        "the same number of rows",
    ),
    "target": (lambda a: a | {"target": a["target"].roll(1)}, "the same target", "the same target"),
    "margins": (lambda a: a | {"margin": MARGINS * 2}, "the same margins", "the same margins"),
    "number of margins": (lambda a: a | {"margin": MARGINS[:-1]}, "the same margins", "the same margins"),
    "offset": (lambda a: a | {"offset": OFFSET + 1}, "the same offset", "the same offset"),
    "no offset": (lambda a: a | {"offset": None}, "the same offset", "the same offset"),
    "weight": (lambda a: a | {"weight": WEIGHT * 2}, "the same weight", "the same weight"),
    "link": (lambda a: a | {"link": "softplus"}, "the same link", "the same link"),
    "reduction": (lambda a: a | {"reduction": "sum"}, "the same reduction", "the same reduction"),
    "learned epsilon": (
        lambda a: a | {"epsilon": torch.tensor(0.5, requires_grad=True)},
        "rank 1 cannot take part",
        "epsilon cannot be learned where classes are sharded",
    ),
    "dtype": (
        lambda a: {n: t.double() if n in ("input", "linear_weight") else t for n, t in a.items()},
        "the same dtype",
        "the same dtype",
    ),
    "width": (
        lambda a: a | {"input": a["input"][:, 1:], "linear_weight": a["linear_weight"][:, 1:]},
        "the same width",
        "the same width",
    ),
    "input": (
        lambda a: a | {"input": a["input"] + torch.tensor([[0.0]] * 8 + [[1e-6]])},
        "the same input",
        "the same input",
    ),
    "order of the input": (lambda a: a | {"input": a["input"].flip(1)}, "the same input", "the same input"),
    "gradient": (lambda a: a | {"input": a["input"].detach()}, "input_requires_grad", "input_requires_grad"),
    "a bad argument": (lambda a: a | {"epsilon": -1.0}, "rank 1 cannot take part", "epsilon must be at least 0"),
    "a bad tensor": (lambda a: a | {"target": None}, "rank 1 cannot take part", "target must be a tensor"),
    "no backend": (lambda a: a | {"backend": "cuda"}, "rank 1 cannot take part", "Error: backend 'cuda' "),
}
WRONG_EVERYWHERE = {  # what cannot be known before the ranks have met
    "k": (lambda a: a | {"k": 60}, r"k must be in [0, L - 1] = [0, 59], got 60"),
    "margins": (lambda a: a | {"margin": MARGINS[:-1]}, "margins must have shape [L] = [60], got [59]"),
    "offset": (lambda a: a | {"offset": OFFSET[:-1]}, "offset must have shape [L] = [60], got [59]"),
    "label": (lambda a: a | {"target": a["target"].clamp(max=3) + 57}, "target must be in [0, L - 1] = [0, 59]"),
}


def wrong_case(rank, world, sizes, change, everywhere=False):
    own = part_of(sizes_of(sizes, world), rank)
    x, weight, _ = layer()
    arguments = dict(
        input=x.requires_grad_(),
        linear_weight=weight[own],
        target=batch()[1],
        k=K,
        epsilon=0.5,
        n_sample=5,
        scale=1.0,
        sampler="dense",
        ignore_index=-100,
        seed=5,
        margin=MARGINS,
        offset=OFFSET,
        weight=WEIGHT,
        backend="auto",
    )
    if rank == 1 or everywhere:
        arguments = change(arguments)
    try:
        linear_noised_topk_loss(**arguments, process_group=dist.group.WORLD)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def wrong_topk_case(rank, world, sizes):
    """One class more than there are."""
    x, weight, _ = layer()
    try:
        linear_topk(x, weight[part_of(sizes_of(sizes, world), rank)], L + 1, process_group=dist.group.WORLD)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def topk_of_own_features_case(rank, world, sizes):
    """Each rank has features of its own."""
    x, weight, _ = layer()
    try:
        linear_topk(x + rank, weight[part_of(sizes_of(sizes, world), rank)], K, process_group=dist.group.WORLD)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def said_by(call):
    """The error of a call, or nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def transforms_case(rank, world, sizes):
    """What sharded losses say of torch.func and torch.export, on every rank."""
    own = part_of(sizes_of(sizes, world), rank)
    scores, target = batch()
    criterion = BalNoisedTopK(K, 0.5, process_group=dist.group.WORLD)

    def exported():
        torch.export.export(criterion, (scores[:, own], target), strict=False)

    return said_by(lambda: torch.func.grad(lambda x: criterion(x, target))(scores[:, own])), said_by(exported)


def second_derivatives_case(rank, world, sizes):
    """What sharded losses say of them, and the gradient that they give where there is none to take."""
    own = part_of(sizes_of(sizes, world), rank)
    (scores, target), (x, weight, _) = batch(), layer()
    common = dict(seed=5, sampler="dense", process_group=dist.group.WORLD)
    scores, weight = scores[:, own].clone().requires_grad_(), weight[own].clone().requires_grad_()

    def of_scores(squared):
        loss = bal_noised_topk_loss(scores, target, K, 0.5, **common)
        return torch.autograd.grad(loss.square() if squared else loss, scores, create_graph=True)[0]

    def of_weight():
        loss = linear_noised_topk_loss(x, weight, target, k=K, epsilon=0.5, **common)
        torch.autograd.grad(loss, weight, create_graph=True)

    return said_by(lambda: of_scores(True)), said_by(of_weight), of_scores(False).detach()


def fsdp_case(rank, world, sizes):
    """A head sharded by FSDP2, each rank its own batch: the loss and gradient of its forward, and what is said
    outside.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    torch.manual_seed(3)
    head = LinearHead(D, L, BalNoisedTopK(K, 0.5, seed=4))
    x, y = randn(N, D, seed=10 + rank), torch.arange(N) + 5 * rank
    if world == 0:
        other = randn(N, D, seed=11), torch.arange(N) + 5
        losses = head(x, y), head(*other)
        (sum(losses) / 2).backward()
        return [loss.detach() for loss in losses], head.weight.grad, [head.topk(x, K)[1], head.topk(other[0], K)[1]]
    fully_shard(head, mesh=init_device_mesh("cpu", (world,)))
    loss = head(x, y)
    loss.backward()
    grad = head.weight.grad.full_tensor()
    outside = [
        said_by(lambda: head.topk(x, K)),
        said_by(lambda: linear_noised_topk_loss(x, head.weight, y, k=K, epsilon=0.5)),
    ]
    same_batch = head.topk(randn(N, D, seed=10), K)[1]
    register_fsdp_forward_method(head, "topk")
    best = head.topk(x, K)[1]
    assert f"BalNoisedTopK(k={K}, epsilon=0.5, seed=4)" in repr(head), repr(head)
    return loss.detach(), grad, best, outside, same_batch


def managed_case(rank, world, sizes):
    """sparse_grad under what reduces only dense gradients, the head itself wrapped or a part of the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = torch.nn.Linear(D, D), LinearHead(D, L, BalNoisedTopK(K, 0.5), sparse_grad=True)

        def forward(self, x, y):
            return self.head(self.trunk(x), y)

    mesh = init_device_mesh("cpu", (world,))
    x, y = layer()[0], batch()[1]
    replica = DistributedDataParallel(Model())
    head, model = LinearHead(D, L, BalNoisedTopK(K, 0.5), sparse_grad=True), Model()
    for module in (head, model):
        fully_shard(module, mesh=mesh)
    alone = Model()  # beside the others, unmanaged
    said = [said_by(lambda module=module: module(x, y)) for module in (replica, head, model, alone)]
    alone(x, y).backward()
    sharded = [LinearHead(D, L, BalNoisedTopK(K, 0.5), process_group=dist.group.WORLD) for _ in range(2)]
    fully_shard(sharded[1], mesh=mesh)
    sharded[0] = DistributedDataParallel(sharded[0])
    said += [said_by(lambda module=module: module(x, y)) for module in sharded]
    of_own_kind = [dist.new_group([i]) for i in range(world)][rank]  # as the replicas of a rank's classes in a mesh
    apart = LinearHead(D, L, BalNoisedTopK(K, 0.5), process_group=dist.group.WORLD)
    said.append(said_by(lambda: DistributedDataParallel(apart, process_group=of_own_kind)(x, y)))
    return said, alone.head.weight.grad.is_sparse


def class_counts_case(rank, world, sizes):
    """Heads that were made for different numbers of classes."""
    head = LinearHead(D, L + rank, BalNoisedTopK(K, 0.5), process_group=dist.group.WORLD)
    return said_by(lambda: head(layer()[0], batch()[1]))


def from_meta_case(rank, world, sizes):
    """Parameters and margins of a head that was made on the meta device, sharded by FSDP2, and filled."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def head(device):
        return LinearHead(
            D, L, ImbalNoisedTopK(K, 0.05, 0.3, range(1, L + 1)), bias=False, normalize=True, device=device
        )

    torch.manual_seed(3)
    if world == 0:
        made = head(None)
        return made.weight.detach(), made.criterion.m_list
    module = head("meta")
    fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    module.to_empty(device="cpu")
    module.criterion.m_list.fill_(float("nan"))
    for part in module.modules():
        part.reset_parameters()
    return module.weight.full_tensor().detach(), module.criterion.m_list


def with_no_rows(scores, target):
    return scores[:0], target[:0]


def no_rows_case(rank, world, sizes, normalize=False):
    """The linear loss and the best classes of an empty batch."""
    own = slice(None) if world == 0 else part_of(sizes_of(sizes, world), rank)
    group = None if world == 0 else dist.group.WORLD
    x, weight, _ = layer()
    x, weight = x[:0].clone().requires_grad_(), weight[own].clone().requires_grad_()
    target = batch()[1][:0]
    loss = linear_noised_topk_loss(
        x, weight, target, k=K, epsilon=0.5, seed=5, reduction="sum", normalize=normalize, process_group=group
    )
    loss.backward()
    values, classes = linear_topk(x, weight, 3, process_group=group)
    return loss.detach(), x.grad, weight.grad, values, classes


def mixed_case(rank, world, sizes):
    """Ranks that call different functions."""
    scores, target = batch()
    x, weight, _ = layer()
    own = part_of(sizes_of(sizes, world), rank)
    try:
        if rank:
            bal_noised_topk_loss(scores[:, own], target, K, process_group=dist.group.WORLD)
        else:
            linear_topk(x, weight[own], K, process_group=dist.group.WORLD)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def topk_case(rank, world, sizes, chunk, k=17):
    x, weight, b = layer()
    own = slice(None) if world == 0 else part_of(sizes_of(sizes, world), rank)
    group = None if world == 0 else dist.group.WORLD
    return linear_topk(x, weight[own], k, linear_bias=b[own], chunk_size=chunk, process_group=group)


def modules_case(rank, world, sizes, name):
    """A step of the modules that own a weight: the same first weights, whatever the number of ranks."""
    torch.manual_seed(3)
    group = None if world == 0 else dist.group.WORLD
    source = dict(seed=4, sampler="dense")
    if name == "balanced":
        module = LinearHead(D, L, BalNoisedTopK(K, 0.5, **source), process_group=group)
    else:
        criterion = ImbalNoisedTopK(K, 0.05, 0.3, range(1, L + 1), **source)
        module = LinearHead(D, L, criterion, bias=False, normalize=True, process_group=group)
    x, target = layer()[0].requires_grad_(), batch()[1]
    loss = module(x, target)
    loss.backward()
    return loss.detach(), x.grad, *(part for p in module.parameters() for part in (p.detach(), p.grad))


def recipe_case(rank, world, sizes):
    """docs/sharding.md: each rank its own rows, features gathered, parts of the trunk's gradient added up, clipping by
    the norm over all ranks' rows."""
    torch.manual_seed(3)
    trunk = torch.nn.Linear(D, D)
    group = None if world == 0 else dist.group.WORLD
    criterion = BalNoisedTopK(K, 0.5, seed=4, sampler="dense")
    head = LinearHead(D, L, criterion, sparse_grad=True, process_group=group)
    x, y = randn(8, D, seed=6), torch.arange(8) * 7
    if world == 0:
        loss = head(trunk(x), y)
        loss.backward()
    else:
        x, y = x.chunk(world)[rank], y.chunk(world)[rank]
        own = trunk(x)
        rows, labels = ([torch.empty_like(t) for _ in range(world)] for t in (own, y))
        dist.all_gather(rows, own.detach())
        dist.all_gather(labels, y)
        rows[rank] = own
        loss = head(torch.cat(rows), torch.cat(labels))
        loss.backward()
        for parameter in trunk.parameters():
            dist.all_reduce(parameter.grad)
    parameters = [*trunk.parameters(), *head.parameters()]
    if world == 0:
        norms = [clip_grad_norm_(parameters, 0.1), clip_grad_norm_(parameters, math.inf)]
    else:
        norms = [norm_of_all_ranks(trunk, head)]
        clip_grads_with_norm_(parameters, 0.1, norms[0])
        norms.append(norm_of_all_ranks(trunk, head))
    assert norms[0] > 0.2 and norms[1] < 0.1001
    return loss.detach(), *norms, *(p.grad for p in trunk.parameters())


def norm_of_all_ranks(trunk, head):
    squares = clip_grad_norm_(head.parameters(), math.inf).square()
    dist.all_reduce(squares)
    return (clip_grad_norm_(trunk.parameters(), math.inf).square() + squares).sqrt()


def hits_case(rank, world, sizes, as_dtensor=False):
    """Hits and loss of a head; then what all ranks say to one that wants other hits, and to too large a K."""
    torch.manual_seed(3)
    group = None if world == 0 or as_dtensor else dist.group.WORLD
    head = LinearHead(D, L, BalNoisedTopK(K, 0.5, seed=4, sampler="dense"), process_group=group, chunk_size=7)
    x, target = randn(N, D, seed=1), batch()[1]
    if as_dtensor and world:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (world,))
        for name, parameter in list(head.named_parameters()):
            setattr(head, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    loss, hits = head(x, target, return_hits=(1, 30, 10))
    if as_dtensor and world:
        loss, hits = loss.full_tensor(), hits.full_tensor()
    too_large, others = (said_by(functools.partial(head, x, target, return_hits=k)) for k in (L + 1, 1 + rank))
    return loss.detach(), hits, (too_large, others)


def logits_case(rank, world, sizes):
    """A head's logits, of which each rank has those of its classes, and the gradient of a loss of all of them."""
    torch.manual_seed(3)
    group = None if world == 0 else dist.group.WORLD
    found = []
    for normalize in (False, True):
        head = LinearHead(D, L, BalNoisedTopK(K, 0.5), normalize=normalize, process_group=group)
        x = layer()[0].view(3, 3, D).requires_grad_()
        logits = head.logits(x)
        assert world == 0 or logits.placements[0].is_shard(2)
        whole = logits if world == 0 else logits.full_tensor()
        whole.logsumexp(2).sum().backward()
        found += [whole.detach(), x.grad]
    return found


def copies_case(rank, world, sizes):
    """A deep copy, as averaged models make it, talks to the same ranks."""
    group = None if world == 0 else dist.group.WORLD
    head = LinearHead(D, L, BalNoisedTopK(K, 0.5, seed=4), process_group=group)
    x, target = layer()[0], batch()[1]
    return head(x, target).detach(), copy.deepcopy(head)(x, target).detach()


def compiled_case(rank, world, sizes, kind):
    """A loss inside of torch.compile, which breaks its graph there."""
    own = slice(None) if world == 0 else part_of(sizes_of(sizes, world), rank)
    common = dict(seed=5, sampler="dense", process_group=None if world == 0 else dist.group.WORLD)
    (scores, target), (x, weight, _) = batch(), layer()
    leaf = (scores[:, own] if kind == "scores" else weight[own]).clone().requires_grad_()

    def run(leaf):
        if kind == "scores":
            return 3 * bal_noised_topk_loss(2 * leaf, target, K, 0.5, **common)
        return 3 * linear_noised_topk_loss(x, 2 * leaf, target, k=K, epsilon=0.5, **common)

    loss = run(leaf) if world == 0 else torch.compile(run, backend="aot_eager")(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def thinned_case(rank, world, sizes):
    """Losses and how often each class was the second, of many rows alike and long enough for the thinned sampler."""
    scores = randn(1, 50 * L, seed=7).repeat(4000, 1)
    target = torch.full((4000,), int(scores[0].argmin()))
    own = slice(None) if world == 0 else part_of([50 * n for n in sizes_of(sizes, world)], rank)
    x = scores[:, own].requires_grad_()
    group = None if world == 0 else dist.group.WORLD
    seed = 9 if world else 10  # of its own: classes above the cut would have the same noise, and counts be dependent
    losses = bal_noised_topk_loss(x, target, 1, 1.0, 1, seed=seed, reduction="none", process_group=group)
    losses.sum().backward()
    return losses.detach(), x.grad.sum(0)


DTENSOR_ERRORS = (
    r"input must be sharded along its classes, Shard\(1\), .* got \(Shard\(dim=0\),\)",
    "input is a DTensor, which knows its process group: process_group must be None",
    "sparse_grad=True needs a plain weight, got a DTensor",
)
CASES = {
    **{
        f"{name}, {sizes}, {dtype}, {backend}": (scores_case, sizes, name, dtype, "none", backend)
        for name in LOSSES
        for sizes in SIZES
        for dtype in DTYPES
        for backend in BACKENDS
    },
    **{
        f"{name}, {sizes}": (scores_case, sizes, name, "float32", reduction, "auto")
        for name in LOSSES_OF_CLASSES
        for sizes, reduction in (("ragged", "none"), ("empty and single", "mean"))
    },
    **{f"reduction {r}": (scores_case, "ragged", "imbalanced", "float32", r, "auto") for r in ("mean", "sum")},
    "NaN and masks": (scores_case, "ragged", "balanced", "float32", "none", "auto", "dense", with_nan_and_masks),
    "more dimensions": (scores_case, "ragged", "balanced", "float32", "none", "auto", "dense", with_more_dimensions),
    **{f"linear, {sizes}": (linear_case, sizes) for sizes in SIZES},
    "linear in float64": (linear_case, "ragged", "float64"),
    "linear in bfloat16": (linear_case, "ragged", "bfloat16"),
    "linear without bias": (linear_case, "ragged", "float32", False),
    "linear with cosine logits": (linear_case, "ragged", "float32", False, True),
    "linear with a sparse gradient": (linear_case, "empty and single", "float32", True, True, True),
    "linear in chunks": (linear_case, "ragged", "float32", True, False, False, 7),
    "linear with margins": (linear_case, "even", "float32", True, False, False, None, MARGINS),
    "linear family": (linear_family_case, "ragged", False),
    "linear family with a sparse gradient": (linear_family_case, "empty and single", True),
    "top-k": (topk_case, "ragged", None),
    "top-k in chunks": (topk_case, "empty and single", 7),
    "top-k: the best alone": (topk_case, "ragged", None, 1),
    "top-k: all classes": (topk_case, "ragged", 9, L),
    "DTensor scores": (dtensor_case, "even", "scores"),
    "DTensor replicated scores": (dtensor_case, "even", "replicated scores"),
    "DTensor scores of the family": (dtensor_case, "even", "family of scores"),
    "DTensor weight of the family": (dtensor_case, "even", "linear family"),
    "DTensor errors": (wrong_dtensor_case, "even"),
    "logits": (logits_case, "even"),
    "DTensor weight": (dtensor_case, "even", "linear"),
    "no rows": (scores_case, "ragged", "imbalanced", "float32", "sum", "auto", "dense", with_no_rows),
    "no rows, losses": (scores_case, "ragged", "balanced", "bfloat16", "none", "auto", "thinned", with_no_rows),
    "no rows, linear": (no_rows_case, "ragged"),
    "no rows, cosine logits": (no_rows_case, "empty and single", True),
    "second derivatives": (second_derivatives_case, "ragged"),
    "transforms": (transforms_case, "ragged"),
    "all rows ignored": (scores_case, "ragged", "balanced", "float32", "none", "auto", "dense", with_all_ignored),
    "recipe": (recipe_case, "even"),
    "copies": (copies_case, "even"),
    "linear module": (modules_case, "even", "balanced"),
    "linear module with margins": (modules_case, "even", "imbalanced"),
    "seeds": (seeds_case, "ragged"),
    "thinned": (thinned_case, "ragged"),
    "messages of scores": (messages_case, "ragged", "scores"),
    "messages of linear": (messages_case, "ragged", "linear"),
    **{f"wrong {name}": (wrong_case, "ragged", change) for name, (change, *_) in WRONG.items()},
    **{f"all wrong {name}": (wrong_case, "ragged", change, True) for name, (change, _) in WRONG_EVERYWHERE.items()},
    "mixed": (mixed_case, "ragged"),
    "hits": (hits_case, "even"),
    "hits of DTensors": (hits_case, "even", True),
    "wrong top-k": (wrong_topk_case, "ragged"),
    "wrong features": (topk_of_own_features_case, "ragged"),
    "wrong class counts": (class_counts_case, "even"),
}
MORE = {  # on so many ranks alone: the mesh needs four, and compiling takes each of them seconds
    2: {
        "compiled scores": (compiled_case, "ragged", "scores"),
        "compiled linear": (compiled_case, "ragged", "linear"),
        "FSDP2": (fsdp_case, "even"),
        "managed": (managed_case, "even"),
        "from meta": (from_meta_case, "even"),
    },
    4: {"DTensor weight on a mesh of two dimensions": (dtensor_case, "even", "2d mesh")},
}


def serve(rank, world, store, out):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # all are here: no look-up of the machine's name
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    results = {}
    for name, (case, *args) in (CASES | MORE.get(world, {})).items():
        if world > 1 or case not in (wrong_case, mixed_case, topk_of_own_features_case):
            try:
                results[name] = case(rank, world, *args)
            except Exception:
                results[name] = traceback.format_exc()
                break  # the others may wait for this rank: their own timeout ends them
    torch.save(results, out)
    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank returned, by number of ranks: {world: [{case: result}, ...]}."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "topk_fast", "scipy.stats"])
    found = {}
    for world in WORLDS:
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        outs = [folder / f"{rank}.pt" for rank in range(world)]
        processes = [context.Process(target=serve, args=(r, world, folder / "store", outs[r])) for r in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(180)
            if process.is_alive():
                process.kill()
        found[world] = [torch.load(out, weights_only=False) if out.exists() else {} for out in outs]
    return found


def result_of(ranks, world, name):
    results = [answers.get(name, "this rank did not come so far") for answers in ranks[world]]
    for rank, result in enumerate(results):
        assert not isinstance(result, str) or name.split()[0] in ("wrong", "all", "mixed"), f"rank {rank}: {result}"
    return results


def alone(name):
    case, *args = (CASES | MORE[2] | MORE[4])[name]
    return case(0, 0, *args)


every_world = pytest.mark.parametrize("world", WORLDS)
SCORES = [name for name, (case, *_) in CASES.items() if case is scores_case]
LINEAR = [name for name, (case, *_) in CASES.items() if case in (linear_case, linear_family_case, modules_case)]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@every_world
@pytest.mark.parametrize("name", SCORES)
def test_sharded_scores_give_the_bits_of_one_process(ranks, world, name):
    loss, grad = alone(name)
    assert grad.any() == (name != "all rows ignored" and not name.startswith("no rows"))
    results = result_of(ranks, world, name)
    for ours, _ in results:
        same(ours, loss)
    same(torch.cat([g for _, g in results], dim=1), grad)


@every_world
@pytest.mark.parametrize("name", LINEAR)
def test_sharded_linear_loss_is_that_of_one_process(ranks, world, name):
    """Within a matmul's rounding: a shard's matmul may add in another order, and ranks' input gradients are added
    up.
    """
    loss, x_grad, *parameters = alone(name)
    results = result_of(ranks, world, name)
    tolerance = dict(rtol=2**-6, atol=2**-6) if "bfloat16" in name else dict(rtol=1e-5, atol=1e-5)
    for ours, theirs, *_ in results:
        torch.testing.assert_close(ours, loss, **tolerance)
        torch.testing.assert_close(theirs, x_grad, **tolerance)
        same(theirs, results[0][1])
    for whole, *parts in zip(parameters, *(r[2:] for r in results)):
        torch.testing.assert_close(torch.cat(parts) if whole.dim() else parts[0], whole, **tolerance)


@every_world
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("top-k")])
def test_sharded_topk(ranks, world, name):
    x, weight, b = layer()
    for values, classes in [alone(name), *result_of(ranks, world, name)]:
        expected = F.linear(x, weight, b).topk(values.shape[-1])
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(classes, expected.indices)
    assert classes.shape == (N, {"top-k: the best alone": 1, "top-k: all classes": L}.get(name, 17))


@every_world
@pytest.mark.parametrize("name", [name for name, (case, *_) in CASES.items() if case is dtensor_case])
def test_dtensors(ranks, world, name):
    for result in result_of(ranks, world, name):
        for given, expected in zip(result, alone(name), strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


@every_world
def test_logits_of_a_sharded_head(ranks, world):
    for found in result_of(ranks, world, "logits"):
        for given, expected in zip(found, alone("logits"), strict=True):
            torch.testing.assert_close(given, expected)


@every_world
def test_dtensors_that_are_not_sharded_by_class(ranks, world):
    for said in result_of(ranks, world, "DTensor errors"):
        assert [bool(re.search(*pair)) for pair in zip(DTENSOR_ERRORS, said, strict=True)] == [True] * 3, said


def test_dtensor_on_a_mesh_of_two_dimensions(ranks):
    name = "DTensor weight on a mesh of two dimensions"
    for result in result_of(ranks, 4, name):
        for given, expected in zip(result, alone(name), strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["compiled scores", "compiled linear"])
def test_compiled(ranks, name):
    loss, grad = alone(name)
    results = result_of(ranks, 2, name)
    for ours, _ in results:
        torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.cat([g for _, g in results], dim=int(name.endswith("scores"))), grad, rtol=1e-5, atol=1e-6
    )


@every_world
@pytest.mark.parametrize("name", ["no rows, linear", "no rows, cosine logits"])
def test_no_rows(ranks, world, name):
    loss, x_grad, weight_grad, *best = alone(name)
    results = result_of(ranks, world, name)
    for ours, of_x, _, *ours_best in results:
        same([ours, of_x, *ours_best], [loss, x_grad, *best])
    same(torch.cat([of_weight for _, _, of_weight, *_ in results]), weight_grad)


@every_world
def test_second_derivatives(ranks, world):
    """An error where the gradient depends on what it is asked of; it is constant in scores, and that is right."""
    message = "has no second derivative: call backward without create_graph"
    gradient = scores_case(0, 0, None, "balanced", "float32", "mean", "auto")[1]
    results = result_of(ranks, world, "second derivatives")
    for of_scores, of_weight, _ in results:
        assert of_scores == f"RuntimeError: a loss whose classes are sharded {message}"
        assert of_weight == f"RuntimeError: a linear loss whose classes are sharded {message}"
    torch.testing.assert_close(torch.cat([g for _, _, g in results], dim=1), gradient)


@every_world
def test_transforms(ranks, world):
    for of_grad, of_export in result_of(ranks, world, "transforms"):
        assert of_grad.startswith("RuntimeError: torch.func does not transform a loss whose classes are sharded")
        assert "a loss whose classes are sharded cannot be exported" in of_export


def test_a_head_under_fsdp(ranks):
    """Its forward is right; outside the weight is a DTensor, whose classes other features cannot be merged with."""
    losses, weight_grad, best = alone("FSDP2")
    for rank, (loss, grad, found, outside, same_batch) in enumerate(result_of(ranks, 2, "FSDP2")):
        torch.testing.assert_close(loss, losses[rank], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, weight_grad, rtol=1e-5, atol=1e-6)
        assert torch.equal(found, best[rank])
        assert torch.equal(same_batch, best[0])
        for said in outside:
            assert re.match(r"ValueError: all ranks must pass the same (input|target);", said)
            assert "register_fsdp_forward_method" in said and "unshard()" in said


def test_sparse_gradients_under_what_reduces_dense_ones(ranks):
    for (of_ddp, of_head, of_model, of_none, *sharded), is_sparse in result_of(ranks, 2, "managed"):
        assert of_ddp.startswith("ValueError: sparse_grad=True does not go with DistributedDataParallel")
        assert of_head.startswith("ValueError: sparse_grad=True does not go with FSDP2") and of_model == of_head
        assert of_none is None and is_sparse
        for said, manager in zip(sharded, ("DistributedDataParallel", "FSDP2")):
            assert said.startswith(f"ValueError: a head with process_group does not go inside of {manager} over the")
        assert sharded[2] is None


@pytest.mark.parametrize("world", [2, 4])
def test_heads_of_different_numbers_of_classes_all_raise(ranks, world):
    for said in result_of(ranks, world, "wrong class counts"):
        assert said.startswith("ValueError: all ranks must pass the same n_classes;")


def test_a_head_from_the_meta_device_under_fsdp(ranks):
    weight, margins = alone("from meta")
    assert weight.any() and margins.any()
    for result in result_of(ranks, 2, "from meta"):
        same(list(result), [weight, margins])


@every_world
def test_the_recipe_for_ranks_with_their_own_samples(ranks, world):
    for result in result_of(ranks, world, "recipe"):
        for given, expected in zip(result, alone("recipe"), strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


@every_world
def test_copies_talk_to_the_same_ranks(ranks, world):
    for first, second in result_of(ranks, world, "copies"):
        same(first, second)


@every_world
def test_the_seed_is_rank_0s(ranks, world):
    """Rank 0's generator gives what it gives alone, call by call, and all ranks agree."""
    for result in result_of(ranks, world, "seeds"):
        same(result, alone("seeds"))
    assert len(alone("seeds").unique()) == 3


@every_world
def test_thinned_sampler_has_the_distribution_of_one_process(ranks, world):
    losses, counts = alone("thinned")
    results = result_of(ranks, world, "thinned")
    for ours, _ in results:
        same(ours, results[0][0])
    p = stats.ks_2samp(results[0][0].numpy(), losses.numpy()).pvalue
    table = torch.stack([torch.cat([c for _, c in results]), counts])
    table = table[:, (table >= 0).all(0)]  # without the true class, which has all rows less
    often = table.sum(0) >= 20
    table = torch.cat([table[:, often], table[:, ~often].sum(1, keepdim=True)], dim=1)
    q = stats.chi2_contingency(table.numpy()).pvalue
    print(f"{world} ranks: KS p = {p:.3g}, chi-square p = {q:.3g} over {table.shape[1]} classes")
    assert table.shape[1] > 20 and min(p, q) > 1e-4


@every_world
def test_messages(ranks, world):
    """One exchange of sizes and one packed all-gather; backward nothing for scores, one sum for the linear form."""
    forward = [("_all_gather", sharding._SLOTS), ("_all_gather", N * (2 * 5 * (K + 1) + 1))]
    for result in result_of(ranks, world, "messages of scores"):
        assert result == [forward, []]
    for result in result_of(ranks, world, "messages of linear"):
        assert result == [forward, [("all_reduce", N * D)]]


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", WRONG)
def test_ranks_that_disagree_all_raise(ranks, world, name):
    results = result_of(ranks, world, f"wrong {name}")
    for rank, result in enumerate(results):
        assert result is not None and WRONG[name][2 if rank == 1 else 1] in result


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", WRONG_EVERYWHERE)
def test_what_is_wrong_with_all_classes_known_raises_everywhere(ranks, world, name):
    for result in result_of(ranks, world, f"all wrong {name}"):
        assert result is not None and WRONG_EVERYWHERE[name][1] in result


@every_world
@pytest.mark.parametrize("name", ["hits", "hits of DTensors"])
def test_hits(ranks, world, name):
    loss, hits, _ = alone("hits")
    assert 0 < hits.sum() < hits.numel()
    for given_loss, given, (too_large, others) in result_of(ranks, world, name):
        assert torch.equal(given, hits)
        torch.testing.assert_close(given_loss, loss)
        assert f"return_hits must be in [1, L] = [1, {L}], got {L + 1}" in too_large
        assert world == 1 or "all ranks must pass the same return_hits" in others


@every_world
def test_topk_of_more_classes_than_there_are(ranks, world):
    for result in result_of(ranks, world, "wrong top-k"):
        assert result == "ValueError: k must be in [1, L] = [1, 60], got 61"


@pytest.mark.parametrize("world", WORLDS[1:])
def test_topk_of_features_that_differ(ranks, world):
    for result in result_of(ranks, world, "wrong features"):
        assert "all ranks must pass the same input" in result


@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_that_call_different_functions(ranks, world):
    for result in result_of(ranks, world, "mixed"):
        assert "all ranks must pass the same function" in result


def test_a_group_that_is_none():
    scores, target = batch()
    with pytest.raises(TypeError, match="process_group must be a torch.distributed.ProcessGroup"):
        BalNoisedTopK(K, 0.5, process_group="gloo")(scores, target)
    with pytest.raises(TypeError, match="process_group must be a torch.distributed.ProcessGroup"):
        ImbalNoisedTopK(K, 0.5, 0.3, range(1, L + 1), process_group=1)(scores, target)
