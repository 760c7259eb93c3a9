"""Every extra installs something, and `make test-extras` uses it."""

import tomllib
from pathlib import Path

from tests.extras import USES

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_every_extra_installs_something_and_is_tried():
    extras = PROJECT["optional-dependencies"]
    assert set(USES) == {"base", *extras}
    assert all(extras.values())
