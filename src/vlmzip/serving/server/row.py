"""One answer of a batch: its tokens, its text, its sampling and its end."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vlmzip.processor import Processor
from vlmzip.serving.server.engine import Sampling
from vlmzip.serving.server.progress import Reason

#: What a tokenizer writes for bytes that do not form a letter yet.
INCOMPLETE = "\ufffd"


#: Below this temperature, scores divided by it could exceed float32, and the most probable token is certain.
COLDEST = 1e-5


class Text:
    """The text of a growing sequence of tokens. Each token is decoded with its predecessor, not with all."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._tokens: list[int] = []
        self._start = self._read = 0
        self.text = ""

    def add(self, token: int) -> None:
        self._tokens.append(token)
        self._take(self._decode(self._start, len(self._tokens)), whole=False)

    def finish(self) -> None:
        """Add the bytes at the end that form no letter."""
        self._take(self._decode(self._start, len(self._tokens)), whole=True)

    def _take(self, now: str, *, whole: bool) -> None:
        before = self._decode(self._start, self._read)
        if len(now) > len(before) and (whole or not now.endswith(INCOMPLETE)):
            self.text += now[len(before) :]
            self._start, self._read = self._read, len(self._tokens)

    def _decode(self, start: int, end: int) -> str:
        tokens = torch.tensor(self._tokens[start:end], dtype=torch.long)
        return self._processor.decode(tokens, skip_special_tokens=True) if end > start else ""


class Row:
    """An answer that grows by one token at a time."""

    def __init__(self, sampling: Sampling, ends: frozenset[int], processor: Processor) -> None:
        self._sampling, self._ends = sampling, ends
        self._text = Text(processor)
        self._rng = torch.Generator().manual_seed(sampling.seed)
        self.count = 0
        """Tokens so far, with the end token."""
        self.reason: Reason | None = None
        """Why the answer has ended; `None` if it has not."""
        self._stopped_at: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Return whether it always takes the most probable token."""
        return self._sampling.temperature < COLDEST

    def choose(self, scores: Float[Tensor, " vocabulary"]) -> int:
        """Return the next token. Equal seeds give equal answers, alone and in any batch."""
        sampling = self._sampling
        if self.is_greedy:
            return int(scores.argmax())
        probabilities = (scores.float().cpu() / sampling.temperature).softmax(-1)
        if sampling.top_p < 1:
            ordered, tokens = probabilities.sort(descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
            beyond[0] = False  # the most probable token stays, even if float32 has no number as small as `top_p`
            probabilities = probabilities.index_fill(0, tokens[beyond], 0.0)
        return int(torch.multinomial(probabilities, 1, generator=self._rng))

    def add(self, token: int) -> None:
        """Add a token, and end the answer at an end token, a stop text or the longest length."""
        self.count += 1
        if token in self._ends:
            self._end("stop")
            return
        self._text.add(token)
        if self._find_stop():
            self.reason = "stop"
        elif self.count >= self._sampling.max_tokens:
            self._end("length")

    def _end(self, reason: Reason) -> None:
        self._text.finish()
        self.reason = "stop" if self._find_stop() else reason

    def _find_stop(self) -> bool:
        found = [at for stop in self._sampling.stop if (at := self._text.text.find(stop)) >= 0]
        self._stopped_at = min(found, default=None)
        return bool(found)

    @property
    def text(self) -> str:
        """Return the text that is certain, without spaces around the answer.

        Until the answer ends, spaces at the end and the beginning of a stop text are held back.
        """
        text = self._text.text
        if self._stopped_at is not None:
            text = text[: self._stopped_at]
        elif self.reason is None:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._sampling.stop), default=0)]
        return text.strip()


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
