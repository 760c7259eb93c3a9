"""Run the command `vllm` in a child process, whose processes are killed when the process that started it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import uvicorn

from vlmzip.serving.server.vllm_process import CLOSING


def end_with_stdin() -> None:
    """Kill this process and all others of its group as soon as stdin closes. The process must lead its group."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def limit_closing() -> None:
    """Let the server end although a client keeps a connection open. vLLM itself would wait for that client."""

    class Config(uvicorn.Config):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{"timeout_graceful_shutdown": CLOSING} | settings)

    uvicorn.Config = Config  # type: ignore[misc]


if __name__ == "__main__":
    end_with_stdin()
    limit_closing()
    from vllm.entrypoints.cli.main import main  # slow, and the process that started this one may have ended by then

    sys.argv[0] = "vllm"
    sys.exit(main())
