"""Answer requests of one kind in one batch, each with its own sampling, length, stop texts and stream.

The batch runs through the façade's `generate`, so it is answered as everywhere in vlmzip. transformers' `generate`
keeps all rows until the last one has ended: a row that has ended is sent at once, but its place in the batch is filled
with padding until then, and waiting requests join the next batch only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vlmzip.processor import Processor
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.fitting import inside_the_llm
from vlmzip.runtime.report import Report
from vlmzip.serving.server.prepare import Request, joined
from vlmzip.serving.server.progress import Progress, Usage, VisualTokens
from vlmzip.serving.server.row import Row


class Batch:
    """The requests of one batch with their answers."""

    def __init__(
        self,
        compressed: CompressedModel,
        processor: Processor,
        requests: Sequence[Request],
        progress: Sequence[Progress],
        pad: int,
        beat: Callable[[], None],
    ) -> None:
        self._compressed, self._requests, self._progress = compressed, requests, progress
        self._pad, self._beat = pad, beat
        ends = compressed.generation_config.eos_token_id
        ends = frozenset(() if ends is None else torch.as_tensor(ends).flatten().tolist())
        self._rows = [Row(request.sampling, ends, processor) for request in requests]
        self._visual: list[VisualTokens] = []

    @torch.inference_mode()
    def run(self) -> None:
        """Answer all requests. Their `progress` gets text, end and token counts as soon as they are known."""
        model = self._compressed
        inputs = joined([request.inputs for request in self._requests], self._pad)
        device, dtype = model.inner.device, model.inner.dtype
        inputs = {name: _moved(value, device, dtype) for name, value in inputs.items()}
        model.generate(
            **inputs,
            max_new_tokens=max(request.sampling.max_tokens for request in self._requests),
            do_sample=False,  # `_Choose` samples, for each row by its own settings
            num_beams=1,
            num_return_sequences=1,
            logits_processor=LogitsProcessorList([_Choose(self._rows)]),
            stopping_criteria=StoppingCriteriaList([_End(self._take)]),
        )

    def _take(self, tokens: list[int]) -> list[bool]:
        """Add a token to each row, and return which rows have ended."""
        self._beat()
        if not self._visual:
            self._visual = visual_tokens(self._compressed.report, self._requests)
        for row, token, progress, request, visual in zip(
            self._rows, tokens, self._progress, self._requests, self._visual, strict=True
        ):
            if row.reason is not None or progress.cancelled:
                continue
            if progress.first is None:
                progress.first = monotonic()
            row.add(token)
            progress.usage = Usage(request.count.text, row.count, visual)
            progress.write(row.text)
            if row.reason is not None:
                progress.finish(row.reason)
        pairs = zip(self._rows, self._progress, strict=True)
        return [row.reason is not None or progress.cancelled for row, progress in pairs]


class _Choose(LogitsProcessor):
    """Chooses the next token of each row: it leaves only the score of the chosen one."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocabulary"]) -> Tensor:
        if all(row.is_greedy for row in self._rows):
            return scores
        chosen = torch.tensor([[row.choose(of_row)] for row, of_row in zip(self._rows, scores, strict=True)])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.to(scores.device), 0.0)


class _End(StoppingCriteria):
    """Passes the new tokens on, and tells `generate` which rows have ended."""

    def __init__(self, take: Callable[[list[int]], list[bool]]) -> None:
        self._take = take

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: object, **_settings: object
    ) -> Bool[Tensor, " rows"]:
        return torch.tensor(self._take(input_ids[:, -1].tolist()), device=input_ids.device)


def visual_tokens(report: Report, requests: Sequence[Request]) -> list[VisualTokens]:
    """Return the visual tokens of each row of a batch."""
    counts = []
    for row, request in enumerate(requests):
        images = [image for image in report.images if image.row == row]
        before, after = sum(image.before for image in images), sum(image.after for image in images)
        last = request.count.visual.last_layer
        if last is None and not inside_the_llm(report.compressor):
            last = after
        counts.append(VisualTokens(before, after, last))
    return counts


def _moved(value: object, device: torch.device, dtype: torch.dtype) -> object:
    if not isinstance(value, Tensor):
        return [_moved(part, device, dtype) for part in value] if isinstance(value, list) else value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
