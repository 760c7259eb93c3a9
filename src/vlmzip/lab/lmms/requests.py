"""Parse what lmms-eval provides: settings in one line, messages, and generation settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Required, TypedDict

from PIL import Image
from transformers import GenerationConfig

from vlmzip.errors import UserError, closest
from vlmzip.runtime.images import load_image

#: The settings of `--model_args`.
SETTINGS = ("pretrained", "method", "device", "dtype", "batch_size", "max_batch_size")
#: The length of answers if a task sets none, as in lmms-eval's own adapters.
MAX_NEW_TOKENS = 1024
#: The message for tasks that compare log-likelihoods. lmms-eval does not ask adapters that take messages for them.
NO_LIKELIHOODS = (
    "compares log-likelihoods (output_type loglikelihood or multiple_choice, as in seedbench_ppl), which vlmzip does"
    " not give: take a task that has answers generated"
)
_OPEN, _CLOSE = "([{", ")]}"


class Part(TypedDict, total=False):
    """A part of a message of lmms-eval. The other fields depend on the type."""

    type: Required[str]
    text: str
    url: object
    image: object


class Message(TypedDict):
    """A message of lmms-eval."""

    role: str
    content: str | Sequence[Part]


class AnswerFailed(Exception):
    """A request that could not be answered. It ends the run, because an empty answer would count as a wrong one."""


def read_settings(text: str) -> dict[str, str]:
    """Return the settings of a text such as `a=1,b=visionzip(dominant=10,contextual=6)`.

    Commas inside brackets or quotes do not separate settings; lmms-eval's parser does not know round brackets. Raise
    `UserError` for an unknown setting.
    """
    written: dict[str, str] = {}
    for part in _split(text):
        name, equals, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if not equals:
            raise UserError(f"{part!r} in --model_args is not a setting; write name=value")
        if name not in SETTINGS:
            raise UserError(f"--model_args has no setting {name!r}{closest(name, SETTINGS)}")
        if name in written:
            raise UserError(f"--model_args sets {name} twice")
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        written[name] = value[1:-1] if quoted else value
    return written


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in _OPEN) - (char in _CLOSE)
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    if depth or quote:
        raise UserError(f"--model_args {text!r} has an unclosed bracket or quote")
    return [part.strip() for part in parts if part.strip()]


@dataclass(frozen=True)
class Generation:
    """The generation settings of an answer."""

    arguments: dict[str, object] = field(default_factory=dict)
    """The arguments of `generate`."""
    until: tuple[str, ...] = ()
    """Texts that end an answer. They are not part of it."""
    unused: tuple[str, ...] = ()
    """Settings that `generate` does not have."""

    def cut(self, text: str) -> str:
        """Return the answer up to the first end text."""
        ends = [text.find(end) for end in self.until]
        return text[: min((end for end in ends if end >= 0), default=len(text))].strip()


def read_generation(settings: Mapping[str, Any] | None) -> Generation:
    """Return a task's `generation_kwargs`.

    Decoding is greedy unless `do_sample` is true, or is absent and the temperature is above 0.
    """
    settings_set = {name: value for name, value in (settings or {}).items() if value is not None}
    until = settings_set.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(settings_set.pop("temperature", 0))
    samples = bool(settings_set.pop("do_sample", temperature > 0)) and temperature > 0
    known = GenerationConfig().to_dict()
    arguments: dict[str, object] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": samples}
    arguments |= {name: value for name, value in settings_set.items() if name in known}
    if samples:
        arguments["temperature"] = temperature
    else:
        for name in ("top_p", "top_k", "min_p", "typical_p"):  # without effect unless sampling
            arguments.pop(name, None)
    if arguments.get("num_return_sequences", 1) != 1:
        raise UserError("num_return_sequences: there is one answer to a request; lmms-eval's --repeats asks again")
    return Generation(arguments, tuple(end for end in until if end), tuple(sorted(settings_set.keys() - known.keys())))


@dataclass(frozen=True)
class Chat:
    """A conversation for chat templates, and its images in order."""

    messages: list[dict[str, object]]
    images: list[Image.Image]


def read_chat(messages: Sequence[Message], placeholders: Sequence[str]) -> Chat:
    """Return what a task's `doc_to_messages` returns: turns with texts and images in any order.

    Raise `UserError` for video, for audio, for invalid images, and for text that contains a placeholder, which would
    stand for an image that does not exist.
    """
    turns: list[dict[str, object]] = []
    images: list[Image.Image] = []
    for message in messages:
        content = message["content"]
        parts: Sequence[Part] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append({"role": message["role"], "content": [_part(part, images, placeholders) for part in parts]})
    return Chat(turns, images)


def _part(part: Part, images: list[Image.Image], placeholders: Sequence[str]) -> dict[str, str]:
    kind = part["type"]
    if kind == "image":
        images.append(_image(part.get("url", part.get("image"))))
        return {"type": "image"}
    if kind != "text":
        raise UserError(f"a question with {kind} in it: vlmzip compresses images, and supports no {kind} yet")
    for placeholder in placeholders:
        if placeholder in part["text"]:
            raise UserError(f"the text {part['text'][:80]!r} holds {placeholder}, which stands for an image")
    return {"type": "text", "text": part["text"]}


def _image(image: object) -> Image.Image:
    if isinstance(image, Image.Image | str | PathLike):
        return load_image(image)
    raise UserError(f"{type(image).__name__} is not an image: a task must give Pillow images or paths")
