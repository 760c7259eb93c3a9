"""The score of a model on a task during training."""

from __future__ import annotations

import torch

from vlmzip.lab.tasks.task import Task
from vlmzip.processes import Processes
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.facade import CompressedModel
from vlmzip.training.sharding import moves_together

#: Number of questions answered in a batch.
BATCH = 32


class TaskScore:
    """The score of a model on a task. Each process answers its share, and all processes get the same score.

    If parameters are sharded, every process answers all questions, because all processes must run the same number of
    forward passes.
    """

    def __init__(self, answerer: Answerer, task: Task) -> None:
        self.answerer, self.task = answerer, task

    def __call__(self, compressed: CompressedModel) -> dict[str, float]:
        processes = Processes()
        rank, world = (0, 1) if moves_together(compressed) else (processes.rank, processes.count)
        starts = range(0, len(self.task.samples), BATCH)[rank::world]
        total, seen, of = 0.0, 0.0, 0.0
        for start in starts:
            samples = self.task.samples[start : start + BATCH]
            images = [sample.load() for sample in samples]
            answers = self.answerer.answer(
                compressed, images, [sample.question for sample in samples], self.task.max_new_tokens
            )
            total += sum(self.task.metric.score(a.text, s.answers) for a, s in zip(answers, samples, strict=True))
            seen += sum(sum(answer.by_layer) for answer in answers)
            of += sum(answer.visual_tokens * len(answer.by_layer) for answer in answers)
        sums = torch.tensor([total, seen, of], dtype=torch.float64)
        if world > 1:
            sums = sums.to(compressed.device)
            torch.distributed.all_reduce(sums)
        return {
            "score": round(100 * float(sums[0]) / len(self.task.samples), 3),
            "retention": round(float(sums[1] / sums[2]), 4),
        }
