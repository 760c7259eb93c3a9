"""`store.json`: the model and the compressor that a store's tokens come from. They must not change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmzip import catalogue, spec
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.files import is_file, is_folder, write_text
from vlmzip.json_text import read_json
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.fingerprint import of_method, of_method_code, of_model
from vlmzip.runtime.fitting import before_the_llm
from vlmzip.runtime.loading import Loaded
from vlmzip.version import __version__

FILE = "store.json"
#: The version of the layout of a store. Increase it if older versions of vlmzip would misread a store.
FORMAT = 1
#: The fingerprints of a model that its visual tokens and their place in a prompt depend on.
IDENTITY = ("weights", "configuration", "dtype", "tokenizer", "image processor", "processor")
#: The fingerprints that can change the rounding of tokens. They are recorded, and may differ.
ROUNDING = ("attention", "device", "torch", "transformers", "code of vlmzip")


@dataclass(frozen=True)
class Manifest:
    """The content of `store.json`."""

    model: str
    """The name of the model, as the user wrote it."""
    compressor: dict[str, Any]
    """The compressor's method and fields."""
    identity: dict[str, str]
    """The fingerprints of the model and the method."""
    made_with: dict[str, str]
    """Versions and settings that can change the rounding of tokens."""
    batch: int
    """Images that went through the encoder together."""
    shard: int
    """Images in a shard."""
    takes_several: bool
    """Whether a prompt may have several images of the store."""

    @classmethod
    def of(
        cls, loaded: Loaded, compressed: CompressedModel, batch: int, shard: int, *, takes_several: bool
    ) -> Manifest:
        """Return the manifest of a store that this model makes. Its methods inside the LLM do not count."""
        compressor = spec.joined(before_the_llm(compressed.compressor))
        model = of_model(loaded.model, loaded.processor)
        return cls(
            loaded.name,
            _as_json(compressor),
            {name: model[name] for name in IDENTITY}
            | of_method(compressed)
            | {"method code": of_method_code(compressor)},
            {"vlmzip": __version__, **{name: model[name] for name in ROUNDING}},
            batch,
            shard,
            takes_several,
        )

    @property
    def dtype(self) -> str:
        """Return the dtype of the model and of the tokens."""
        return self.identity["dtype"]

    def read_compressor(self) -> Compressor:
        """Return the compressor. Raise `UserError` if its method is not installed."""
        return catalogue.from_dict(dict(self.compressor))

    def write(self, store: Path) -> None:
        """Write `store.json`."""
        content = {"format": FORMAT, "vlmzip": __version__, **asdict(self)}
        write_text(store / FILE, json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n")

    def refuse_settings(
        self, store: Path, compressor: Compressor | None, batch: int, shard: int, dtype: str | None
    ) -> None:
        """Raise `UserError` if a run with other settings is about to continue this store. `None` is not compared."""
        if compressor is not None and _as_json(compressor) != self.compressor:
            before, now = spec.write(self.read_compressor()), spec.write(compressor)
            raise UserError(
                f"{str(store)!r} was made with {before}, not with {now}; give --method '{before}' and no --keep,"
                " or another --out"
            )
        for name, given, mine in (("batch", batch, self.batch), ("shard", shard, self.shard)):
            if given != mine:
                raise UserError(f"{str(store)!r} was made with --{name} {mine}; give it, or another --out")
        self.refuse_dtype(dtype or self.dtype, store, "give another --out")

    def refuse_dtype(self, dtype: str, store: Path, advice: str) -> None:
        """Raise `UserError` if the tokens of this store have another dtype."""
        if dtype != self.dtype:
            raise UserError(f"{str(store)!r} was made with --dtype {self.dtype}, not {dtype}; {advice}")

    def refuse_other(self, made: Manifest, store: Path) -> None:
        """Raise `UserError` if this manifest, of a run that is about to continue a store, differs from the store's."""
        made.refuse_settings(store, self.read_compressor(), self.batch, self.shard, None)
        self.refuse_other_model(made, store, "give another --out")

    def refuse_other_model(self, made: Manifest, store: Path, advice: str) -> None:
        """Raise `UserError` if a store comes from another model or from a method with other code or weights."""
        made.refuse_dtype(self.dtype, store, advice)
        changes = [name for name, value in self.identity.items() if made.identity.get(name) != value]
        if changes:
            model = made.model if made.model != self.model else "another version of the model"
            raise UserError(
                f"{str(store)!r} was made with {model}, not with {self.model}: {', '.join(changes)} differ; {advice}"
            )

    def rounding_changes(self, made: Manifest) -> list[str]:
        """Return what can change the rounding of tokens since the store was begun, in a few words each."""
        pairs = {name: (made.made_with.get(name), value) for name, value in self.made_with.items()}
        return [f"{name} {before} → {now}" for name, (before, now) in pairs.items() if before != now]


def read_manifest(store: Path) -> Manifest | None:
    """Return the manifest of a store; `None` if there is none yet. Raise `UserError` if it is damaged."""
    path = store / FILE
    if not is_file(path):
        return None
    content = read_json(path, "it describes a store; encode the images into another one")
    version = content.get("format") if isinstance(content, Mapping) else None
    if type(version) is int and version > FORMAT:
        raise UserError(
            f"{str(path)!r} was written by vlmzip {content.get('vlmzip')}, newer than {__version__}; update vlmzip"
        )
    names = [*Manifest.__dataclass_fields__]
    whole = isinstance(content, dict) and {*names, "format", "vlmzip", "checksum"} == content.keys()
    if not whole or content.pop("checksum") != _checksum(content):
        raise UserError(f"{str(path)!r} is damaged: its checksum is wrong; encode the images into another store")
    return Manifest(**{name: content[name] for name in names})


def require_manifest(store: Path) -> Manifest:
    """Return the manifest of a store. Raise `UserError` if the folder is no store."""
    manifest = read_manifest(store)
    if manifest is None:
        lacking = f"{FILE} in" if is_folder(store) else "folder"
        raise UserError(f"there is no {lacking} {str(store)!r}; make a store with vlmzip encode FOLDER --out STORE")
    return manifest


def _as_json(compressor: Compressor) -> dict[str, Any]:
    """Return the compressor's method and fields as JSON gives them back: with lists in place of tuples."""
    content: dict[str, Any] = json.loads(json.dumps(compressor.to_dict()))
    return content


def _checksum(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
