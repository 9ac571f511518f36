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
        if x.shape == shape and x.device_mesh.size() == group.size() and x.placements == (tensors.Shard(0),):
            return x.to_local()
        x = x.full_tensor()
    if x.shape != shape:  # on all ranks: that of a rank's own rows would fit one of them
        raise RuntimeError(f"size mismatch: a head of {list(shape)} over all ranks cannot load {list(x.shape)}")
    first, n_local = own_slice(shape[0], group)
    return x.narrow(0, first, n_local).clone()  # a view would keep all classes in memory


def _rows_of(head) -> list[tuple[str, Parameter, torch.Size]]:
    """The parameters of a head, with their names and their shapes over the classes of all ranks."""
    rows = head.named_parameters(recurse=False)
    return [(name, own, torch.Size((head.n_classes, *own.shape[1:]))) for name, own in rows]


def _sharded(head) -> list[tuple[str, Parameter, torch.Size]]:
    return [] if head.process_group is None else _rows_of(head)


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
    """Makes an optimizer's state_dict hold, and take, the state of a head's rows as the head's own does its rows.

    Plain numbers of that state, as SparseAdam's step is, become tensors in it: torch.distributed.checkpoint would lose
    them.
    """

    def change(state, convert):
        groups = zip(optimizer.param_groups, state["param_groups"])
        numbers = {id(ours): i for pair in groups for ours, i in zip(*(group["params"] for group in pair))}
        every = dict(state["state"])
        for _, p, shape in _rows_of(head):
            number = numbers.get(id(p))
            if number in every:
                every[number] = {key: convert(x, key, p, shape) for key, x in every[number].items()}
        return {**state, "state": every}

    def save(_, state):
        def convert(x, key, p, shape):
            if isinstance(x, (int, float)):
                return torch.tensor(x, dtype=torch.float64)
            if head.process_group is None or not isinstance(x, Tensor) or not x.dim():
                return x
            if x.shape != p.shape:
                raise RuntimeError(
                    f"register_optimizer takes optimizers whose state of a parameter has its shape, got {key} of shape "
                    f"{list(x.shape)} of {type(optimizer).__name__}"
                )
            return shard(x, 0, shape, head.process_group)

        return change(state, convert)

    def load(_, state):
        def convert(x, key, p, shape):
            if isinstance(own := optimizer.state.get(p, {}).get(key), (int, float)) and isinstance(x, Tensor):
                return type(own)(x.item())
            of_rows = head.process_group is not None and isinstance(x, Tensor) and x.dim()
            return _own_part(x, shape, head.process_group) if of_rows else x

        return change(state, convert)

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
