"""Read tasks from the values of `--tasks` and `--task`."""

from __future__ import annotations

from dataclasses import replace

from vlmzip.errors import UserError, closest
from vlmzip.files import is_there
from vlmzip.lab.tasks import easy_vqa, mini
from vlmzip.lab.tasks.folder import calibration_on, folder_task
from vlmzip.lab.tasks.metrics import METRICS
from vlmzip.lab.tasks.task import Task


def read_tasks(text: str, limit: int | None, calibrate_on: str | None) -> list[Task]:
    """Return the tasks of a comma-separated list. Raise `UserError` for an unknown task or one that cannot be read."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UserError("--tasks names no task; separate them with commas: --tasks mini,easy-vqa")
    return [read_task(name, limit, calibrate_on) for name in names]


def read_one_task(text: str, limit: int | None, calibrate_on: str | None) -> Task:
    """Return the task of a command that takes one task only. Raise `UserError` for a list of several tasks, too."""
    folder = text.rpartition(":")[0] or text
    if not text.strip() or ("," in text and not is_there(folder)):
        raise UserError(f"--task takes exactly one task, got {text!r}")
    return read_task(text.strip(), limit, calibrate_on)


def read_task(text: str, limit: int | None, calibrate_on: str | None) -> Task:
    """Return a task by name. Raise `UserError` for an unknown task or one that cannot be read."""
    name, _, suffix = text.rpartition(":") if ":" in text else (text, "", "")
    if name == mini.NAME and not suffix:
        return _calibrated_on(mini.mini_task(limit), calibrate_on)
    if name == easy_vqa.NAME:
        relation = suffix or "transfer"
        if relation not in easy_vqa.RELATIONS:
            raise UserError(f"unknown task {text!r}{closest(relation, easy_vqa.RELATIONS)}")
        return _calibrated_on(easy_vqa.easy_vqa_task(limit, relation), calibrate_on)
    if not is_there(name):
        known = (mini.NAME, easy_vqa.NAME)
        raise UserError(f"unknown task or folder {name!r}{closest(name, known)}, FOLDER:METRIC")
    if suffix and suffix not in METRICS:
        raise UserError(f"unknown metric {suffix!r}{closest(suffix, METRICS)}")
    if not suffix:
        raise UserError(
            f"{name!r} needs a metric after a colon, such as {name}:exact; choose one of {', '.join(METRICS)}"
        )
    return folder_task(name, suffix, limit, calibrate_on)


def _calibrated_on(task: Task, folder: str | None) -> Task:
    """Return the task, with the images of `folder` as its calibration set if a folder is given."""
    return task if folder is None else replace(task, calibration=calibration_on(folder, []))
