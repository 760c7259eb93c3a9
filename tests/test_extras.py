"""Every extra installs something, `make test-extras` uses it, and constraints.txt fits most extras at once."""

import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.extras import USES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_extra_installs_something_and_is_tried():
    extras = PROJECT["optional-dependencies"]
    assert set(USES) == {"base", *extras}
    assert all(extras.values())


#: Extras that need other versions than the tests do. CONTRIBUTING.md says how each is tried.
APART = {"lmms", "playground", "vllm"}


def test_constraints_fit_the_extras():
    """One installation can have all extras that are not apart. What installed packages require counts, too."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"]
    needs = {f"vlmzip[{extra}]": extras[extra] for extra in extras.keys() - APART}
    needs["vlmzip"] = PROJECT["dependencies"]
    needs |= {package.name: package.requires or [] for package in distributions() if package.name != "vlmzip"}
    misfits = [
        f"{package} needs {text}, and constraints.txt has {version}"
        for package, texts in needs.items()
        for text in texts
        if (version := misfit(text, pins)) is not None
    ]
    assert not misfits


def misfit(text, pins):
    """Return the pinned version of a required package if the requirement does not accept it."""
    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    version = pins.get(canonicalize_name(requirement.name))
    return None if version is None or requirement.specifier.contains(version, prereleases=True) else version
