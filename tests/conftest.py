"""Shapes and types in signatures are executed: a wrong one fails the test that runs the code."""

import json
import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

CHECKED = [
    "visual_tokens",
    "token_map",
    "methods",
    "models",
    "runtime.compress",
    "runtime.inputs",
    "runtime.prompt",
    "runtime.stages",
    "runtime.report",
    "runtime.resample",
    "runtime.detail",
    "runtime.conversation",
    "runtime.generation",
    "measure",
    "visualize",
]
install_import_hook([f"vlmzip.{name}" for name in CHECKED], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.tiny import IMAGE_TOKEN, tiny_llava  # noqa: E402
from vlmzip import UserError  # noqa: E402


@pytest.fixture(scope="session")
def llava():
    """A LLaVA with random weights: 36 visual tokens, 4 LLM layers with grouped-query attention."""
    return tiny_llava()


@pytest.fixture
def image_token():
    return IMAGE_TOKEN


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- docs/support.md: which promise holds in which family; docs/_make/support.py makes the table -----------------


def pytest_addoption(parser):
    parser.addoption(
        "--support-cells", metavar="FILE", help="write what the `promise` tests found, for docs/_make/support.py"
    )


def pytest_collection_modifyitems(items):
    """What takes longest begins first, so that parallel processes end together; tests of a file stay in its order."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -count[item.path]))


def pytest_configure(config):
    config.support = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Notes the cell that a test proves: "works" or "refused", or what the test itself recorded as its `cell`."""
    report = (yield).get_result()
    promise = item.get_closest_marker("promise")
    if promise is None or (report.when != "call" and report.passed):
        return
    found = "refused" if promise.kwargs.get("refused") else "works"
    if report.skipped:  # an expected failure too
        found = "refused" if call.excinfo.errisinstance(UserError) else "not run"
    else:
        found = "fails" if report.failed else dict(item.user_properties).get("cell", found)
    cells = item.config.support.setdefault(promise.args[0], {})
    cells.setdefault(item.callspec.params["family"], []).append(found)


def pytest_sessionfinish(session):
    path = session.config.getoption("--support-cells")
    if path:
        import transformers

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        Path(path).write_text(json.dumps({**versions, "cells": session.config.support}, indent=1))
