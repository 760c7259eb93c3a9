"""The folder of a training run: whose it is, how far it has come, and what is kept when something goes wrong."""

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
from typing import Any

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

#: What the run was asked to do; a folder without it is none of ours.
ASKED = "run.json"
#: The folder of the trained model, in the folder of the run.
MODEL = "model"
#: Settings that may differ when a run goes on: they do not change what is learned, but for what is drawn by lot.
FREE = {
    "out", "log_every", "save_every", "checkpoints", "workers", "evaluation", "gradient_checkpointing", "sharding",
    "batch_per_process", "text_tokens", "max_left_out",
}  # fmt: skip
#: Settings that name files and folders, which can be written in many ways.
PLACES = {"model", "records", "images"}
#: What may differ when a run goes on, but is told: a run of days has to survive an upgrade.
TOLD = ("code of vlmzip", "torch", "transformers")
#: What an `OSError` has for its reason where the disk, and nothing else, refuses.
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO}
#: Seconds that the workers of a run that was killed may take to end.
PATIENCE = 8
ERRNO = re.compile(r"\[Errno (\d+)\]")
#: In the message of `torch.save` where the disk refuses.
WRITING = "inline_container"


@dataclass(frozen=True)
class RunFolder:
    """What a run found in its folder when it began."""

    checkpoint: Path | None
    """The last whole one, to go on from."""
    model: Path
    finished: bool
    notes: tuple[str, ...] = ()
    """What may have changed since the run began, and does not keep it from going on."""
    hold: BaseFileLock | None = None
    """Keeps other runs out, as long as it lives; the first process alone has it."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "hold": None}  # what other processes are told

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
        """Looks at the folder and, where the run is a new one, makes it ready.

        `records` are the usable ones of the file, `bad` those known to be none, `sources` the digests of what it learns
        from. Raises `UserError` where another run is at work, where the run there was asked for something else or
        learned from something else, where files lie that are not a run's of ours (nothing of those is touched), or
        where the disk refuses.
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
            raise UserError(f"out: {str(theirs[0])!r} is of something else; give another folder")
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
    """`hold`, for which a run that was killed may leave us waiting: its workers end some seconds after it."""
    for _ in range(PATIENCE):
        with contextlib.suppress(UserError):
            return hold(out)
        time.sleep(1)
    return hold(out)


def _written(config: Config) -> dict[str, object]:
    """The settings as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _read(path: Path) -> dict[str, object] | None:
    if not path.exists():
        return None
    found = read_json(path, "give another out")
    if not isinstance(found, dict) or not {"vlmzip", "model", "records"} <= found.keys():
        raise UserError(f"out: {str(path)!r} is of something else; give another folder")
    return found


def _refuse_changes(out: Path, before: dict[str, object], asked: dict[str, object]) -> None:
    # A setting that an older version did not have is none that was changed.
    compared = [name for name in asked if name in before and name not in FREE and name not in TOLD]
    changed = [name for name in compared if _plain(name, before[name]) != _plain(name, asked[name])]
    if changed:
        told = ", ".join(f"{name}: {_short(before[name])}, now {_short(asked[name])}" for name in changed[:3])
        raise UserError(
            f"out: the run in {str(out)!r} was begun with other settings ({told}); give another out, or the same ones"
        )


def _plain(name: str, value: object) -> Any:
    return os.path.realpath(value) if name in PLACES and isinstance(value, str) else value


def _notes(before: dict[str, object], asked: dict[str, object]) -> list[str]:
    """Return lines on what is another than when the run began, or may be."""
    changed = [name for name in TOLD if name in asked and name in before and before[name] != asked[name]]
    lines = [
        f"{name} has changed since the run began ({before[name]}, now {asked[name]}); it goes on with what is here"
        for name in changed
    ]
    if missing := [name for name in asked if name not in before]:
        lines.append(f"not compared, for the run was begun by an earlier vlmzip: {', '.join(missing)}")
    return lines


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def goes_on(out: Path) -> str:
    """How to go on after a stop, in a few words."""
    whole = whole_checkpoints(out)
    if not whole:
        return "there is no checkpoint yet; the same command begins anew"
    return f"the same command goes on from {whole[-1]}, the last whole checkpoint"


def fill_whole(folder: Path) -> Path:
    """An empty folder beside `folder`, to be filled and then renamed to it by `take_name`."""
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def take_name(unfinished: Path, folder: Path) -> None:
    """Puts a folder that is whole in the place of what was there; its files are as readable as any new file."""
    for path in unfinished.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def refused_by_disk(error: BaseException) -> str | None:
    """What a full or read-only disk said; it is an OSError only where Python itself was writing."""
    if isinstance(error, OSError) and error.errno in REFUSED:
        return error.strerror or str(error)
    if isinstance(error, OSError) and (told := ERRNO.search(str(error))) and int(told[1]) in REFUSED:
        return os.strerror(int(told[1]))  # from a worker process, with all of its traceback
    if isinstance(error, SafetensorError) and "I/O error" in str(error):
        return str(error).rpartition("I/O error: ")[2]
    if isinstance(error, RuntimeError) and WRITING in str(error):
        return "the optimiser's state could not be written; is the disk full?"
    return None
