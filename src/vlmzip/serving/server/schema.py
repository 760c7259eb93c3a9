"""The fields of a request to /v1/chat/completions. Fields that would change the answer and cannot are refused."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vlmzip.errors import alternatives, closest
from vlmzip.serving.server.errors import RequestError

#: Fields that are accepted only with a value that changes nothing: `None` or one of these.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
#: Fields about the client, which do not change the answer.
IGNORED = ("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")


#: What objects look like, by the end of their place.
OBJECTS = {
    r"content\.\d+$": ' such as {"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": …}}',
    r"messages\.\d+$": ' such as {"role": "user", "content": …}',
    r"image_url$": ' such as {"url": …}',
    r"vlmzip$": ' such as {"method": …, "keep": …}',
    r"^$": ' such as {"model": …, "messages": […]}',
}
#: What is wrong with a value, by pydantic's type of the error. The names in braces are those of the error's context.
WRONG = {
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "none_required": "must be null or left out",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:,g}",
    "less_than": "must be below {lt:,g}",
    "less_than_equal": "must be at most {le:,g}",
    "string_too_short": "must not be empty",
    "string_too_long": "has more than {max_length} characters",
    "too_long": "has more than {max_length} entries",
    "too_short": "must not be empty",
}
#: The same for lists that can be a text, by the name of the field.
LISTS = {"content": "must be a text or a list of parts", "stop": "must be a text or a list of texts"}
#: What clients of other servers send and this one does not take, by the tag.
UNSUPPORTED = {
    "tool": "tools are not supported",
    "function": "tools are not supported",
    "video_url": "videos are not supported",
    "input_video": "videos are not supported",
    "video": "videos are not supported",
    "input_audio": "sound is not supported",
    "audio_url": "sound is not supported",
    "file": "files are not supported",
    "input_file": "files are not supported",
    "image": 'send images as {"type": "image_url", "image_url": {"url": …}}',
    "input_image": 'send images as {"type": "image_url", "image_url": {"url": …}}',
    "input_text": 'send texts as {"type": "text", "text": …}',
}


class Strict(BaseModel):
    """An object of which every field must be known and of the right type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageURL(Strict):
    """An image. `detail` changes nothing: clients send it as a matter of course, and the budget is in `vlmzip`."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


def _as_parts(content: object) -> object:
    if content is None:
        message = "content must be a text or a list of parts, got null; leave out messages without content"
        raise RequestError(message, code="invalid_value", param="messages")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[TextPart], BeforeValidator(_as_parts), Field(min_length=1)]
Parts = Annotated[
    list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], BeforeValidator(_as_parts), Field(min_length=1)
]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Texts
    name: str | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Parts
    name: str | None = None


class AssistantMessage(Strict):
    """An earlier answer. Clients send back what they got, with its empty fields."""

    role: Literal["assistant"]
    content: Texts
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


def _as_budget(keep: object) -> object:
    is_right = isinstance(keep, int | float | None) or (isinstance(keep, str) and len(keep) <= 20)
    if isinstance(keep, bool) or not is_right:
        message = "vlmzip.keep must be a number such as 64 or 0.25, or a text such as '25%'"
        raise RequestError(message, code="invalid_value", param="vlmzip.keep")
    return keep


class Choice(Strict):
    """The method and budget of a request."""

    method: Annotated[str, Field(max_length=300)] | None = None
    keep: Annotated[int | float | str | None, BeforeValidator(_as_budget)] = None


def _as_choice(choice: object) -> object:
    return {} if choice is None else choice


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatRequest(Strict):
    """The body of a request."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4)] | None,
        BeforeValidator(_as_list),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    vlmzip: Annotated[Choice, BeforeValidator(_as_choice)] = Choice()

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, body: object) -> object:
        """Drop fields that change nothing, and refuse other values of them."""
        if not isinstance(body, dict):
            return body
        for name, accepted in NEUTRAL.items():
            value = body.get(name)
            # `True == 1` in Python, so compare types of booleans, too.
            same = any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in accepted)
            if value is not None and not same:
                raise RequestError(f"{name} is not supported; leave it out", code="unsupported_parameter", param=name)
        return {name: value for name, value in body.items() if name not in (*NEUTRAL, *IGNORED)}

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.n not in (None, 1):
            message = f"n must be 1, got {self.n}: send one request for each answer; they are answered together"
            raise RequestError(message, code="unsupported_value", param="n")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", param="stream_options")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("give max_completion_tokens or max_tokens, not both", param="max_tokens")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """Return the longest answer that the request allows; `None` if it does not say."""
        return self.max_completion_tokens or self.max_tokens


def read_request(body: bytes) -> ChatRequest:
    """Return the request in a body. Raise `RequestError` for invalid JSON, unknown fields and wrong types."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> RequestError:
    """Return the error for the first wrong field."""
    first = error.errors(include_url=False)[0]
    roles = ("system", "developer", "user", "assistant", "text", "image_url")
    path = [str(part) for part in first["loc"]]
    # The names of the alternatives stand in the path, too: messages.0.user.content.1.image_url.image_url.url
    param = ".".join(part for at, part in enumerate(path) if not (part in roles and at and path[at - 1].isdigit()))
    kind, context = first["type"], first.get("ctx", {})
    logged = None
    if kind == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if kind == "extra_forbidden":
        name = path[-1][:50]
        known = ChatRequest.model_fields if len(path) == 1 else Choice.model_fields if path[0] == "vlmzip" else ()
        hint = closest(name, known) if known else ""
        hint = '; write it as {"vlmzip": {"method": …, "keep": …}}' if name in Choice.model_fields else hint
        # The name can be a text, which the log must not have.
        logged = f"unknown field in {param.removesuffix(path[-1]).rstrip('.') or 'the body'}"
        return RequestError(f"unknown field {name!r}{hint}", code="unknown_parameter", param=param[:100], logged=logged)
    if kind in ("missing", "union_tag_not_found"):
        param += "" if kind == "missing" else f".{_tag_name(context)}"
        return RequestError(f"{param} is missing", code="missing_required_parameter", param=param[:100])
    if kind == "union_tag_invalid":
        param += f".{_tag_name(context)}"
        message = _wrong_tag(str(context["tag"]), str(context["expected_tags"]))
        logged = f"{param} is unknown"
    elif kind in ("model_type", "model_attributes_type"):
        message = "must be an object" + next((hint for end, hint in OBJECTS.items() if re.search(end, param)), "")
    elif kind == "too_long" and context["max_length"] == 0:
        message = "must be empty or left out"
    elif kind == "list_type" and path[-1] in LISTS:
        message = LISTS[path[-1]]
    elif kind in WRONG:
        message = WRONG[kind].format(**context)
        if kind == "literal_error" and param.endswith(".type"):
            message += "; only messages of the user can have images"
    else:
        message = f"is not valid: {first['msg'][0].lower()}{first['msg'][1:]}"
    return RequestError(
        f"{param or 'the body'} {message}"[:300], code="invalid_value", param=param[:100] or None, logged=logged
    )


def _tag_name(context: dict[str, Any]) -> str:
    """Return the name of the field that says what kind of object an object is."""
    return str(context["discriminator"]).strip("'")


def _wrong_tag(tag: str, expected: str) -> str:
    """Return what is wrong with the kind of an object, and what is supported."""
    tags = alternatives([each.strip("' ") for each in expected.split(",")])
    hint = UNSUPPORTED.get(tag)
    return f"must be {tags}, got {tag[:50]!r}{'' if hint is None else f'; {hint}'}"
