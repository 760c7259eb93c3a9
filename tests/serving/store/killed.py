"""`python -m tests.serving.store.killed COUNT STORE COMMAND…`: run vlmzip, and kill it by SIGKILL at a known moment.

The moment is the one before the change number COUNT, from 0, of the files of a store. A change moves a finished file to
its name, removes a file, or removes a folder.
"""

import os
import signal
import sys
from pathlib import Path

from vlmzip.cli.main import main

#: The events with which Python announces changes.
CHANGES = ("os.rename", "os.remove", "os.rmdir")


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


if __name__ == "__main__":
    kill_before(int(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
