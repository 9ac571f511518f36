"""Every example of the README and of the docstrings runs and prints what it says; tables and plots are made from the
results.
"""

import doctest
import importlib
import re
import socket

import pytest

import topk_fast
from benchmarks import tables
from benchmarks.committed import digest
from testing import ROOT
from topk_fast import backends, clipping, functional, heads, linear, nn, noise


@pytest.mark.parametrize(
    "module", [topk_fast, backends, clipping, functional, heads, linear, nn, noise], ids=lambda m: m.__name__
)
def test_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
)
def test_python_blocks_run(page, monkeypatch):
    """With the variables of a world of one, which torchrun sets; test_integrations.py has two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    for name, value in (variables | {"GLOO_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, str(value))
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), names)


def test_tables_are_made_from_the_committed_results():
    shown = []
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert tables.filled(page) == text, f"{page} is stale: make tables"
        shown += [mark[0] for mark in tables.MARK.findall(text)]
    assert sorted(shown) == sorted(tables.TABLES)


def test_plots_are_made_from_the_committed_results(tmp_path):
    plots = importlib.import_module("benchmarks.plots")
    pages = " ".join((ROOT / page).read_text() for page in tables.PAGES)
    for name, (_, results, _) in plots.PLOTS.items():
        committed = (ROOT / "docs" / "img" / f"{name}.svg").read_text()
        assert f"results {digest(*results)}" in committed, f"{name}.svg is stale: make tables"
        assert f"img/{name}.svg" in pages
        plots.draw(name, tmp_path / f"{name}.svg")
        labels = (
            set(re.findall(r"<text[^>]*>([^<]+)</text>", t))
            for t in (committed, (tmp_path / f"{name}.svg").read_text())
        )
        assert len(set(map(frozenset, labels))) == 1, name
