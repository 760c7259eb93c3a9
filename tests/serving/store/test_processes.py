"""Stores of killed runs, of two runs at once, and of several processes of which one is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.serving.store.stores import contents, write_images
from vlmzip.cli.main import main
from vlmzip.serving.store import Store

pytestmark = pytest.mark.slow  # starts processes

COUNT = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "whole"
    assert main(command(images, store)) == 0
    return contents(store)


def command(images, store, *more):
    return ["encode", str(images), "--out", str(store), "--shard", "2", "--batch", "2", *more]


def start(images, store, *more):
    """Start a run in another process, in a session of its own so that it can be killed with all it started."""
    return subprocess.Popen(
        [sys.executable, "-m", "vlmzip.cli.main", *command(images, store, *more)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, seconds=120):
    """Wait until the condition holds, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return value


def shards(store):
    return len(list((store / "shards").glob("0*")))


@pytest.mark.parametrize("count", [1, 12])
def test_a_killed_run_continues_to_the_same_bytes(images, whole, tmp_path, count):
    store = tmp_path / "store"
    run = start(images, store)
    wait_for(lambda: shards(store) >= count)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert count <= shards(store) <= COUNT // 2
    assert main(command(images, store)) == 0
    assert contents(store) == whole


def test_of_two_runs_the_second_is_refused(images, whole, tmp_path):
    store = tmp_path / "store"
    run = start(images, store)
    wait_for(lambda: shards(store) >= 1)
    os.killpg(run.pid, signal.SIGSTOP)
    try:
        second = subprocess.run(
            [sys.executable, "-m", "vlmzip.cli.main", *command(images, store)], capture_output=True, text=True
        )
    finally:
        os.killpg(run.pid, signal.SIGCONT)
    assert second.returncode == 2
    assert second.stderr == f"vlmzip: another run is writing {str(store)!r}; wait for it, or give another --out\n"
    assert run.wait(60) == 0
    assert contents(store) == whole


def test_a_worker_is_killed_and_the_store_is_the_same(images, whole, tmp_path):
    pytest.importorskip("ray")
    store = tmp_path / "store"
    run = start(images, store, "--workers", "2")
    wait_for(lambda: shards(store) >= 3)
    killed = wait_for(lambda: workers_below(run.pid))[0]
    os.kill(killed, signal.SIGKILL)
    done = shards(store)
    output, notes = run.communicate(timeout=240)
    assert run.returncode == 0, notes
    assert done < COUNT // 2, "the worker was killed when all was done"
    assert output.startswith(f"{COUNT} images encoded with visionzip")
    assert contents(store) == whole
    assert len(Store(store)) == COUNT


def workers_below(parent: int) -> list[int]:
    """Return the processes below `parent` that encode parts."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            if b"ray::MapWorker" in (folder / "cmdline").read_bytes() and parent in above(pid):
                found.append(pid)
    return sorted(found)


def above(pid: int) -> list[int]:
    """Return the processes that a process descends from."""
    pids = []
    while pid > 1:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pid = int(fields[1])
        pids.append(pid)
    return pids
