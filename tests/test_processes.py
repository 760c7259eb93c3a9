"""Processes that a launcher started; what several of them agree on is tested where they run, in tests/lab."""

import sys

import pytest

from vlmzip.errors import UserError
from vlmzip.processes import Processes


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match="several processes need accelerate: pip install"), Processes():
        pass


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with Processes() as processes:
        assert (processes.first, processes.count) == (True, 1)
        assert processes.from_first(lambda: 3) == 3
        assert processes.together({"a": "b"}) == {"a": "b"}
