"""From a request to the inputs of the model for one row, and the number of its tokens, which follows from shapes."""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, counted, refusing
from vlmzip.models.family import Family
from vlmzip.processor import InputDict, Processor
from vlmzip.runtime.earlier_images import EarlierImages
from vlmzip.runtime.images import ignoring_warnings
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.position_limit import llm_positions
from vlmzip.runtime.prompt import PER_TOKEN
from vlmzip.runtime.prompt_text import conversation_prompt, special_tokens
from vlmzip.serving.server.choose import Methods
from vlmzip.serving.server.counting import TokenCount, count_tokens
from vlmzip.serving.server.engine import Sampling
from vlmzip.serving.server.errors import RequestError, from_user_error
from vlmzip.serving.server.images import read_images, refuse_many
from vlmzip.serving.server.schema import ChatRequest, ImagePart, TextPart
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.stored import ImageStore, compressor_for, count_stored, stored_inputs, stored_names


@dataclass(frozen=True)
class Request:
    """A request with the inputs of its row."""

    inputs: InputDict
    """The outputs of the processor, on the CPU."""
    compressor: Compressor
    count: TokenCount
    sampling: Sampling

    @cached_property
    def kind(self) -> Hashable:
        """Return what requests of one batch have in common: the compressor, and the shapes that must be equal."""
        shapes = [(name, _shape_of(value)) for name, value in sorted(self.inputs.items()) if not is_per_token(name)]
        return self.compressor, tuple(shapes)

    @cached_property
    def nbytes(self) -> int:
        """Return the memory of the inputs."""
        return sum(map(_bytes_of, self.inputs.values()))


def is_per_token(name: str) -> bool:
    """Return whether an input has one value for each token of the prompt."""
    return name == "input_ids" or name in PER_TOKEN


def _shape_of(value: object) -> Hashable:
    """Return what must be equal in inputs that can be joined. An input of an unknown type is joined with no other."""
    if isinstance(value, EarlierImages):
        return "compressed"
    if isinstance(value, Tensor):
        return value.dtype, value.shape[1:]
    return "list" if isinstance(value, list) else id(value)


def _bytes_of(value: object) -> int:
    if isinstance(value, EarlierImages):
        return sum(part.nbytes for image in value.images for part in (image.features, *image.streams))
    if isinstance(value, list):
        return sum(map(_bytes_of, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def joined(rows: Sequence[InputDict], pad: int) -> InputDict:
    """Return the inputs of a batch, with prompts padded on the left. The rows are of one kind."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch: InputDict = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if is_per_token(name):
            fill = pad if name == "input_ids" else PER_TOKEN[name]
            short = (longest - value.shape[1] for value in values)
            values = [torch.nn.functional.pad(v, (n, 0), value=fill) for v, n in zip(values, short, strict=True)]
        if isinstance(first, EarlierImages):
            batch[name] = EarlierImages.joined(values)
        else:
            batch[name] = (
                torch.cat(values) if isinstance(first, Tensor) else [part for value in values for part in value]
            )
    return batch


class Preparer:
    """Prepares requests for a model. Several threads can use it."""

    def __init__(self, loaded: Loaded, methods: Methods, settings: Settings, store: ImageStore | None = None) -> None:
        """Prepare requests for a loaded model, also about images of `store`."""
        # Tokenizers refuse to be used by two threads at once, and the thread of the model decodes.
        loaded = replace(loaded, processor=copy.deepcopy(loaded.processor))
        self._loaded, self._store = loaded, store
        self._family, self._processor = loaded.family, loaded.processor
        self._methods, self._settings = methods, settings
        self._one_at_a_time = threading.Lock()
        self._positions = llm_positions(loaded.family)
        self._placeholders = placeholders_of(loaded.family, self._processor)

    def prepare(self, request: ChatRequest) -> Request:
        """Return the request with the inputs of its row. Raise `RequestError` if it cannot be answered."""
        if len(request.messages) > self._settings.max_messages:
            raise RequestError(
                f"the request has {len(request.messages)} messages; the limit is {self._settings.max_messages}",
                code="too_many_messages",
                param="messages",
            )
        method, keep = request.vlmzip.method, request.vlmzip.keep
        compressor = self._methods.choose(method, keep)
        self._refuse_placeholders(request)
        parts = [part for message in request.messages for part in message.content]
        urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        refuse_many(len(urls), self._settings)
        names = stored_names(urls, self._store)
        if names is not None and self._store is not None:
            is_default = method is None and keep is None
            compressor = compressor_for(compressor, self._store, self._family, is_default=is_default)
            with self._one_at_a_time:
                inputs = stored_inputs(self._loaded, self._store, self._prompt(request), names)
            count = count_stored(self._family, inputs, compressor)
        else:
            inputs = self._inputs(request, read_images(urls, self._settings))
            count = count_tokens(self._family, inputs, compressor)
        return Request(inputs, compressor, count, self._sampling(request, count))

    def _refuse_placeholders(self, request: ChatRequest) -> None:
        """Refuse texts with the placeholder of an image, for which the processor would look for an image."""
        for number, message in enumerate(request.messages):
            # The prompt joins parts, so that a placeholder can begin in one and end in the next.
            text = "".join(part.text if isinstance(part, TextPart) else "\n" for part in message.content)
            for placeholder in self._placeholders:
                if placeholder in text:
                    message_text = f"messages.{number}: text must not contain {placeholder}"
                    raise RequestError(message_text, code="invalid_value", param=f"messages.{number}.content")

    def _prompt(self, request: ChatRequest) -> str:
        """Return the text of the prompt. Raise `RequestError` if the chat template refuses the messages."""
        messages = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": [
                    {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                    for part in message.content
                ],
            }
            for message in request.messages
        ]
        try:
            with ignoring_warnings():  # of prompts beyond the tokenizer's length, which are checked below
                prompt = conversation_prompt(self._family, self._processor, messages)
                self._refuse_long(prompt)
        except UserError as error:
            raise self._no_prompt(error) from None
        return prompt

    def _inputs(self, request: ChatRequest, images: Sequence[Image.Image]) -> InputDict:
        with self._one_at_a_time, ignoring_warnings():  # as above
            prompt = self._prompt(request)
            special = special_tokens(self._processor.tokenizer, prompt)
            try:
                with refusing("the processor refuses the request"):
                    inputs = self._processor(images=list(images) or None, text=[prompt], return_tensors="pt", **special)
            except UserError as error:
                raise self._no_prompt(error) from None
        return dict(inputs)

    @staticmethod
    def _no_prompt(error: UserError) -> RequestError:
        return from_user_error(error, "no prompt can be made of the messages", code="invalid_prompt", param="messages")

    def _refuse_long(self, prompt: str) -> None:
        """Refuse a prompt whose text alone is longer than the LLM allows, before any image is prepared."""
        if self._positions is not None and len(prompt) > self._positions:  # a token has at least one letter
            count = len(self._processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if count > self._positions:
                raise self._too_long(f"the text has {counted(count, 'token')}")

    def _sampling(self, request: ChatRequest, count: TokenCount) -> Sampling:
        asked, limit = request.asked_tokens, self._settings.max_new_tokens
        if asked is not None and asked > limit:
            message = f"max_tokens is at most {limit} here, got {asked}"
            raise RequestError(message, code="invalid_value", param="max_tokens")
        prompt = count.text + count.visual.most
        room = limit if self._positions is None else self._positions - prompt
        if room < (asked or 1):
            answer = "" if asked is None else f" and max_tokens is {asked}"
            raise self._too_long(f"the request has {prompt:,} tokens after compression{answer}")
        seed = secrets.randbits(63) if request.seed is None else request.seed
        return Sampling(
            max_tokens=asked or min(limit, room),
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=seed % 2**63,
            stop=tuple(request.stop or ()),
        )

    def _too_long(self, what: str) -> RequestError:
        return RequestError(
            f"{what}, and the model has {self._positions:,} positions: send less text, fewer images or a smaller keep",
            code="context_length_exceeded",
            param="messages",
        )


def placeholders_of(family: Family, processor: Processor) -> set[str]:
    """Return the texts that stand for images and videos in prompts of a processor."""
    texts: set[Any] = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video")}
    for each in family.modalities:
        texts.add(processor.tokenizer.convert_ids_to_tokens(each.placeholder_id))
    if not getattr(processor, "chat_template", None):  # then the family writes prompts
        texts |= {"<image>", "<video>"}
    return {text for text in texts if isinstance(text, str) and text}
