"""Runs of vlmzip that kill themselves by SIGKILL at a known moment: `python -m tests.serving.store.killed`.

Each line of stdin is a JSON list of a number, a store and the words of a command. The answer is a line with the exit
code. A run is killed before the change with this number, from 0, of the files of the store. A change moves a finished
file to its name, removes a file, or removes a folder. Runs are forks of this process, which has imported the slow
modules once.
"""

import json
import os
import signal
import sys
from pathlib import Path

import vlmzip.cli.encode  # noqa: F401
from vlmzip.cli.main import main

#: The events with which Python announces changes.
CHANGES = ("os.rename", "os.remove", "os.rmdir")
#: Seconds after which a run that hangs is ended.
PATIENCE = 300


def kill_before(number: int, store: Path) -> None:
    """Let this process kill itself before a change of the store."""
    left = number

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event not in CHANGES or store not in Path(str(arguments[0])).parents:
            return
        if event == "os.remove" and not os.path.exists(str(arguments[0])):
            return  # a temporary file that has its name already
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.addaudithook(watch)


def run(number: int, store: str, words: list[str]) -> int:
    """Run a command in a fork; return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(PATIENCE)
            os.dup2(2, 1)  # stdout is for exit codes
            kill_before(number, Path(store))
            code = main(words)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
