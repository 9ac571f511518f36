"""Every example of the README and of the docstrings runs and prints what it says; tables and plots are made from the results."""

import doctest
import re
from pathlib import Path

import pytest

import topk_fast
from topk_fast import functional, linear, nn, noise, ops

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("module", [topk_fast, functional, linear, nn, noise, ops], ids=lambda m: m.__name__)
def test_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_python_blocks_run(page):
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), names)


def test_public_functions_name_raises_and_example():
    for name in functional.__all__:
        text = getattr(functional, name).__doc__
        assert all(part in text for part in ("Args:", "Returns:", "Raises:", "Example:")), name
