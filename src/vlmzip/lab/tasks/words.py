"""Words of questions that a model has no token for."""

from __future__ import annotations

import logging

from vlmzip.lab.tasks.task import Task
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.prompt_text import unknown_words

log = logging.getLogger(__name__)


def warn_of_unknown_words(loaded: Loaded, task: Task) -> None:
    """Log how many of a task's questions have words that the model has no token for."""
    words = {sample.question: unknown_words(loaded.processor, sample.question) for sample in task.samples}
    strange = [sample.question for sample in task.samples if words[sample.question]]
    if strange:
        log.warning(
            f"{len(strange):,} of {len(task.samples):,} questions of {task.name} have words that {loaded.name}"
            f" does not know, such as {words[strange[0]][0]!r}"
        )
