"""Classes sharded over the ranks of a process group, on ``torch.distributed``.

Rank r holds the classes [first_r, first_r + L_r) of every row, in the order of ranks. A loss takes two steps:

1. a `Meeting`: one all-gather of 32 integers, by which the ranks learn each other's number of classes, agree on rank
   0's seed, and find out that their arguments differ, or that one of them cannot go on, before any of them waits;
2. `Shards.merge_lists`: one packed all-gather of the k best of every (row, sample), their classes, and the true
   class's score.

After it every rank has all that the loss and the gradient of its own classes need. Bytes: N * (2 * B * k + 1) words of
4 (float64: 8) sent by each rank.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from . import checks, reference
from .request import Labels, LossRequest, Noise

_BLOCK = 1 << 20  # numbers whose checksum is taken at a time
_OF_FSDP = (
    ". The weight is a DTensor, so its classes are taken as sharded over the ranks. Is it sharded by FSDP2, and are "
    "the ranks' batches different? Then call its module's forward, where the weight is whole; for another method use "
    "torch.distributed.fsdp.register_fsdp_forward_method, or call unshard() on the module first"
)
_SLOTS = 32  # of the meeting's message; the same for all functions, so that no mix of calls can hang


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n] of every rank, one all-gather -> [ranks, n]."""
    out = x.new_empty(group.size() * x.numel())
    single = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # torch < 2.13
    getattr(dist, single)(out, x, group=group)
    return out.view(group.size(), x.numel())


@dataclass(frozen=True)
class Shards:
    """Which classes this rank holds, and what the ranks agreed on."""

    group: dist.ProcessGroup
    sizes: tuple[int, ...]  # classes of each rank
    seed: Tensor  # rank 0's

    @property
    def n_classes(self) -> int:
        return sum(self.sizes)

    @property
    def first_class(self) -> int:
        return sum(self.sizes[: self.group.rank()])

    def merge_lists(self, values: Tensor, classes: Tensor, true_score: Tensor, target: Tensor):
        """The k best of all ranks' lists [N, B, k], and the true class's score [N] that its owner has."""
        n_rows, n_sample, k = values.shape
        word = torch.int64 if values.dtype == torch.float64 else torch.int32
        lists = torch.stack([values.view(word), classes.to(word)])  # [2, N, B, k]
        own = torch.cat([lists.flatten(), true_score.to(values.dtype).view(word)])
        lists, scores = _all_gather(own, self.group).split([lists.numel(), n_rows], dim=1)
        lists = lists.reshape(len(self.sizes), 2, n_rows, n_sample, k).movedim(0, 3).flatten(3)  # [2, N, B, ranks * k]
        values, classes = reference.merge(lists[0].view(values.dtype), lists[1].to(torch.int64), k)
        ends = torch.tensor(self.sizes, device=target.device).cumsum(0)
        owner = torch.searchsorted(ends, target.contiguous(), right=True).clamp(max=len(self.sizes) - 1)
        return values, classes, scores.gather(0, owner[None])[0].contiguous().view(values.dtype)

    def sum(self, x: Tensor) -> Tensor:
        """Adds up over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x


class SumGradients(Function):
    """Features that are the same on all ranks, each of which gets the gradient of its own classes back."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def check_group(group) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this rank belongs to, got "
            f"{type(group).__name__}"
        )


def copy_with_group(module: Module, memo: dict) -> Module:
    """A deep copy of a module, which communicates with the same ranks."""
    group = module.process_group
    memo[id(group)] = group
    memo[id(module)] = copy = module.__new__(type(module))
    copy.__dict__.update(deepcopy(module.__dict__, memo))
    return copy


def own_slice(n_classes: int, group) -> tuple[int, int]:
    """The first and the number of this rank's classes where they are shared out evenly, as DTensor's Shard(0) does."""
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    width = -(-n_classes // ranks)
    first = min(rank * width, n_classes)
    return first, min(width, n_classes - first)


class Meeting:
    """The ranks' exchange of sizes, seed and arguments; without a group it does nothing.

    A rank that leaves the ``with`` block by an exception before it agreed tells the others, and they raise as well.
    """

    def __init__(self, group: dist.ProcessGroup | None, function: str, from_dtensor: bool = False):
        check_group(group)
        self.group: Any = group
        self.function, self.over = function, group is None
        self.hint = _OF_FSDP if from_dtensor else ""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and not self.over:
            self._exchange([0] * _SLOTS)

    def _exchange(self, message: list[int]) -> list[list[int]]:
        self.over = True
        # Gloo where there is one, for the message is the host's; else NCCL's device.
        on_cpu = "cpu" in dist.get_backend_config(self.group)
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        own = torch.tensor(message, dtype=torch.int64, device=device)
        return _all_gather(own, self.group).tolist()

    def agree(
        self, n_classes: int, labels: Labels, wanted: Noise, *, fixed_seed: bool, tensors: dict, facts: dict
    ) -> Shards | None:
        """The `Shards` of a call with ``n_classes`` classes here; raises on every rank where ranks disagree.

        The ranks compare the bits of ``tensors`` and the values of ``facts``, both by the names of the user's
        arguments.
        """
        if self.group is None:
            return None
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "a loss whose classes are sharded cannot be exported, since its ranks communicate in Python"
            )
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "torch.func does not transform a loss whose classes are sharded: call backward() or torch.autograd.grad"
            )
        if wanted.learned_epsilon is not None:
            raise ValueError("epsilon cannot be learned where classes are sharded: pass epsilon.detach()")
        agree = torch.compiler.disable(self._agree) if torch.compiler.is_compiling() else self._agree
        return agree(n_classes, labels, wanted, fixed_seed, tensors, facts)

    def _agree(self, n_classes, labels, wanted, fixed_seed, tensors, facts):
        target, ignore_index, _ = labels
        known = labels.known
        tensors = {"target": target} | tensors
        if wanted.schedule is not None:
            tensors |= {"epsilon": wanted.schedule[None]}
        ends = known.aminmax() if len(known) else (torch.zeros_like(wanted.seed),) * 2
        marks = [wanted.seed, *ends, *map(_checksum, tensors.values())]
        seed, low, high, *marks = torch.stack(marks).tolist()  # waits for the device once
        facts = {
            "function": self.function,
            "number of rows": len(target),
            "target": None,  # its place, before the margins, which depend on it; the checksum follows
            "ignore_index": ignore_index,
            "n_sample": wanted.n_sample,
            "noise": wanted.law,
            "sampler": wanted.dense,
            "epsilon": wanted.epsilon,
            "seed": seed if fixed_seed else None,
        } | facts
        codes = {name: zlib.crc32(repr(value).encode()) for name, value in facts.items()}
        codes |= {name: zlib.crc32(repr(mark).encode()) for name, mark in zip(tensors, marks)}
        message = [1, n_classes, seed, *codes.values()]
        everyone = self._exchange(message + [0] * (_SLOTS - len(message)))
        for rank, (able, *_) in enumerate(everyone):
            if not able:
                raise RuntimeError(f"rank {rank} cannot take part in {self.function}: its own error says why")
        for rank, (_, _, _, *others) in enumerate(everyone):
            for (name, ours), theirs in zip(codes.items(), others):
                if ours != theirs:
                    shown = "" if name in tensors else f", {facts[name]!r} here"
                    raise ValueError(
                        f"all ranks must pass the same {name}; rank {rank}'s is not this rank's{shown}{self.hint}"
                    )
        shards = Shards(self.group, tuple(m[1] for m in everyone), torch.full_like(wanted.seed, everyone[0][2]))
        if low < 0 or high >= shards.n_classes:
            checks.check_labels(target, shards.n_classes, ignore_index)
        return shards


def agree_on(meeting: Meeting, search, loss: LossRequest, *, tensors: dict, facts: dict):
    """``search`` with the `Shards` of its ranks and rank 0's seed, after the ranks compared their arguments.

    ``search`` is a `Search` or a `LinearSearch`.
    """
    if meeting.group is None:
        return search
    labels, wanted, criterion = search.labels, search.noise, loss.criterion
    top = tuple(rank - 1 for rank in wanted.ranks)
    facts = {"k": top, "exclude_target": labels.exclude_target, "offset": loss.offset is not None} | facts
    if criterion is not None:
        facts = facts | criterion.facts()
        tensors = tensors | {name: _picked(x, labels) for name, x in criterion.vectors.items()}
    if loss.offset is not None:
        tensors = tensors | {"offset": loss.offset}
    fixed_seed = loss.options.seed is not None
    shards: Any = meeting.agree(search.n_classes, labels, wanted, fixed_seed=fixed_seed, tensors=tensors, facts=facts)
    checks.check_top(top, shards.n_classes, least=int(labels.exclude_target))
    for name, x in loss.vectors.items():
        checks.check_class_vector(name, x, shards.n_classes, x.device)
    return search._replace(shards=shards, noise=wanted._replace(seed=shards.seed))


def _picked(x: Tensor, labels: Labels) -> Tensor:
    """The numbers of the true classes and how many numbers there are: what a rank's losses depend on."""
    picked = x[labels.known.clamp(0, len(x) - 1)] if len(x) else x
    return torch.cat([picked, picked.new_tensor([len(x)])])


def own_classes(x: Tensor, search) -> Tensor:
    """The numbers of this rank's classes among those of all classes."""
    return x if search.shards is None else x.narrow(0, search.first_class, search.n_classes)


def _checksum(x: Tensor) -> Tensor:
    """Of the bits of numbers and their order; in blocks, so that it needs no memory of x's size."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for i, block in enumerate(x.detach().contiguous().flatten().view(words).split(_BLOCK)):
        place = torch.arange(i * _BLOCK, i * _BLOCK + len(block), device=x.device)
        total += (block * (place * 0x9E3779B97F4A7C1 + 1)).sum()
    return total


def local_part(name: str, x, class_dim: int, process_group) -> tuple[Tensor, dist.ProcessGroup | None, Callable | None]:
    """A DTensor's shard, the group over which it is sharded by class, and what makes a result a DTensor again.

    Any other ``x`` is returned as it is, with ``process_group`` and None.
    """
    tensors = sys.modules.get("torch.distributed.tensor")  # without it there are no DTensors
    if tensors is None or not isinstance(x, tensors.DTensor):
        return x, process_group, None
    if process_group is not None:
        raise ValueError(f"{name} is a DTensor, which knows its process group: process_group must be None")
    sharded = [i for i, placement in enumerate(x.placements) if not placement.is_replicate()]
    if len(sharded) > 1 or any(not x.placements[i].is_shard(class_dim) for i in sharded):
        raise ValueError(
            f"{name} must be sharded along its classes, Shard({class_dim}), on one dimension of its mesh and "
            f"replicated on all others, got {x.placements}"
        )
    mesh = x.device_mesh
    group = mesh.get_group(sharded[0]) if sharded else None

    def wrap(result: Tensor) -> Tensor:
        return tensors.DTensor.from_local(result, mesh, [tensors.Replicate()] * mesh.ndim, run_check=False)

    return x.to_local(), group, wrap


def replicated(x):
    """A DTensor's full value; any other ``x`` as it is."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return x.full_tensor() if tensors is not None and isinstance(x, tensors.DTensor) else x


def check_unmanaged(weight: Tensor, sparse: bool, group) -> None:
    """Refuses a weight that DistributedDataParallel or FSDP2 will reduce, where its gradient is row-sparse, or where
    they reduce over ranks that own other classes."""
    manager, ranks = _manager_of(weight)
    if manager is None:
        return
    if sparse:
        raise ValueError(
            f"sparse_grad=True does not go with {manager}, which reduces only dense gradients: pass sparse_grad=False, "
            "or keep the head out of it and give it a process_group, so that each rank owns some of the classes"
        )
    if group is not None and len(ranks.intersection(dist.get_process_group_ranks(group))) > 1:
        raise ValueError(
            f"a head with process_group does not go inside of {manager} over the same ranks, each of which owns other "
            "classes: keep the head out of it"
        )


def _manager_of(weight: Tensor) -> tuple[str | None, set[int]]:
    """What reduces the gradient of a weight, in a forward, and the ranks over which it does."""
    replica = DistributedDataParallel._get_active_ddp_module()
    if replica is not None and any(weight is p for p in replica._module_parameters):
        return "DistributedDataParallel", set(dist.get_process_group_ranks(replica.process_group))
    for parameter, mesh in _unsharded_by_fsdp():
        if weight is parameter:
            return "FSDP2", set(mesh.mesh.flatten().tolist())
    return None, set()


def _unsharded_by_fsdp():
    """The parameters that FSDP2 shards, as a module's forward sees them, with its mesh. It has no public way to ask;
    without these names its own error comes in the backward."""
    states = sys.modules.get("torch.distributed._composable_state")
    for reference_to in list(getattr(states, "_module_state_mapping", {}).values()):
        state = reference_to()
        single = getattr(state, "_fsdp_param_group", None) if not hasattr(state, "_fsdp_param_groups") else None
        for group in getattr(state, "_fsdp_param_groups", [single]):
            for p in getattr(group, "fsdp_params", ()):
                yield getattr(p, "_unsharded_param", None), group.mesh_info.mesh
