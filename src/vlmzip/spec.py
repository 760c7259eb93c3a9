"""Specs: a compressor written in one line, as a name with settings, several methods, or a saved file."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmzip import catalogue
from vlmzip.compressor import Compressor
from vlmzip.compressor_file import read_compressor
from vlmzip.errors import UserError, did_you_mean
from vlmzip.files import is_file, is_folder
from vlmzip.methods import Chain
from vlmzip.outline import FILE, METHOD_FORMS, is_saved

#: What a user can give as a compressor: an object, a spec, or the path of a saved `compressor.json` or its folder.
CompressorLike = Compressor | str | os.PathLike[str]

#: What `read_named` reads.
NAMED_FORMS = 'a name, with settings or other methods if you like: visionzip, "visionzip(keep=16)", "visionzip+fastv"'

#: A name with spaces around it, and settings in brackets. No two of its parts can take the same character: a text that
#: does not match costs time that grows with its length, and servers read the specs of requests.
_STAGE = re.compile(r"([^()]+)(?:\(([^()]*)\)\s*)?")
#: Characters of a text in a message.
_SHOWN = 100
_BETWEEN_FIELDS = re.compile(r",(?=\s*[A-Za-z_]\w*\s*=)")  # values may have commas themselves: stride=2,4


def read(text: str) -> Compressor:
    """Return the compressor of a spec.

    A spec is `NAME` or `package.module:Class`, optionally with settings in brackets. Several specs joined by `+` become
    a `Chain`. A path refers to a saved `compressor.json` or its folder. Raise `UserError` for anything else.
    """
    if is_saved(text):
        return read_compressor(saved_folder(text))
    return joined([_stage(part, text) for part in text.split("+")])


def read_named(text: str, names: Collection[str], shown: Collection[str] | None = None) -> Compressor:
    """Return the compressor of a spec in which every method is one of `names`, never a file or a class.

    This is for specs of people who must not make the program read files or import modules. Raise `UserError` for
    anything else; the message has the names of `shown`, by default all.
    """
    shown = names if shown is None else shown
    parts = text.split("+")
    for part in parts:
        if (name := _settings(part, text, NAMED_FORMS)[0]) not in names:
            hint = did_you_mean(name, shown) if name.isidentifier() else ""
            choices = f"; choose one of {', '.join(sorted(shown))}"
            raise UserError(f"unknown method {name[:_SHOWN]!r}{hint or choices}")
    return joined([_stage(part, text) for part in parts])


def as_compressor(compressor: CompressorLike) -> Compressor:
    """Return the compressor that a user gave as an object, a spec or a path. Raise `UserError` for anything else."""
    if isinstance(compressor, Compressor):
        return compressor
    if isinstance(compressor, os.PathLike):
        return read_compressor(saved_folder(os.fspath(compressor)))
    if isinstance(compressor, str):
        return read(compressor)
    raise UserError(
        f"compressor must be a compressor, a spec or a path, got {compressor!r};"
        " give vlmzip.VisionZip(keep=64) or 'visionzip(keep=64)'"
    )


def folder_of(compressor: CompressorLike) -> Path | None:
    """Return the folder of a compressor that was given as a path; `None` for an object or another spec."""
    if isinstance(compressor, os.PathLike) or (isinstance(compressor, str) and is_saved(compressor)):
        return saved_folder(os.fspath(compressor))
    return None


def saved_folder(text: str) -> Path:
    """Return the folder of a saved compressor, from the folder's or the file's path.

    Raise `UserError` if there is none.
    """
    path = Path(text)
    if is_folder(path):
        return path
    if path.name != FILE or not is_file(path):
        raise UserError(f"there is no folder or {FILE} at {text!r}; save_pretrained writes such files")
    return path.parent


def read_several(text: str) -> list[tuple[str, Compressor]]:
    """Read comma-separated specs. Return each spec with its compressor. Commas in brackets do not separate specs."""
    parts = [part.strip() for part in re.split(r",(?![^()]*\))", text)]
    return [(part, read(part)) for part in dict.fromkeys(parts) if part]


def budget_in(text: str) -> str:
    """Return the settings in a spec that set the number of tokens, such as `"keep=64"`, or "".

    Of several compressors, only the first counts, because a budget sets the first one.
    """
    if is_saved(text):
        return ""
    stages = [_stage(part, text) for part in text.split("+")]
    first = joined(stages).stages()[0]
    for part, stage in zip(text.split("+"), stages, strict=True):
        if stage is first:
            written = _settings(part, text)[1]
            return ",".join(f"{name}={value}" for name, value in written.items() if name in first.budget_fields)
    return ""


def refuse_second_budget(text: str, keep: object, otherwise: str, option: str = "--keep") -> None:
    """Raise `UserError` if a method already sets a budget and `option` gives another."""
    if budget := budget_in(text):
        shown = f"{keep:.3g}" if isinstance(keep, float) else keep
        raise UserError(f"{text} sets {budget}, and {option} is {shown}: {otherwise}")


@dataclass(frozen=True)
class Candidate:
    """A method of the user's list, or of the list of all methods."""

    name: str
    """The method as the user wrote it."""
    method: Compressor | None
    """The method, or `None` if it has required settings."""
    named: bool
    """Whether the user named the method; otherwise, all methods were requested."""

    def usable(self) -> Compressor:
        """Return the method. Raise `UserError` with the reason if it cannot run."""
        if self.method is None:
            raise UserError("left out: it needs settings; give them in --methods: name(field=value)")
        if self.method.trained_weights and not self.named:
            raise UserError(
                "left out: its weights have to be trained first; name it in --methods to run it all the same",
                remedy="train it",
            )
        return self.method


def candidates(text: str | None) -> list[Candidate]:
    """Return the methods of a comma-separated list, or all methods, without the uncompressed model.

    Raise `UserError` for an unknown method.
    """
    if text is None:
        return [
            Candidate(name, _with_defaults(cls), False)
            for name, cls in catalogue.available().items()
            if not (cls.changes_nothing or cls.for_training_only)
        ]
    named = read_several(text)
    if not named:
        raise UserError("--methods names no method; separate them with commas: --methods visionzip,pool2d")
    return [Candidate(name, method, True) for name, method in named if not method.changes_nothing]


def _with_defaults(cls: type[Compressor]) -> Compressor | None:
    try:
        return catalogue.make(cls, {})
    except UserError:
        return None


def write(compressor: Compressor, *, label: bool = False) -> str:
    """Return the shortest spec from which `read` makes the same compressor.

    A label also has the method's `label_fields`, even at their default values.
    """
    return "+".join(_written(stage, stage.label_fields if label else ()) for stage in compressor.stages())


def _written(compressor: Compressor, always: Sequence[str]) -> str:
    defaults = {field.name: field.default for field in dataclasses.fields(compressor)} | _defaults(type(compressor))
    settings = []
    for name in compressor.field_names():
        value = getattr(compressor, name)
        if value != defaults[name] or name in always:
            settings.append(f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    method = str(compressor.to_dict()["method"])
    return f"{method}({','.join(settings)})" if settings else method


def _defaults(cls: type[Compressor]) -> dict[str, object]:
    """Return a method's default field values, or nothing if it has required fields."""
    method = _with_defaults(cls)
    return {} if method is None else {name: getattr(method, name) for name in cls.field_names()}


def joined(stages: Sequence[Compressor]) -> Compressor:
    """Return a chain of several methods, or the only one."""
    return stages[0] if len(stages) == 1 else Chain(compressors=tuple(stages))


def _stage(part: str, whole: str) -> Compressor:
    name, settings = _settings(part, whole)
    return catalogue.make(catalogue.find(name), settings)


def _settings(part: str, whole: str, forms: str = METHOD_FORMS) -> tuple[str, dict[str, str]]:
    """Return the name of a compressor and the settings in its brackets."""
    match = _STAGE.fullmatch(part)
    if match is None or not (name := match[1].strip()):
        raise UserError(f"{whole[:_SHOWN]!r} cannot be read as a method; write {forms}")
    inside = match[2]
    settings: dict[str, str] = {}
    for field in _BETWEEN_FIELDS.split(inside or ""):
        if not field.strip():
            continue
        key, equals, value = field.partition("=")
        if not equals:
            raise UserError(f"a setting in {whole!r} must be field=value, got {field.strip()!r}")
        if key.strip() in settings:
            raise UserError(f"{whole!r} sets {key.strip()} twice")
        settings[key.strip()] = value.strip()
    return name, settings
