"""torch's own kernels for the stand-in's devices; as a plugin of pytest (-p host_kernels) around every test."""

import ctypes

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only


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
        if not any(isinstance(x, torch.Tensor) and x.is_cuda for x in tree_leaves((args, kwargs))):
            if torch.device(kwargs.get("device") or "cpu").type == "cpu":
                return function(*args, **kwargs)
        with self:  # for the operations of torch inside of these
            if function.namespace == "topk_fast":
                return function._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
            if function._can_decompose():
                return function.decompose(*args, **kwargs)
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


@pytest.fixture(autouse=True)
def torch_on_the_host(request):
    """Not for the checks in this folder, most of which look at torch's launches too; they ask for `HostKernels`."""
    if request.path.parent.name == "standin":
        yield
        return
    with HostKernels():
        yield
