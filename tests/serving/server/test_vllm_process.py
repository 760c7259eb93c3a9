"""The process that starts vLLM's server: it says when the server ends, and no process of the server outlives it.

A stand-in is the server, so that these tests need no vLLM. tests/serving/vllm/test_serve.py does the same with vLLM.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

from vlmzip.serving.server import vllm_process

#: Starts an engine, which ignores SIGTERM, prints the numbers of both processes, and then does what it is told.
SERVER = """
import os, subprocess, sys, time
from vlmzip.serving.server.vllm_child import end_with_stdin
end_with_stdin()
engine = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
engine = subprocess.Popen([sys.executable, "-c", engine], stdout=subprocess.PIPE)
engine.stdout.readline()
print(os.getpid(), engine.pid, flush=True)
"""
WAITS = "time.sleep(600)"
IGNORES = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
FAILS = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(flush=True); time.sleep(600)"
SUPERVISOR = """
import sys
from vlmzip.serving.server import vllm_process
vllm_process.PATIENCE = 1
sys.exit(vllm_process.supervise([sys.executable, "-c", sys.argv[1]]))
"""


@contextmanager
def supervised(then):
    """Yield the supervisor, and the numbers of the server's process and its engine's."""
    command = [sys.executable, "-c", SUPERVISOR, SERVER + then]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as supervisor:
        numbers = [int(word) for word in supervisor.stdout.readline().split()]
        try:
            yield supervisor, *numbers
        finally:
            supervisor.kill()
            for number in numbers:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


def assert_ended(*numbers):
    """Assert that processes end, soon after what started them."""
    deadline = time.monotonic() + 30
    while alive := [number for number in numbers if is_alive(number)]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.05)


def is_alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    # A zombie has ended. Its parent has not read the exit code yet.
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True).stdout
    return not state.startswith("Z") and state != ""


@pytest.mark.parametrize(
    ("then", "how"),
    [
        ("os.kill(os.getpid(), 9)", "was ended by signal 9"),
        ("sys.exit(0)", "ended with exit code 0"),
        ("sys.exit(3)", "ended with exit code 3"),
    ],
)
def test_a_server_that_ends_by_itself_is_named_and_leaves_no_engine(then, how):
    with supervised(then) as (supervisor, server, engine):
        _, err = supervisor.communicate(timeout=30)
        assert supervisor.returncode == 1
        line = "\nvlmzip: the engine has stopped: vLLM's server HOW; read its log above, and start vlmzip serve again\n"
        assert err == line.replace("HOW", how)
        assert_ended(server, engine)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_well(number):
    with supervised(WAITS) as (supervisor, server, engine):
        supervisor.send_signal(number)
        _, err = supervisor.communicate(timeout=30)
        assert (supervisor.returncode, err) == (0, "")
        assert_ended(server, engine)


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (IGNORES, "did not end within 1 seconds and was killed"),
        (FAILS, "ended with exit code 7"),
    ],
)
def test_a_server_that_does_not_end_well_after_a_signal_is_named(then, said):
    with supervised(then) as (supervisor, server, engine):
        supervisor.stdout.readline()
        supervisor.send_signal(signal.SIGTERM)
        _, err = supervisor.communicate(timeout=30)
        assert supervisor.returncode == 1
        assert said in err
        assert_ended(server, engine)


def test_a_stderr_that_nobody_reads_delays_the_end_by_seconds():
    fill = "try:\n    while True: os.write(2, b'x' * 65536)\nexcept BlockingIOError: pass\n"
    then = f"os.set_blocking(2, False)\n{fill}os.set_blocking(2, True); os.kill(os.getpid(), 9)"
    with supervised(then) as (supervisor, server, engine):
        assert supervisor.wait(timeout=30) == 1
        assert_ended(server, engine)


def test_no_process_of_the_server_outlives_a_killed_supervisor():
    with supervised(WAITS) as (supervisor, server, engine):
        assert is_alive(server)
        assert is_alive(engine)
        supervisor.kill()
        assert_ended(server, engine)


def test_the_process_that_waits_for_vllm_stays_small():
    """It imports neither torch nor vLLM, whose memory would be held as long as the server runs."""
    code = f"import sys, {vllm_process.__name__}; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "vllm", "numpy"} & set(modules)
