"""Answer a question with one method, and count what it costs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.errors import counted
from vlmzip.processor import InputDict
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.flops import prefill_flops
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.report import ImageReport, Report, compact
from vlmzip.runtime.saving import saved_weights
from vlmzip.runtime.videos import Clip
from vlmzip.serving.playground.question import Asked
from vlmzip.serving.server.errors import RequestError
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.worker import HuggingFaceEngine
from vlmzip.visualize.frames import first_frames
from vlmzip.visualize.sheet import fates_panel, plain_panel
from vlmzip.visualize.views import fates_of_views, plain_views, seen_views

#: Tokens of an answer at most.
LONGEST_ANSWER = 64
#: Runs of a method at most, of which the median is shown. There is no further run after these milliseconds.
MOST_RUNS, BRIEF = 3, 1000
#: The parts of the time, in the order of the data's path.
PARTS = ("vision encoder", "selection", "LLM")


@dataclass(frozen=True)
class Answer:
    """An answer of the model under one method."""

    method: str
    """The method with its settings, as a spec."""
    text: str
    before: int
    """Visual tokens without compression."""
    by_layer: Sequence[int]
    """Visual tokens at each layer of the LLM."""
    fates: str
    """How many tokens were kept, merged and dropped."""
    flops: int
    """Floating-point operations of the prefill."""
    milliseconds: dict[str, float]
    images: Sequence[Image.Image]
    """The image, or each frame of the clip, with what became of its tokens."""

    @property
    def average(self) -> float:
        """Return the visual tokens, averaged over the layers of the LLM."""
        return sum(self.by_layer) / len(self.by_layer)

    @property
    def layers(self) -> str:
        """Return the tokens by layer as short text; "" if all layers see equally many."""
        return "" if len(set(self.by_layer)) == 1 else compact(self.by_layer)


class Answerer:
    """Answers with the engine's model, in the engine's thread, between the batches of other requests."""

    def __init__(self, engine: HuggingFaceEngine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._warm: set[str] = set()

    def answer(self, asked: Asked, compressor: Compressor) -> Answer:
        """Return the answer under a method. Raise `UserError` or `RequestError` if there is none."""
        seconds = self._settings.max_seconds
        length = min(LONGEST_ANSWER, self._settings.max_new_tokens)
        new = compressor.name() not in self._warm
        loaded = self._engine.loaded
        future = self._engine.call(partial(_answer, loaded, asked.inputs, compressor, length, seconds, warm_up=new))
        try:
            run = future.result(seconds)
        except TimeoutError:
            future.cancel()
            raise RequestError(f"not answered within {counted(seconds, 'second')}", 504) from None
        except CancelledError:
            raise RequestError("the engine has stopped", 503) from None
        except (torch.OutOfMemoryError, MemoryError):
            raise RequestError("the memory is full; give a smaller image or a smaller budget", 503) from None
        self._warm.add(compressor.name())
        report = run.report
        text_tokens = asked.inputs["input_ids"].shape[1] - report.before
        return Answer(
            method=spec.write(report.compressor),
            text=run.text,
            before=report.before,
            by_layer=report.by_layer,
            fates=_fates(report),
            flops=prefill_flops(loaded.family, [text_tokens + count for count in report.by_layer]),
            milliseconds=run.milliseconds,
            images=self._drawn(asked, report),
        )

    def _drawn(self, asked: Asked, report: Report) -> list[Image.Image]:
        plain = report.compressor.changes_nothing
        if isinstance(asked.visual, Clip):
            frames = [frame for image in report.images for frame in image.frames]
            seen = first_frames(asked.visual, len(frames))
            if plain:
                return [plain_panel(image, frame.grid) for image, frame in zip(seen, frames, strict=True)]
            return [
                fates_panel(image, frame.token_map, frame.grid, frame.prefix)
                for image, frame in zip(seen, frames, strict=True)
            ]
        processor = self._engine.loaded.processor.image_processor
        views = seen_views(asked.family, processor, asked.inputs, report.images, [[asked.visual]])
        draw = plain_views if plain else fates_of_views
        return [draw(of_image, image) for of_image, image in zip(views, report.images, strict=True)]


@dataclass(frozen=True)
class Run:
    """One run of the model."""

    text: str
    milliseconds: dict[str, float]
    report: Report

    @property
    def total(self) -> float:
        return sum(self.milliseconds.values())


def _answer(
    loaded: Loaded, inputs: InputDict, compressor: Compressor, length: int, seconds: float, *, warm_up: bool
) -> Run:
    """Return the run of median time. It works in the thread of the model.

    `warm_up` runs the method once before, so that one-time work does not count as its time.
    """
    device, dtype = loaded.model.device, loaded.model.dtype
    moved: InputDict = {name: _moved(value, device, dtype) for name, value in inputs.items()}
    weights = saved_weights(compressor, loaded.name)
    runs: list[Run] = []
    with torch.inference_mode(), attach(loaded.model, compressor, weights=weights) as compressed:
        if warm_up:
            compressed.generate(**moved, max_new_tokens=1, do_sample=False)
        while len(runs) < MOST_RUNS and sum(run.total for run in runs) < BRIEF:
            runs.append(_run(loaded, compressed, moved, length, seconds))
    return sorted(runs, key=lambda run: run.total)[len(runs) // 2]


def _run(loaded: Loaded, compressed: CompressedModel, inputs: InputDict, length: int, seconds: float) -> Run:
    start = _now(loaded.model.device)
    out = compressed.generate(**inputs, max_new_tokens=length, do_sample=False, max_time=seconds)
    total = 1000 * (_now(loaded.model.device) - start)
    report = compressed.report
    parts = report.milliseconds
    spent = [parts["encoder"], parts["selection"]]
    spent.append(total - sum(spent) - parts.get("bookkeeping", 0.0))
    text = loaded.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return Run(text, dict(zip(PARTS, spent, strict=True)), report)


def _moved(value: object, device: torch.device, dtype: torch.dtype) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _now(device: torch.device) -> float:
    """Return the time in seconds, after all work that was sent to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _fates(report: Report) -> str:
    """Return how many tokens of the grids were kept, merged and dropped."""
    if report.compressor.changes_nothing:
        return ""
    counts = [_counts(image) for image in report.images]
    if None in counts:
        return "each token comes from the whole image"
    kept, merged, into, dropped, prefix = (sum(part) for part in zip(*filter(None, counts), strict=True))
    counted = {
        f"{kept:,} kept": kept,
        "CLS kept" if prefix == 1 else f"{prefix:,} CLS tokens kept": prefix,
        f"{merged:,} merged into {into:,}": merged,
        f"{dropped:,} dropped": dropped,
    }
    return ", ".join(text for text, count in counted.items() if count)


def _counts(image: ImageReport) -> tuple[int, int, int, int, int] | None:
    """Return the tokens of an image that were kept, merged, left of those that were merged, and dropped.

    These are the tokens on its grids. The last number is that of output tokens from the prefixes of views (CLS) alone.
    """
    if image.token_map is None:
        return None
    layout, group = image.layout, image.token_map.group[0].tolist()
    sizes = Counter(g for start, end in pairwise(layout.starts) for g in group[start + layout.prefix : end])
    dropped = sizes.pop(-1, 0)
    merged = [size for size in sizes.values() if size > 1]
    prefix = len(set(group) - {-1}) - len(sizes)
    return len(sizes) - len(merged), sum(merged), len(merged), dropped, prefix
