"""Example questions whose answers compression has changed, with drawings of the visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from vlmzip.lab.records import Record
from vlmzip.lab.results import Result
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.task import Sample, Task
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.report import compact
from vlmzip.visualize.views import fates_of_views, plain_views, seen_views

GAP = 6
"""Pixels between an image and its tokens."""


@dataclass(frozen=True)
class Example:
    """A question, answered without and with compression."""

    sample: Sample
    plain: Record
    compressed: Record
    image: Image.Image
    """The image, with a drawing of the kept, merged and dropped tokens next to it."""
    tokens: str
    """Visual tokens by LLM layer, in short form."""

    @property
    def kind(self) -> str:
        """Return whether compression lost the answer ("lost"), gained it, or only changed it."""
        gain = self.compressed["score"] - self.plain["score"]
        return "lost" if gain < 0 else "gained" if gain > 0 else "changed"


def examples(study: Study, task: Task, plain: Result, result: Result, most: int, seed: int) -> list[Example]:
    """Return up to `most` randomly chosen changed answers. Their questions are asked again to get the token maps."""
    chosen = np.random.default_rng(seed).permutation(result.changed)[:most]
    compressor = result.configuration.compressor
    if compressor is None or not len(chosen):
        return []
    compressed = study.attach(compressor)
    try:
        changed = []
        for place in sorted(chosen):
            sample = task.samples[place]
            image, counts = _drawn(study, compressed, sample)
            changed.append(Example(sample, plain.records[place], result.records[place], image, compact(counts)))
        return changed
    finally:
        compressed.detach()


def _drawn(study: Study, compressed: CompressedModel, sample: Sample) -> tuple[Image.Image, Sequence[int]]:
    image = sample.load()
    inputs = study.answerer.inputs([image], [sample.question])
    with torch.inference_mode():
        compressed.generate(**inputs, max_new_tokens=1, do_sample=False)
    (report,) = compressed.report.images
    (views,) = seen_views(study.family, study.processor.image_processor, inputs, [report], [[image]])
    return _side_by_side(plain_views(views, report), fates_of_views(views, report)), report.by_layer


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + GAP + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP, 0))
    return both
