"""What the repository offers to contributors: CI, forms, hooks and rules."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from vlmzip.version import __version__

ROOT = Path(__file__).parents[1]
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
TEXTS = [ROOT / "SECURITY.md", ROOT / "CODE_OF_CONDUCT.md", *(ROOT / ".github").rglob("*.*")]


def read(*names):
    return (ROOT.joinpath(*names)).read_text(encoding="utf-8")


def test_the_workflow_runs_what_ci_runs():
    (target,) = re.findall(r"^make (.+)$", read(".ci", "run"), flags=re.M)
    (parts,) = re.findall(rf"^{target}: (.+?) ##", read("Makefile"), flags=re.M)
    job = yaml.safe_load(read(".github", "workflows", "ci.yml"))["jobs"]["check"]
    assert job["steps"][-1]["run"] == "make ${{ matrix.part }}"
    assert sorted(" ".join(job["strategy"]["matrix"]["part"]).split()) == sorted(parts.split())
    python = next(step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert f">={python}" == tomllib.loads(read("pyproject.toml"))["project"]["requires-python"]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_as_github_reads_them(form):
    content = yaml.safe_load(form.read_text())
    assert content.keys() == {"name", "description", "labels", "body"}
    ids = [field["id"] for field in content["body"]]
    assert len(ids) == len(set(ids))
    for field in content["body"]:
        assert field["type"] in ("checkboxes", "dropdown", "input", "textarea")
        assert field["attributes"]["label"]
        options = field["attributes"].get("options", [])
        assert bool(options) == (field["type"] in ("checkboxes", "dropdown"))
        assert all(isinstance(option, str) for option in options) or field["type"] == "checkboxes"  # `no` is a boolean
    assert any(field.get("validations", {}).get("required") for field in content["body"])


def test_there_is_a_form_for_each_kind_of_issue():
    assert {path.stem for path in FORMS} == {"bug", "family", "method"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_are_of_the_project(path):
    text, urls = path.read_text(encoding="utf-8"), tomllib.loads(read("pyproject.toml"))["project"]["urls"]
    home = re.match(r"https://github\.com/[^/]+/[^/]+", urls["Documentation"])[0]
    assert [url for url in re.findall(r"https://github\.com[^\s)>]*", text) if not url.startswith(f"{home}/")] == []
    assert not re.search(r"[\w.]+@[\w-]+\.\w+", text), "an address that nobody reads"
    links = [link.removeprefix("../blob/main/") for link in re.findall(r"\]\(([\w/.]+)\)", text)]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_hooks_run_the_tools_of_make():
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config"], cwd=ROOT, check=True)
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    for hook in repository["hooks"]:
        assert f"\t{hook['entry'].replace('.venv/bin', '$(BIN)')}" in read("Makefile")


def test_the_citation_names_this_version():
    assert str(yaml.safe_load(read("CITATION.cff"))["version"]) == __version__
