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

#: Seconds that begun answers have to end after a signal.
GRACE = 30
#: Seconds that open connections have to end after the engine.
CLOSING = 10
#: Seconds that vLLM has to end after a signal. Then it is killed.
PATIENCE = GRACE + CLOSING + 5


def supervise(command: Sequence[str]) -> int:
    """Run a command until it ends, or until SIGINT or SIGTERM ends it. Return the exit code for `vlmzip serve`.

    The command gets a session of its own, so that all of its processes can be killed together. Its stdin is a pipe that
    closes when this process ends, for whatever reason.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        child.terminate()
        if not stopped:
            signal.alarm(PATIENCE)
        stopped = True

    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as child:
        signal.signal(signal.SIGALRM, lambda *_: _kill(child.pid))
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, stop)
        code = child.wait()
        _kill(child.pid)  # what the server left behind, such as its engine
    if stopped:
        return 0
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    reason = f"the engine has stopped: vLLM's server {how}; read its log above, and start vlmzip serve again"
    print(f"\nvlmzip: {reason}", file=sys.stderr, flush=True)  # the log may end within a line
    return 1


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(supervise([sys.executable, "-m", "vlmzip.serving.server.vllm_child", *sys.argv[1:]]))
