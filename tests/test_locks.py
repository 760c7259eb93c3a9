"""Locks of folders: one run in each, for as long as it lives."""

import errno
import subprocess
import sys
from contextlib import contextmanager

import pytest

from vlmzip.errors import UserError
from vlmzip.locks import LOCK, hold

HOLDS = """
import sys, time
from pathlib import Path
from vlmzip.locks import hold

held = hold(Path(sys.argv[1]), int(sys.argv[2]))
print("held", flush=True)
time.sleep(120)
"""


@contextmanager
def another_run(folder, process=0):
    """A process that holds a folder until it is killed."""
    command = [sys.executable, "-c", HOLDS, str(folder), str(process)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout.readline() == "held\n"
            yield
        finally:
            run.kill()


def test_a_folder_is_one_runs_until_it_ends(tmp_path):
    with another_run(tmp_path / "out"), pytest.raises(UserError, match=r"another run is writing .*out'; wait for it"):
        hold(tmp_path / "out")
    held, again = hold(tmp_path / "out"), hold(tmp_path / "a" / ".." / "out")  # it was killed
    assert held is again
    del held, again
    with another_run(tmp_path / "out"):  # nobody here has it any more
        pass


def test_each_process_of_a_run_has_a_lock(tmp_path):
    with another_run(tmp_path, process=1):
        first = hold(tmp_path)
        with pytest.raises(UserError, match="another run is writing"):
            hold(tmp_path, 1)
    assert first is not hold(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, f"{LOCK}.1"]


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    with another_run(tmp_path):
        monkeypatch.setattr("vlmzip.locks.FileLock.acquire", refuse)
        assert not hold(tmp_path).is_locked


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        hold(tmp_path / "file" / "out")
