"""Every example of the README and of the docstrings runs and prints what it says; the README's table is the result's."""

import doctest
import json
import re
import runpy
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


@pytest.mark.parametrize("script, result", [("cpu.py", "cpu.json"), ("linear.py", "linear_cpu.json")])
def test_tables_are_made_from_the_committed_results(monkeypatch, script, result):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / script))
    report = json.loads((ROOT / "benchmarks" / "results" / result).read_text())
    assert benchmark["table"](report) in (ROOT / "README.md").read_text()


def test_public_functions_name_raises_and_example():
    for name in functional.__all__:
        text = getattr(functional, name).__doc__
        assert all(part in text for part in ("Args:", "Returns:", "Raises:", "Example:")), name
