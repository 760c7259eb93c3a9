"""A server that is killed can be started again at once, on the same port."""

import subprocess
import sys
from contextlib import ExitStack

import httpx
import pytest

from tests.serving.server.running import asking


@pytest.mark.slow  # it starts two servers
def test_a_killed_server_leaves_no_process_and_its_port_is_free():
    port = "0"
    with ExitStack() as stack:  # connections stay open, and hold the port until their clients close them
        for _ in range(2):
            command = [sys.executable, "-m", "vlmzip.cli.main", "serve", "--engine", "hf", "--no-playground"]
            server = subprocess.Popen([*command, "--port", port], stdout=subprocess.PIPE, text=True)
            stack.enter_context(server)
            stack.callback(server.kill)
            address = server.stdout.readline().split()[-1].removesuffix("/v1")
            client = stack.enter_context(httpx.Client(base_url=address, timeout=60))
            answer = client.post("/v1/chat/completions", json=asking()).json()
            assert answer["choices"][0]["message"]["content"] == "orange"
            port = address.rpartition(":")[2]
            listing = ["ps", "-o", "pid=", "--ppid", str(server.pid)]
            assert subprocess.run(listing, capture_output=True, text=True).stdout == ""
            server.kill()
            server.wait()
