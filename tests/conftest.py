"""Shapes and types in signatures are executed: a wrong one fails the test that runs the code."""

import gc
import json
import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.shapes import check_signatures

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
    "runtime.in_llm",
    "runtime.flops",
    "runtime.token_profile",
    "lab.bench",
    "serving.store.image",
    "visualize",
]
check_signatures(CHECKED)

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.families import FAMILIES, tiny_llava  # noqa: E402
from vlmzip import UserError  # noqa: E402


@pytest.fixture(scope="session")
def llava():
    """A LLaVA with random weights: 36 visual tokens, 4 LLM layers with grouped-query attention."""
    return tiny_llava()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A tiny model of each family, with inputs; tests of a file share it, so what changes it takes `fresh`."""
    return FAMILIES[request.param]()


@pytest.fixture
def fresh(family):
    """The family with a model of its own."""
    return type(family)()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- which tests are slow, and which process runs them -----------------------------------------------------------


def family_of(item):
    """Return the name of the family that a test runs over, or None."""
    name = item.callspec.params.get("family") if hasattr(item, "callspec") else None
    return name if name in FAMILIES else None


def tiers_of(item):
    """Return the markers of a test that say which runs leave it out.

    Quick runs have `every_family` tests of all families, and the others of families that lead. Of a `crossed` test they
    have all cases in the family with `every_case`, and the cases that the marker names in the others. What they leave
    out is `further`. It is `exhaustive` if two reasons come together: the family does not lead, the case is not named,
    the test is slow anyway.
    """
    reasons = ["marked"] * len(list(item.iter_markers("further")))
    name = family_of(item)
    if name is not None:
        facts = vars(FAMILIES[name])  # without those that it inherits
        crossed = item.get_closest_marker("crossed")
        few = {} if crossed is None or facts.get("every_case") else crossed.kwargs
        if any(item.callspec.params.get(argument, cases[0]) not in cases for argument, cases in few.items()):
            reasons.append("case")
        if not facts.get("leads") and (reasons or not item.get_closest_marker("every_family")):
            reasons.append("family")
    is_exhaustive = len(reasons) + bool(reasons and item.get_closest_marker("slow")) > 1
    return ["further", "slow"] * bool(reasons) + ["exhaustive"] * is_exhaustive


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Let slow files begin first, so that parallel processes end together; the order within a file stays.

    Files that start processes or compile take minutes with a few tests. Further tests are quick, but many.
    """
    for item in items:
        for tier in tiers_of(item):
            item.add_marker(tier)
    further = {item.path for item in items if item.get_closest_marker("further")}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow - further, item.path not in slow, -count[item.path]))


def pytest_collection_finish():
    """Spare the garbage collector the objects of imports and collection, which live until the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of one file and one family run in one process, in their order: they share models."""
    from xdist.scheduler import LoadScopeScheduling

    class FileAndFamily(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path, _, rest = nodeid.partition("::")
            words = set(rest.rpartition("[")[2].rstrip("]").split("-"))
            return f"{path} {' '.join(words & FAMILIES.keys())}"

    return FileAndFamily(config, log)


# --- docs/support.md: which promise holds in which family; docs/_make/support.py makes the table -----------------


def pytest_addoption(parser):
    parser.addoption(
        "--support-cells", metavar="FILE", help="write what the `promise` tests found, for docs/_make/support.py"
    )


def pytest_configure(config):
    config.support = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Note the cell that a test proves: "works" or "refused", or what the test itself recorded as its `cell`."""
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
