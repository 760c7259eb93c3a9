"""The folder of a training run: its settings, its checkpoints and its lock."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock
from safetensors import SafetensorError

from vlmzip.errors import UserError
from vlmzip.files import write_text
from vlmzip.json_text import read_json
from vlmzip.locks import hold
from vlmzip.training.batches import BAD, note_bad
from vlmzip.training.config import Config
from vlmzip.training.trainer import LOG, remove_torn_checkpoints, whole_checkpoints
from vlmzip.version import __version__

#: The settings of the run; a folder without this file is not the folder of a run.
ASKED = "run.json"
#: The folder of the trained model, in the folder of the run.
MODEL = "model"
#: Settings that may differ when a run is resumed: apart from random choices, they do not change what is learned.
FREE = {
    "out", "log_every", "save_every", "checkpoints", "workers", "evaluation", "gradient_checkpointing", "sharding",
    "batch_per_process", "text_tokens", "max_left_out",
}  # fmt: skip
#: Settings that name files and folders, which can be written in many ways.
PLACES = {"model", "records", "images"}
#: Versions that may differ when a run is resumed, with a note: a run of several days must survive an upgrade.
TOLD = ("code of vlmzip", "torch", "transformers")
#: Error numbers of an `OSError` if the disk refuses to write.
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO}
#: Seconds that the worker processes of a killed run may take to end.
PATIENCE = 8
ERRNO = re.compile(r"\[Errno (\d+)\]")
#: Part of the error message of `torch.save` if the disk refuses to write.
WRITING = "inline_container"


@dataclass(frozen=True)
class RunFolder:
    """The state of a run's folder when the run starts."""

    checkpoint: Path | None
    """The last complete checkpoint, to resume from."""
    model: Path
    """The folder of the trained model."""
    finished: bool
    """Whether the trained model is saved already."""
    notes: tuple[str, ...] = ()
    """Lines about changes since the run began that do not prevent resuming it."""
    hold: BaseFileLock | None = None
    """The lock that keeps other runs out. Only the first process has it."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "hold": None}  # a lock cannot be sent to other processes

    @classmethod
    def begin(
        cls,
        out: Path,
        config: Config,
        records: int,
        steps: int,
        bad: Sequence[tuple[int, str]],
        sources: Mapping[str, str] | None = None,
    ) -> RunFolder:
        """Read the folder of a run, or prepare it for a new run.

        `records` is the number of usable records in the file, `bad` lists the invalid ones, and `sources` has the
        digests of everything that the run learns from. Raise `UserError` if another run is using the folder, if its
        run has other settings or sources, if it has files that are not from a run (they are not touched), or if the
        disk refuses to write.
        """
        counts = {"usable records": records, "steps in all": steps}
        try:
            return cls._begin(out, {**_written(config), **counts, **(sources or {})}, bad)
        except OSError as error:
            raise UserError(f"out: cannot write into {str(out)!r}: {error.strerror or error}") from None

    @classmethod
    def _begin(cls, out: Path, asked: dict[str, object], bad: Sequence[tuple[int, str]]) -> RunFolder:
        holding, model = _hold(out), out / MODEL
        before = _read(out / ASKED)
        theirs = [out / name for name in (MODEL, LOG, BAD) if (out / name).exists()] + list(out.glob("checkpoint-*"))
        if before is None and theirs:
            raise UserError(f"out: {str(theirs[0])!r} is not from a training run; give another folder")
        checkpoint, notes = next(reversed(whole_checkpoints(out)), None), []
        if before is not None and (checkpoint is not None or model.exists()):
            _refuse_changes(out, before, asked)
            notes = _notes(before, asked)
        remove_torn_checkpoints(out)
        if checkpoint is not None or model.exists():
            return cls(checkpoint, model, model.exists(), tuple(notes), holding)
        for name in (BAD, LOG):
            (out / name).unlink(missing_ok=True)
        write_text(out / ASKED, json.dumps({"vlmzip": __version__, **asked}, indent=1) + "\n")
        if bad:
            note_bad(out / BAD, bad)
        return cls(None, model, finished=False, hold=holding)


def _hold(out: Path) -> BaseFileLock:
    """Lock the folder. Retry for some seconds, because the workers of a killed run end a little later than the run."""
    for _ in range(PATIENCE):
        with contextlib.suppress(UserError):
            return hold(out)
        time.sleep(1)
    return hold(out)


def _written(config: Config) -> dict[str, object]:
    """Return the settings as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _read(path: Path) -> dict[str, object] | None:
    if not path.exists():
        return None
    settings = read_json(path, "give another out")
    if not isinstance(settings, dict) or not {"vlmzip", "model", "records"} <= settings.keys():
        raise UserError(f"out: {str(path)!r} is not from a training run; give another folder")
    return settings


def _refuse_changes(out: Path, before: dict[str, object], asked: dict[str, object]) -> None:
    # Settings that the older version did not have are not compared.
    compared = [name for name in asked if name in before and name not in FREE and name not in TOLD]
    changed = [name for name in compared if _plain(name, before[name]) != _plain(name, asked[name])]
    if changed:
        changes = ", ".join(f"{name}: {_short(before[name])}, now {_short(asked[name])}" for name in changed[:3])
        raise UserError(
            f"out: the run in {str(out)!r} was begun with other settings ({changes});"
            " give another out, or the same settings"
        )


def _plain(name: str, value: object) -> object:
    return os.path.realpath(value) if name in PLACES and isinstance(value, str) else value


def _notes(before: dict[str, object], asked: dict[str, object]) -> list[str]:
    """Return lines about what has changed, or may have changed, since the run began."""
    changed = [name for name in TOLD if name in asked and name in before and before[name] != asked[name]]
    lines = [
        f"{name} has changed since the run began ({before[name]}, now {asked[name]}); the run continues with the new"
        " one"
        for name in changed
    ]
    if missing := [name for name in asked if name not in before]:
        lines.append(f"not compared, because an earlier vlmzip began the run: {', '.join(missing)}")
    return lines


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def how_to_resume(out: Path) -> str:
    """Return a short text that says how to resume the run after a stop."""
    whole = whole_checkpoints(out)
    if not whole:
        return "there is no checkpoint yet; run the same command again to start over"
    return f"run the same command again to resume from {whole[-1]}, the last complete checkpoint"


def fill_whole(folder: Path) -> Path:
    """Make an empty folder beside `folder`. Fill it and then rename it to `folder` with `take_name`."""
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def take_name(unfinished: Path, folder: Path) -> None:
    """Replace `folder` with a completely written folder, and give its files the usual read permissions."""
    for path in unfinished.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def refused_by_disk(error: BaseException) -> str | None:
    """Return why the disk refused to write, or `None` for any other error. Libraries raise other types than OSError."""
    if isinstance(error, OSError) and error.errno in REFUSED:
        return error.strerror or str(error)
    if isinstance(error, OSError) and (number := ERRNO.search(str(error))) and int(number[1]) in REFUSED:
        return os.strerror(int(number[1]))  # from a worker process, whose message contains its traceback
    if isinstance(error, SafetensorError) and "I/O error" in str(error):
        return str(error).rpartition("I/O error: ")[2]
    if isinstance(error, RuntimeError) and WRITING in str(error):
        return "the optimiser's state could not be written; is the disk full?"
    return None
