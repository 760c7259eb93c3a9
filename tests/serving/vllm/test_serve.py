"""`vlmzip serve --engine vllm`: when a process of it is killed, it says so, ends, and leaves no other process.

tests/serving/server/test_vllm_process.py has the other ways to end, with a stand-in for vLLM.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest

from tests.serving.server.running import asking

pytest.importorskip("vllm")

#: More than enough for a machine with other work. vLLM compiles mini's LLM when it starts for the first time.
PATIENCE = 900


@contextmanager
def serving(tmp_path):
    """Yield the process, a client, and the file with stderr, as soon as requests can be answered."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-m", "vlmzip.cli.main", "serve", "--engine", "vllm", "--keep", "36"]
    address, log = f"127.0.0.1:{free_port()}", tmp_path / "stderr.txt"
    with log.open("w") as stderr, httpx.Client(base_url=f"http://{address}", timeout=PATIENCE) as client:
        command += ["--dtype", "float32", "--port", address.rpartition(":")[2]]
        server = subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            wait_until(lambda: server.poll() is not None or is_healthy(client))
            assert server.poll() is None, log.read_text()
            yield server, client, log
        finally:
            server.kill()
            server.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def is_healthy(client):
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(happened):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def descendants(number):
    """Return the running processes that a process has started, as names by number."""
    command = ["ps", "-ww", "-eo", "pid=,ppid=,stat=,args="]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in listing.splitlines()]
    found = {str(number): ""}
    for _ in rows:
        found |= {pid: args for pid, parent, state, args in rows if parent in found and state[0] != "Z"}
    del found[str(number)]
    return {int(pid): args for pid, args in found.items()}


def is_running(number):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True).stdout
    return state.strip()[:1] not in ("", "Z")


def assert_gone(numbers):
    wait_until(lambda: not any(map(is_running, numbers)))


def begun_stream(client):
    """Start a long answer as a stream."""
    body = asking(stream=True, max_tokens=800, ignore_eos=True)
    return client.stream("POST", "/v1/chat/completions", json=body)


def test_a_killed_engine_is_named_and_requests_get_an_error(tmp_path):
    """A client that stalls within its request does not hold the server up."""
    with serving(tmp_path) as (server, client, log), socket.socket() as stalled:
        processes = descendants(server.pid)
        (engine,) = [number for number, name in processes.items() if "EngineCore" in name]
        stalled.connect((client.base_url.host, client.base_url.port))
        stalled.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        with begun_stream(client) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            os.kill(engine, signal.SIGKILL)
            rest = list(lines)
        assert any('"error"' in line for line in rest), rest
        assert server.wait(timeout=PATIENCE) == 1
        assert last_line(log).startswith("vlmzip: the engine has stopped: vLLM's server ended with exit code 0;")
        assert_gone(processes)


def test_a_killed_server_is_named_and_leaves_no_engine(tmp_path):
    with serving(tmp_path) as (server, _, log):
        processes = descendants(server.pid)
        (api_server,) = [number for number, name in processes.items() if "vllm_child" in name]
        os.kill(api_server, signal.SIGKILL)
        assert server.wait(timeout=PATIENCE) == 1
        assert last_line(log).startswith("vlmzip: the engine has stopped: vLLM's server was ended by signal 9;")
        assert_gone(processes)


def last_line(log):
    return log.read_text().splitlines()[-1]


def test_no_process_of_vllm_outlives_vlmzip_serve(tmp_path):
    with serving(tmp_path) as (server, _, _):
        processes = descendants(server.pid)
        assert any("EngineCore" in name for name in processes.values())
        server.kill()
        assert_gone(processes)


def test_sigterm_lets_a_begun_answer_end(tmp_path):
    with serving(tmp_path) as (server, client, _):
        processes = descendants(server.pid)
        with begun_stream(client) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            server.terminate()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert any('"finish_reason":"length"' in line for line in rest)
        assert server.wait(timeout=PATIENCE) == 0
        assert_gone(processes)
