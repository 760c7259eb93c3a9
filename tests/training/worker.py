"""One process of a launch in `test_processes.py`: it trains one configuration after another and records what it sees.

It writes a line to OUT/seen-RANK.jsonl for each training forward and for each batch of answers. In the run whose
questions are divided among the processes, the questions replace the answers. The processes of a run that takes longer
than `PATIENCE` seconds are waiting for each other; they end with their tracebacks.
"""

import faulthandler
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from torch.distributed.tensor import DTensor

from vlmzip import spec
from vlmzip.cli.main import main
from vlmzip.lab import score
from vlmzip.runtime.answering import Answerer
from vlmzip.training.trainer import StagedTrainer

PATIENCE = 120
BATCH = score.BATCH
#: Questions per batch in the run whose questions are divided among the processes.
DIVIDED = 2


def note(out, **seen):
    with (Path(out) / f"seen-{os.environ['RANK']}.jsonl").open("a") as file:
        file.write(json.dumps(seen) + "\n")


def watched_step(self, model, inputs, num_items_in_batch=None, plain=StagedTrainer.training_step):
    step, rows = self.state.global_step, (inputs["labels"] != -100).any(1).tolist()
    loss = plain(self, model, inputs, num_items_in_batch)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in self.compressed.parameters())
    report = self.compressed.report
    seen = {"kept": sum(sum(one.by_layer) for one in report.images), "padding": int((report.source < 0).sum())}
    seen |= {"of": sum(one.before * len(one.by_layer) for one in report.images), "positions": report.source.numel()}
    seen |= {"compressor": spec.write(self.compressed.compressor), "held": held, "blank": not all(rows)}
    note(self.args.output_dir, step=step, **seen)
    return loss


def watched_answer(self, compressed, images, questions, *more, plain=Answerer.answer):
    answers = plain(self, compressed, images, questions, *more)
    if score.BATCH == DIVIDED:  # makes some answers correct
        answers = [replace(answer, text=question) for answer, question in zip(answers, questions, strict=True)]
    note(os.environ["OUT"], answers=[answer.text for answer in answers])
    return answers


if __name__ == "__main__":
    StagedTrainer.training_step, Answerer.answer = watched_step, watched_answer
    for config in sys.argv[1:]:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        os.environ["OUT"] = json.loads(Path(config).read_text())["out"]
        score.BATCH = DIVIDED if os.environ["OUT"].endswith("evaluated-ddp") else BATCH
        if main(["train", config]) != 0:
            sys.exit(1)
