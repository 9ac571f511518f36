"""What runs before and around all tests, those of benchmarks and examples too."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels run in the interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

pytest.register_assert_rewrite("testing")  # the comparisons of all backends


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
