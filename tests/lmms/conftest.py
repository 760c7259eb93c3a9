"""lmms-eval is in an environment of its own (`make test-lmms`); elsewhere these tests are skipped."""

import os
import tempfile
from importlib.util import find_spec

import pytest

if find_spec("lmms_eval"):  # what tasks are converted to must not stay in the user's cache
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vlmzip-lmms-")
    os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder with the task `mini_exact`: the first 24 questions, on 4 images."""
    from tests.lmms.mini_as_task import write_task

    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, 24)
    return folder
