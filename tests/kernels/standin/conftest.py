"""What checks under the stand-in share: its notes of calls, copies of tensors to its devices, and torch's kernels."""

import ctypes
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only


class Calls:
    """The calls that the stand-in notes, each a dict, from the last look at them on."""

    def __init__(self, path):
        self._file = open(path)
        self.take()

    def take(self, *whats):
        """What came since the last look; where names are given, calls of these."""
        lines = (dict(field.split("=", 1) for field in line.rstrip("\n").split("\t")) for line in self._file)
        found = [{k: int(v) if v.lstrip("-").isdigit() else v for k, v in line.items()} for line in lines]
        return [call for call in found if not whats or call["what"] in whats]

    def launches(self):
        return self.take("launch")


@pytest.fixture
def calls():
    return Calls(os.environ["STANDIN_LOG"])


def in_memory(x):
    """A device tensor's elements as a CPU tensor: the stand-in's memory is the host's."""
    size = x.untyped_storage().nbytes()
    if not size:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * size).from_address(x.untyped_storage().data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


class HostKernels(TorchDispatchMode):
    """Runs torch's own operations on the stand-in's memory by torch's CPU kernels; topk_fast's run as they are."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "topk_fast":
            with self:  # for the operations of torch inside of it
                return function._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
        if function.is_view:
            return function(*args, **kwargs)
        device = kwargs.get("device")
        originals = {}

        def to_host(x):
            nonlocal device
            if isinstance(x, torch.device):
                return torch.device("cpu")
            if not isinstance(x, torch.Tensor) or not x.is_cuda:
                return x
            device = device or x.device
            host = in_memory(x)
            originals[id(host)] = host, x
            return host

        def to_device(x):
            if id(x) in originals:
                return originals[id(x)][1]
            if device is None or torch.device(device).type == "cpu":
                return x
            out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            in_memory(out).copy_(x)
            return out

        return tree_map_only(torch.Tensor, to_device, function(*tree_map(to_host, args), **tree_map(to_host, kwargs)))


@pytest.fixture
def host_kernels():
    return HostKernels
