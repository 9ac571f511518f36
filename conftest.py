"""What runs before and around all tests, those of benchmarks and examples too."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels run in the interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

# Files in this order before all others: what all else rests on, then the slowest first, for a worker that takes one of
# them last would let the others wait.
FIRST = (
    *("test_contract", "test_triton", "test_cuda", "test_integrations", "test_systems", "test_compilers", "test_build"),
    *("test_model", "test_linear", "test_backends", "test_losses", "test_sharding", "test_site", "test_statistics"),
    *("test_benchmarks", "test_examples", "test_language_model"),
)
pytest.register_assert_rewrite("testing")  # the comparisons of all backends


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
