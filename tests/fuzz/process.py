"""Run one case like the command line, in a process that is forked from one with everything imported."""

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
#: Bytes of memory that a case may take in addition to its parent's. A case that needs more is a find.
MEMORY = 8 << 30
NOTES = ("note: ", "warning: ")


@dataclass
class Case:
    """A command line and the files of its folder; a path instead of bytes becomes a link to that file."""

    arguments: list[str]
    files: dict[str, bytes | Path] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        content = self.files[name]
        return content.read_bytes() if isinstance(content, Path) else content


@dataclass
class Outcome:
    """The outcome of a case."""

    folder: Path
    code: int | None
    """The exit code; None if the case did not end in time."""
    stdout: str
    stderr: str

    @property
    def find(self) -> str:
        """Return the kind of failure in a word or two; empty if there is none."""
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
        """Return the place or message of the failure, which is the same for finds of one cause."""
        if self.find == "traceback":
            places = re.findall(r'vlmzip/(\S+)", line \d+, in (\S+)', self.stderr)
            error = self.stderr.rstrip().splitlines()[-1].partition(":")[0]
            return f"{error} in {' '.join(places[-1]) if places else 'another package'}"
        return f"code {self.code}: " + re.sub(r"\d+", "N", " ".join(self.stderr.split()))[:60]


@contextmanager
def run(case: Case, limit: float) -> Iterator[Outcome]:
    """Run a case for at most `limit` seconds and yield its outcome, whose folder lasts as long as the context."""
    with tempfile.TemporaryDirectory(prefix="vlmzip-fuzz-") as place:
        folder = Path(place) / "case"
        write(case, folder)
        out, err = Path(place) / "out", Path(place) / "err"
        process = FORK.Process(target=_command, args=(case.arguments, folder, out, err))
        process.start()
        process.join(limit)
        late = process.is_alive()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and all processes that it has started
        process.join()
        outputs = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
        yield Outcome(folder, None if late else process.exitcode, *outputs)


def write(case: Case, folder: Path) -> None:
    """Write the files of a case into a new folder."""
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
    inherited = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (inherited + MEMORY, inherited + MEMORY))
    sys.exit(main(arguments))
