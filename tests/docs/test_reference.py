"""The reference: docstrings and pages name everything that users call and every message that they may see; links and
pictures are right.
"""

import ast
import inspect
import os
import re
import subprocess
import sys

import pytest

import topk_fast
from testing import ROOT
from topk_fast import functional

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PUBLIC = {name: getattr(topk_fast, name) for name in topk_fast.__all__ if name != "functional"} | {
    name: getattr(functional, name) for name in functional.__all__
}
CALLABLE = [name for name, value in PUBLIC.items() if callable(value)]


def test_the_api_pages_have_all_public_names_and_no_others():
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md")).replace("\\_", "_")
    entry = r"^## (\S+)\n\n```\{eval-rst\}\n\.\. (?:auto\w+|py:data):: (\S+)$"
    shown = re.findall(entry, pages, re.MULTILINE)
    modules = {name: "topk_fast.functional" if name in functional.__all__ else "topk_fast" for name in PUBLIC}
    assert dict(shown) == {name: f"{module}.{name}" for name, module in modules.items()} and len(shown) == len(PUBLIC)
    index = (DOCS / "api" / "index.md").read_text()
    assert all(f"[`{name}`](" in index for name in PUBLIC)


def sections_of(docstring):
    """The text under each heading of a docstring, such as Args."""
    parts = re.split(r"^(\w+):\n(?=    )", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def described(docstring):
    """The parameters that a docstring describes."""
    names = re.findall(r"^    (\w+(?:, \w+)*):", sections_of(docstring).get("Args", ""), re.MULTILINE)
    return [name for line in names for name in line.split(", ")]


@pytest.mark.parametrize("name", CALLABLE)
def test_docstrings_describe_each_parameter_once(name):
    assert sorted(described(PUBLIC[name].__doc__)) == sorted(inspect.signature(PUBLIC[name]).parameters)


METHODS = ["forward", "topk", "logits", "register_optimizer"]


@pytest.mark.parametrize("name", METHODS)
def test_docstrings_of_the_head_describe_each_parameter_once(name):
    method = getattr(topk_fast.LinearHead, name)
    assert ["self", *described(method.__doc__)] == list(inspect.signature(method).parameters)


@pytest.mark.parametrize("name", CALLABLE)
def test_docstrings_are_complete(name):
    """A formula, an executed example, errors, results and sources; the two functions about backends compute nothing."""
    text, is_function = PUBLIC[name].__doc__, inspect.isfunction(PUBLIC[name])
    sections = sections_of(text)
    assert ">>> " in sections["Example"]
    if name in ("available_backends", "build_info"):
        assert "Returns" in sections
        return
    assert ".. math::" in text
    assert "Raises" in sections or name == "NormedLinear"  # which has torch.nn.Linear's errors
    assert not is_function or "Returns" in sections
    assert not is_function or "References" in sections or name in ("linear_topk", "clip_grad_norm_")


def skeleton(node):
    """The text of an expression, with … in place of all that is not constant."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(skeleton, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return skeleton(node.left) + skeleton(node.right)
    return "…"


def texts_of(function):
    """The texts that a function of backends.py returns, which say why a backend does not run."""
    for node in ast.walk(function):
        if isinstance(node, ast.Return):
            branch = node.value.orelse if isinstance(node.value, ast.IfExp) else node.value
            yield skeleton(branch.elts[0] if isinstance(branch, ast.Tuple) else branch)


def messages_of(path):
    """What a file raises, warns of and prints to users."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from map(skeleton, node.exc.args)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("_warn_once", "warn", "print"):
            yield from map(skeleton, node.args)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("_why"):
            yield from texts_of(node)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("_ABSENT['triton']", "said"):
            values = node.value.values if isinstance(node.value, ast.BoolOp) else [node.value]
            yield from map(skeleton, values)


SOURCES = [path for folder in ("topk_fast", "triton_kernels") for path in sorted((ROOT / folder).glob("*.py"))]
SOURCES += [ROOT / "setup.py", ROOT / "find_cuda.py"]
MESSAGES = sorted({text for path in SOURCES for text in messages_of(path) if text.strip("…")})


@pytest.fixture(scope="module")
def patterns():
    """The messages of troubleshooting.md, as patterns: … stands for any text."""
    rows = re.findall(r"^\| (`+)(.+?) ?\1 \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    return {text: re.compile(re.escape(text).replace("…", ".*"), re.DOTALL) for _, text in rows}


def test_messages_are_found():
    """The collection is not blind: it sees each way in which the package says something."""
    assert len(MESSAGES) > 100
    assert {"link must be … or …, got …", "takes up to … classes", "target out of bounds"} <= {*MESSAGES}
    assert any(text.startswith("There are kernels for CPU") for text in MESSAGES)
    assert any(text.startswith("backend='auto' runs the PyTorch reference") for text in MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_troubleshooting_has_every_message(message, patterns):
    assert any(pattern.fullmatch(message) for pattern in patterns.values())


def test_troubleshooting_has_no_other_messages(patterns):
    """Each row is a message of Python, or a text of the C++ sources; a pattern has words of its own."""
    cpp = " ".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.[hc]*")))
    for text, pattern in patterns.items():
        assert len(re.findall(r"[a-z]{2,}", text)) >= 2, text
        longest = max(text.split("…"), key=len)
        assert any(pattern.fullmatch(message) for message in MESSAGES) or longest in cpp, text


def anchors(page):
    """The anchors that a renderer gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.replace("\\", "").lower()).replace(" ", "-") for h in headings}


COMMUNITY = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CODE_OF_CONDUCT", "CONTRIBUTING", "SECURITY")]


@pytest.mark.parametrize("page", [*COMMUNITY, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("http") or link.startswith("img/"):
            continue
        file, _, anchor = link.partition("#")
        to = (page.parent / file).resolve() if file else page
        assert to.exists(), link
        assert not anchor or anchor in anchors(to), link


def test_pictures_are_what_the_script_draws(tmp_path):
    """The committed pictures but for the last digits of coordinates, each small and shown on a page."""
    subprocess.run(
        [sys.executable, DOCS / "pictures.py", tmp_path], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    number = re.compile(r"-?\d+\.\d+")
    drawn = sorted(tmp_path.glob("*.svg"))
    assert drawn
    for picture in drawn:
        new, old = picture.read_text(), (DOCS / "img" / picture.name).read_text()
        assert number.sub("", new) == number.sub("", old), picture.name
        pairs = zip(number.findall(new), number.findall(old), strict=True)
        assert all(abs(float(a) - float(b)) < 1e-3 for a, b in pairs), picture.name
        assert len(old) < 150_000, picture.name
        assert f"](img/{picture.name})" in (DOCS / "algorithm.md").read_text(), picture.name
