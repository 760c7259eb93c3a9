"""Tiny subjects for analyses: a model with random weights and ten questions about three images of noise."""

import logging

from tests.families import FAMILIES
from tests.lab.test_tasks import question, write
from vlmzip.lab.analyses.subject import Subject
from vlmzip.lab.tasks.catalogue import read_task
from vlmzip.processes import Processes

#: Of each image; questions about one have one level and several types.
LEVELS = {"a.png": "plain", "b.png": "rich", "c.png": "plain"}


def make_subject(folder, family=None, questions=10, batch=4):
    """A subject whose answers and figures go into folder/out."""
    names = list(LEVELS)
    lines = [question(names[n % 3], question=f"w{n + 4}") for n in range(questions)]
    task = read_task(write(folder / "asked", *lines) + ":exact", None, None)
    for number, sample in enumerate(task.samples):
        level = LEVELS[sample.image.rpartition("/")[2]]
        sample.groups.update(level=level, type="even" if number % 2 == 0 else "odd")
    family = family or FAMILIES["llava"]()
    return Subject(family.model, family.processor(), "tiny", task, folder / "out", batch, 0, Processes())


class Lines(logging.Handler):
    """The lines that the lab logs within a `with` block."""

    def __enter__(self):
        self.lines, self.logger = [], logging.getLogger("vlmzip.lab")
        self.before = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self.lines

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __exit__(self, *_):
        self.logger.setLevel(self.before)
        self.logger.removeHandler(self)
