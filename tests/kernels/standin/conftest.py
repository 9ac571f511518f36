"""What checks under the stand-in share: its notes of calls, noise on a device, and torch's kernels."""

import os

import pytest
import torch

from topk_fast import noise
from topk_fast.request import Noise


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


@pytest.fixture
def host_kernels():
    from host_kernels import HostKernels  # whose folder is on the path only where there is a stand-in

    return HostKernels


@pytest.fixture
def noise_on():
    """Makes a request for noise whose seed lies on a device."""

    def make(device, *ranks, n_sample=5, law=noise.NORMAL, dense=False):
        return Noise(torch.tensor(5).to(device), ranks, 1.0, None, n_sample, law, dense)

    return make
