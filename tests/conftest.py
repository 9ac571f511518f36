"""What all tests share. Where there is no GPU, Triton's kernels run in its interpreter, on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

pytest.register_assert_rewrite("cases")  # the comparisons of all backends

from topk_fast import available_backends  # noqa: E402

# What tests of all backends run on: the fast ones. Triton has test_triton.py, for its interpreter takes a second a row.
BACKENDS = [name for name in available_backends("cpu") if name != "triton"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
