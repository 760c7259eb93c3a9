"""Child processes: results as they come, and an end with the parent however that ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vlmzip.children import ChildFailed, in_child

ENDLESS = """
import os, sys, time
from vlmzip.children import in_child

def work():
    yield os.getpid()
    time.sleep(600)

if __name__ == "__main__":
    for process in in_child(work):
        print(process, flush=True)
"""
LAUNCHED = """
import os, subprocess, sys, time
code = "import time; from vlmzip.children import end_with_launcher; end_with_launcher(); print(1, flush=True)"
os.environ["TORCHELASTIC_RUN_ID"] = "x"
child = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(600)"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def count(numbers):
    yield from range(numbers)


def fail():
    yield 1
    raise RuntimeError("boom")


def die():
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)
    yield 2


def leave():
    yield 1
    os._exit(3)


def work():
    yield os.getpid()
    time.sleep(600)


def test_results_come_in_order():
    assert list(in_child(count, 3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (fail, "failed with RuntimeError: boom"),
        (die, "its process was ended by signal 9, perhaps for lack of memory"),
        (leave, "its process was ended by itself"),
    ],
)
def test_what_came_before_an_end_is_kept(run, why):
    results = in_child(run)
    assert next(results) == 1
    with pytest.raises(ChildFailed, match=why):
        next(results)


def test_a_child_ends_when_its_results_are_no_longer_wanted():
    results = in_child(work)
    process = next(results)
    results.close()
    assert not is_running(process)


@pytest.mark.slow
@pytest.mark.parametrize("code", [ENDLESS, LAUNCHED], ids=["ours", "torchrun's"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_child_outlives_its_parent(tmp_path, code, end):
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.send_signal(end)
    parent.wait()
    for _ in range(200):
        if not is_running(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child is still there")


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return not found.stdout.startswith("Z")
