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
