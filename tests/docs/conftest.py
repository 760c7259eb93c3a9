import importlib.util
from pathlib import Path

import pytest

MAKERS = Path(__file__).parents[2] / "docs" / "_make"


@pytest.fixture
def maker(monkeypatch):
    """Return a function that imports a script of docs/_make afresh."""

    monkeypatch.syspath_prepend(MAKERS)  # scripts import their neighbours

    def load(name):
        spec = importlib.util.spec_from_file_location(f"make_{name}", MAKERS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
