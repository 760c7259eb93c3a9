"""Runs one case as the command line would: in a process of its own, forked from one that has everything imported."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

FORK = multiprocessing.get_context("fork")
#: Beyond what the parent has; a case that wants more is a find, not the end of the machine.
MEMORY = 8 << 30
NOTES = ("note: ", "warning: ")


@dataclass
class Case:
    """A command line and a folder of files; a path in the place of bytes is a file elsewhere."""

    arguments: list[str]
    files: dict[str, bytes | Path] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        held = self.files[name]
        return held.read_bytes() if isinstance(held, Path) else held


@dataclass
class Outcome:
    folder: Path
    code: int | None
    """None: it did not end in time."""
    stdout: str
    stderr: str

    @property
    def find(self) -> str:
        """What is wrong with it, in a word; "" for nothing."""
        if self.code is None:
            return "hang"
        if "Traceback (most recent call last)" in self.stderr:
            return "traceback"
        if self.code not in (0, 2):
            return "exit code"
        lines = [line for line in self.stderr.splitlines() if not line.startswith(NOTES)]
        if self.code == 2 and (len(lines) != 1 or not lines[0].startswith("vlmzip: ")):
            return "noise"
        return ""

    @property
    def where(self) -> str:
        """What is alike in finds of one cause."""
        if self.find == "traceback":
            places = re.findall(r'vlmzip/(\S+)", line \d+, in (\S+)', self.stderr)
            error = self.stderr.rstrip().splitlines()[-1].partition(":")[0]
            return f"{error} in {' '.join(places[-1]) if places else 'another package'}"
        return f"code {self.code}: " + re.sub(r"\d+", "N", " ".join(self.stderr.split()))[:60]


@contextmanager
def run(case: Case, limit: float) -> Iterator[Outcome]:
    """The outcome of a case, whose folder lasts as long as the context. `limit` is in seconds."""
    with tempfile.TemporaryDirectory(prefix="vlmzip-fuzz-") as place:
        folder = Path(place) / "case"
        write(case, folder)
        out, err = Path(place) / "out", Path(place) / "err"
        process = FORK.Process(target=_command, args=(case.arguments, folder, out, err))
        process.start()
        process.join(limit)
        late = process.is_alive()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
        process.join()
        said = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
        yield Outcome(folder, None if late else process.exitcode, *said)


def write(case: Case, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


def _command(arguments: list[str], folder: Path, out: Path, err: Path) -> None:
    from vlmzip.cli.main import main

    os.setsid()
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    sys.exit(main(arguments))
