"""Contract under test: the files that packagers, citations and forges read say the same as the code."""

import re

import pytest

import topk_fast
from testing import ROOT

FIELDS = ("version", "date-released", "license")  # of CITATION.cff


def text_of(name):
    return (ROOT / name).read_text()


def test_all_files_name_the_same_version():
    released = re.search(r"^## (\S+) \((\S+)\)$", text_of("CHANGELOG.md"), re.MULTILINE)
    cited = {name: re.search(rf'^{name}: "?([^"\n]+)', text_of("CITATION.cff"), re.MULTILINE)[1] for name in FIELDS}
    assert released.groups() == (topk_fast.__version__, cited["date-released"])
    assert cited["version"] == topk_fast.__version__ and cited["license"] in text_of("pyproject.toml")


def names_of(requirements):
    return {re.match(r"[\w-]+", one)[0].lower() for one in requirements}


def test_requirements_pin_what_pyproject_names():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no parser of TOML in its library")
    project = tomllib.loads(text_of("pyproject.toml"))
    groups = [project["project"]["dependencies"], project["build-system"]["requires"]]
    groups += project["dependency-groups"].values()
    pins = [line for line in text_of("requirements.txt").splitlines() if not line.startswith("#")]
    assert all(re.match(r"[\w-]+==[\d.]+(;|$)", pin) for pin in pins)
    assert names_of(pins) == set().union(*map(names_of, groups))


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflows_run_targets_that_there_are(workflow):
    """Their schema is checked by make lint; the commands that no machine can run here install or publish."""
    commands = re.findall(r"^ +- run: (.+)$", workflow.read_text(), re.MULTILINE)
    reused = re.findall(r"uses: \./(\S+)", workflow.read_text())
    assert commands and all((ROOT / path).exists() for path in reused)
    for command in commands:
        program, target = command.split()[:2]
        assert program in ("make", "sudo", "gh")
        assert program != "make" or re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE), command


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.name)
def test_forms_for_issues_ask_for_the_build(form):
    assert re.search(r'`python -c "import topk_fast; print\(.*topk_fast.build_info\(\)\)"`', form.read_text())
