"""Processes that a launcher started; what several of them agree on is tested where they run, in tests/lab."""

import sys

import pytest
from torch import distributed

from vlmzip.errors import UserError
from vlmzip.processes import Processes, leave_group


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


def test_leaving_the_group_closes_it_once(tmp_path):
    leave_group()  # no group: nothing to do
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    leave_group()
    assert not distributed.is_initialized()
    leave_group()


def test_the_train_command_leaves_the_group_when_the_process_ends(tmp_path, monkeypatch):
    """Not at the end of a run: a later run in the same process needs the group."""
    from vlmzip.cli import train

    at_exit, groups = [], []
    monkeypatch.setattr(train.atexit, "register", at_exit.append)
    monkeypatch.setattr("vlmzip.training.run.train", lambda *_: groups.append(len(at_exit)))
    monkeypatch.setattr("vlmzip.training.run.try_out", lambda _: None)
    train._train(train.Config(model="mini", records="records.json", images=".", out=str(tmp_path / "out")))
    assert at_exit.count(leave_group) == 1
    assert groups == [len(at_exit)]  # before the run, so that it counts after an error, too
