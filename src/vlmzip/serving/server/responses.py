"""The JSON of answers, as OpenAI's API has it. `usage.vlmzip` has the visual tokens."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict

from vlmzip.serving.server.counting import TokenCount
from vlmzip.serving.server.progress import Reason, Usage


class Answer:
    """The identity of one answer, which all its parts repeat."""

    def __init__(self, model: str, count: TokenCount) -> None:
        self._model, self._count = model, count
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, text: str, reason: Reason, usage: Usage) -> dict[str, object]:
        """Return an answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage(usage)}

    def chunk(self, delta: dict[str, str], reason: Reason | None = None) -> dict[str, object]:
        """Return a part of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def last_chunk(self, usage: Usage) -> dict[str, object]:
        """Return the part that ends a stream, if the client asked for the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(usage)}

    def usage(self, usage: Usage) -> dict[str, object]:
        """Return the token counts. The prompt has the tokens that enter the LLM."""
        prompt = usage.text_tokens + usage.visual.after
        return {
            "prompt_tokens": prompt,
            "completion_tokens": usage.new_tokens,
            "total_tokens": prompt + usage.new_tokens,
            "vlmzip": {
                "method": self._count.method,
                "images": len(self._count.images),
                "visual_tokens": asdict(usage.visual),
            },
        }

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
