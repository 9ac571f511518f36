"""Checkpoints of a head whose classes are sharded: its rows, and an optimizer's state of them, as DTensors.

:mod:`torch.distributed.checkpoint` merges these, and loads them into any number of ranks.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from .sharding import own_slice


def shard(local: Tensor, dim: int, shape: torch.Size, group: dist.ProcessGroup) -> Tensor:
    """This rank's classes as a part of the DTensor of all, of ``shape``, which shares their memory."""
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard

    mesh = DeviceMesh.from_group(group, local.device.type)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(dim % len(shape))], run_check=False, shape=shape, stride=stride)


def _own_part(x: Tensor, shape: torch.Size, group: dist.ProcessGroup) -> Tensor:
    """This rank's classes of a tensor of ``shape``, or of a DTensor that is sharded as `shard` does."""
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and isinstance(x, tensors.DTensor):
        if x.device_mesh.size() == group.size() and x.placements == (tensors.Shard(0),):
            return x.to_local()
        x = x.full_tensor()
    first, n_local = own_slice(shape[0], group)
    return x.narrow(0, first, n_local) if x.shape == shape else x


def _sharded(head) -> list[tuple[str, Parameter, torch.Size]]:
    """The parameters that a head shards, with their names and their shapes over the classes of all ranks."""
    if head.process_group is None:
        return []
    rows = head.named_parameters(recurse=False)
    return [(name, own, torch.Size((head.n_classes, *own.shape[1:]))) for name, own in rows]


def save_head(head, state: dict, prefix: str, _) -> None:
    """A hook after ``head.state_dict()``."""
    for name, _, shape in _sharded(head):
        if prefix + name in state:
            state[prefix + name] = shard(state[prefix + name], 0, shape, head.process_group)


def load_head(head, state: dict, prefix: str, *others) -> None:
    """A hook before ``head.load_state_dict(state)``."""
    for name, _, shape in _sharded(head):
        if prefix + name in state:
            state[prefix + name] = _own_part(state[prefix + name], shape, head.process_group)


def register_optimizer(head, optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer's state_dict hold, and take, the state of a head's rows as the head's own does its rows."""

    def change(state, convert):
        groups = zip(optimizer.param_groups, state["param_groups"])
        numbers = {id(ours): i for pair in groups for ours, i in zip(*(group["params"] for group in pair))}
        every = dict(state["state"])
        for _, p, shape in _sharded(head):
            number = numbers.get(id(p))
            if number in every:
                every[number] = {key: convert(x, p, shape) for key, x in every[number].items()}
        return {**state, "state": every}

    def save(_, state):
        def convert(x, p, shape):
            of_rows = isinstance(x, Tensor) and x.shape == p.shape
            return shard(x, 0, shape, head.process_group) if of_rows else x

        return change(state, convert)

    def load(_, state):
        def convert(x, p, shape):
            of_rows = isinstance(x, Tensor) and x.shape == shape
            return _own_part(x, shape, head.process_group) if of_rows else x

        return change(state, convert)

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
