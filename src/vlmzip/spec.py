"""What people write for a compressor, in one line: a name, settings, several methods, or a saved file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmzip import catalogue
from vlmzip.compressor import Compressor
from vlmzip.compressor_file import FILE, read_compressor
from vlmzip.errors import UserError
from vlmzip.files import is_file, is_folder
from vlmzip.methods import Chain
from vlmzip.outline import METHOD_FORMS

_STAGE = re.compile(r"\s*([^()+]+?)\s*(?:\(([^()]*)\))?\s*")
_BETWEEN_FIELDS = re.compile(r",(?=\s*[A-Za-z_]\w*\s*=)")  # values may have commas themselves: stride=2,4


def read(text: str) -> Compressor:
    """The compressor that `text` asks for.

    `NAME` or `package.module:Class`, each with settings in brackets if you like; several joined by `+` become a
    `Chain`; a path names a saved `compressor.json`, or the folder that holds one. Raises `UserError` for anything else.
    """
    if is_saved(text):
        return read_compressor(saved_folder(text))
    return _joined([_stage(part, text) for part in text.split("+")])


def saved_folder(text: str) -> Path:
    """Return the folder that holds a saved compressor, for the folder's path or the file's. Raise if there is none."""
    path = Path(text)
    if is_folder(path):
        return path
    if path.name != FILE or not is_file(path):
        raise UserError(f"there is no folder or {FILE} at {text!r}; save_pretrained writes such files")
    return path.parent


def read_several(text: str) -> list[tuple[str, Compressor]]:
    """Compressors separated by commas, each with what was written for it; brackets hold commas of their own."""
    parts = [part.strip() for part in re.split(r",(?![^()]*\))", text)]
    return [(part, read(part)) for part in dict.fromkeys(parts) if part]


def budget_in(text: str) -> str:
    """The settings in `text` that say how many tokens a compressor keeps, such as `"keep=64"`; empty without any.

    Of several compressors the first counts: it is the one that a budget sets.
    """
    if is_saved(text):
        return ""
    stages = [_stage(part, text) for part in text.split("+")]
    first = _joined(stages).stages()[0]
    for part, stage in zip(text.split("+"), stages, strict=True):
        if stage is first:
            written = _settings(part, text)[1]
            return ",".join(f"{name}={value}" for name, value in written.items() if name in first.budget_fields)
    return ""


def refuse_second_budget(text: str, keep: object, otherwise: str) -> None:
    """Raise `UserError` if a method already sets a budget and `--keep` gives another."""
    if budget := budget_in(text):
        wanted = f"{keep:.3g}" if isinstance(keep, float) else keep
        raise UserError(f"{text} sets {budget}, and --keep is {wanted}: {otherwise}")


@dataclass(frozen=True)
class Candidate:
    """A method of a list, or of all that there are."""

    name: str
    """As it was written."""
    method: Compressor | None
    """`None` where its class cannot be made without settings."""
    named: bool
    """Whether the user asked for it; else it is there because all are."""

    def usable(self) -> Compressor:
        """The method. Raises `UserError` with the reason where it cannot run as it is."""
        if self.method is None:
            raise UserError("left out: it needs settings; name it in --methods with them: name(field=value)")
        if self.method.trained_weights and not self.named:
            raise UserError(
                "left out: its weights have to be trained first; name it in --methods to run it all the same"
            )
        return self.method


def candidates(text: str | None) -> list[Candidate]:
    """The methods of a list with commas, in its order, or all; the uncompressed model is left out.

    Raises `UserError` for one that there is not.
    """
    if text is None:
        return [
            Candidate(name, _with_defaults(cls), False)
            for name, cls in catalogue.available().items()
            if not (cls.changes_nothing or cls.for_training_only)
        ]
    asked = read_several(text)
    if not asked:
        raise UserError("--methods names no method; separate them with commas: --methods visionzip,pool2d")
    return [Candidate(name, method, True) for name, method in asked if not method.changes_nothing]


def _with_defaults(cls: type[Compressor]) -> Compressor | None:
    try:
        return catalogue.make(cls, {})
    except UserError:
        return None


def is_name(text: str) -> bool:
    """Whether this is one method without settings, which options of their own can add."""
    return not is_saved(text) and not set("+()") & set(text)


def is_saved(text: str) -> bool:
    """Whether this can only be a path."""
    return text.endswith(".json") or "/" in text or (is_folder(text) and text not in ("", *catalogue.available()))


def write(compressor: Compressor, *, label: bool = False) -> str:
    """Return the shortest text from which `read` makes `compressor` again.

    A label has the method's `label_fields`, too, whatever their values.
    """
    return "+".join(_written(stage, stage.label_fields if label else ()) for stage in compressor.stages())


def _written(compressor: Compressor, always: Sequence[str]) -> str:
    usual = {field.name: field.default for field in dataclasses.fields(compressor)} | _usual(type(compressor))
    told = []
    for name in compressor.field_names():
        value = getattr(compressor, name)
        if value != usual[name] or name in always:
            told.append(f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    method = str(compressor.to_dict()["method"])
    return f"{method}({','.join(told)})" if told else method


def _usual(cls: type[Compressor]) -> dict[str, object]:
    """What a method's fields are when nothing is asked; nothing is known where some have to be asked for."""
    usual = _with_defaults(cls)
    return {} if usual is None else {name: getattr(usual, name) for name in cls.field_names()}


def _joined(stages: list[Compressor]) -> Compressor:
    return stages[0] if len(stages) == 1 else Chain(compressors=tuple(stages))


def _stage(part: str, whole: str) -> Compressor:
    name, settings = _settings(part, whole)
    return catalogue.make(catalogue.find(name), settings)


def _settings(part: str, whole: str) -> tuple[str, dict[str, str]]:
    """The name of one compressor, and what is written in brackets behind it."""
    match = _STAGE.fullmatch(part)
    if match is None:
        raise UserError(f"{whole!r} cannot be read as a method; write {METHOD_FORMS}")
    name, inside = match.groups()
    settings: dict[str, str] = {}
    for field in _BETWEEN_FIELDS.split(inside or ""):
        if not field.strip():
            continue
        key, equals, value = field.partition("=")
        if not equals:
            raise UserError(f"{field.strip()!r} in {whole!r} is no setting; write field=value")
        if key.strip() in settings:
            raise UserError(f"{whole!r} sets {key.strip()} twice")
        settings[key.strip()] = value.strip()
    return name, settings
