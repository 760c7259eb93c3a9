"""Run vLLM's server as a child process, say when it ends by itself, and leave none of its processes behind.

`vlmzip serve` becomes `python -m vlmzip.serving.server.vllm_process serve …`, with the arguments of the command `vllm`.
This module imports little, because it stays in memory as long as the server runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread

#: Seconds that answers in progress have to finish after a signal.
GRACE = 30
#: Seconds that open connections have to end after the engine.
CLOSING = 10
#: Seconds that vLLM has to end after a signal. Then it is killed.
PATIENCE = GRACE + CLOSING + 5
#: Seconds to wait for the last line to be written. A full pipe that nobody reads never takes it.
LAST_LINE = 2
#: Exit codes of a server that SIGINT or SIGTERM has ended: that of the signal itself, and that of a handler.
BY_SIGNAL = {code for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number)}


def supervise(command: Sequence[str]) -> int:
    """Run a command until it ends, or until SIGINT or SIGTERM ends it. Return the exit code for `vlmzip serve`.

    The command runs in a new session, so that all of its processes can be killed together. Its stdin is a pipe that
    closes when this process ends, even by SIGKILL.
    """
    stopped = late = False

    def end(*_: object) -> None:
        nonlocal late
        late = True
        _kill(child.pid)

    def stop(*_: object) -> None:
        nonlocal stopped
        child.terminate()
        if not stopped:
            signal.alarm(PATIENCE)
        stopped = True

    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as child:
        signal.signal(signal.SIGALRM, end)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, stop)
        code = child.wait()
        _kill(child.pid)  # what the server left behind, such as its engine
    if late:
        _say(f"vLLM's server did not end within {PATIENCE} seconds and was killed; its last answers are incomplete")
        return 1
    if stopped and code in {0, *BY_SIGNAL}:
        return 0
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    _say(f"the engine has stopped: vLLM's server {how}; read its log above, and start vlmzip serve again")
    return 1


def _say(text: str) -> None:
    """Write a line to stderr, and do not wait long for somebody to read it."""
    line = f"\nvlmzip: {text}\n".encode()  # the log may end within a line
    writing = Thread(target=os.write, args=(2, line), daemon=True)
    writing.start()
    writing.join(LAST_LINE)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(supervise([sys.executable, "-P", "-m", "vlmzip.serving.server.vllm_child", *sys.argv[1:]]))
