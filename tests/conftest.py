"""Shapes and types in signatures are executed: a wrong one fails the test that runs the code."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

CHECKED = [
    "visual_tokens",
    "token_map",
    "methods",
    "models",
    "runtime.prepare",
    "runtime.report",
    "runtime.pixels",
    "runtime.resample",
    "runtime.detail",
    "runtime.turns",
    "measure",
    "visualize",
]
install_import_hook([f"vlmzip.{name}" for name in CHECKED], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.tiny import IMAGE_TOKEN, tiny_llava  # noqa: E402


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


# --- docs/support.md: which promise holds in which family, written by the tests that prove it -----------------------


def pytest_addoption(parser):
    parser.addoption("--support-table", metavar="FILE", help="write what the `promise` tests found as a table")


def pytest_configure(config):
    config.support = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    promise = item.get_closest_marker("promise")
    if promise is None or (report.when != "call" and not report.failed):
        return
    cell = item.config.support.setdefault(promise.args[0], {}).setdefault(item.callspec.params["family"], [])
    cell.append("fails" if not report.passed else "refused" if promise.kwargs.get("refused") else "works")


def pytest_sessionfinish(session):
    path = session.config.getoption("--support-table")
    if path:
        write_support_table(path, session.config.support)


def write_support_table(path, support):
    import transformers

    families = list(dict.fromkeys(family for row in support.values() for family in row))
    worst = {"works": 0, "refused": 1, "fails": 2}
    lines = [
        "# What works",
        "",
        "Written by `make support` from a run of `tests/runtime/test_promises.py`, whose tests prove each cell on",
        f"tiny models with random weights (torch {torch.__version__}, transformers {transformers.__version__}, CPU).",
        "*refused*: a `UserError` says in one sentence why not and what to do.",
        "",
        "| | " + " | ".join(families) + " |",
        "| --- " * (len(families) + 1) + "|",
    ]
    for promise, row in support.items():
        cells = [max(row[family], key=worst.get) if family in row else "" for family in families]
        lines.append(f"| {promise} | " + " | ".join(cells) + " |")
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")
