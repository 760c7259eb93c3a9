"""Read a store: the images by their paths, and prompts about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.errors import Damaged, UnknownImage, UserError, did_you_mean
from vlmzip.files import PathText, is_file
from vlmzip.processor import InputDict
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.saving import saved_weights
from vlmzip.serving.store import index
from vlmzip.serving.store.image import StoredImage, checksum
from vlmzip.serving.store.index import Row, left_out
from vlmzip.serving.store.manifest import Manifest, require_manifest
from vlmzip.serving.store.parts import SHARDS
from vlmzip.serving.store.prompt import stored_inputs

#: The most letters to compare for a similar name: the letters of a name times the names of a store.
MOST_COMPARED = 100_000


@dataclass(frozen=True)
class Damage:
    """An image of a store whose tokens are damaged."""

    path: str
    reason: str


class Store(Mapping[str, StoredImage]):
    """A store of compressed images: `store["cat.jpg"]` has the tokens of an image.

    Images are read when they are asked for, and each time their checksum is compared. The index is read once.
    """

    def __init__(self, path: PathText) -> None:
        """Open the store. Raise `UserError` if there is none, or if it is unfinished or damaged."""
        self.path = Path(path)
        self.manifest: Manifest = require_manifest(self.path)
        self.compressor: Compressor = self.manifest.read_compressor()
        """The compressor that made the tokens."""
        if not is_file(self.path / index.FILE):
            raise UserError(f"{str(path)!r} is unfinished; run the same vlmzip encode again")
        self._state = _state(self.path)
        # A row as a dict takes ten times the memory of a row in the table.
        self._table = index.read_table(self.path / index.FILE)
        names, errors = (self._table[column].to_pylist() for column in ("path", "error"))
        self._stored = {name: number for number, name in enumerate(names) if errors[number] is None}
        self._failed = {name: error for name, error in zip(names, errors, strict=True) if error is not None}

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> StoredImage:
        """Return an image by its path below the folder that was encoded.

        Raise `UnknownImage` if the store does not have it, and `Damaged` if its content has changed.
        """
        row = self.row(name)
        try:
            return StoredImage.from_tensors(read_tensors(self.path, row))
        except Damaged:
            if _state(self.path) == self._state:
                raise
            raise Damaged(
                f"{name!r} is not where it was: vlmzip encode has changed the store since it was opened; open it again,"
                " or restart the server"
            ) from None

    def row(self, name: str) -> Row:
        """Return an image's row of the index. Raise `UnknownImage` if the store does not have it."""
        number = self._stored.get(name)
        if number is None:
            if name in self._failed:
                raise UnknownImage(left_out(name, self._failed[name]))
            near = did_you_mean(name, self._stored) if len(name) * len(self) <= MOST_COMPARED else ""
            raise UnknownImage(f"the store {str(self.path)!r} has no image {name[:200]!r}{near}")
        row: Row = self._table.slice(number, 1).to_pylist()[0]
        return row

    def damaged(self) -> Iterator[Damage | None]:
        """Compare the checksum of every image; yield its damage, or `None` if it is whole."""
        for name in self:
            try:
                read_tensors(self.path, self.row(name))
                yield None
            except Damaged as error:
                yield Damage(name, str(error))

    def attach(self, loaded: Loaded, inside: Sequence[Compressor] = ()) -> CompressedModel:
        """Return the model with the compressor of the store, and with methods that act `inside` the LLM.

        Raise `UserError` if the tokens come from another model.
        """
        compressor = spec.joined([self.compressor, *inside])
        compressed = attach(loaded.model, compressor, weights=saved_weights(self.compressor, loaded.name))
        mine = Manifest.of(loaded, compressed, 0, 0, takes_several=True)
        mine.refuse_other_model(self.manifest, self.path, "give the model of the store")
        return compressed

    def inputs(self, loaded: Loaded, prompts: Sequence[str], names: Sequence[Sequence[str]]) -> InputDict:
        """Return the inputs of prompts about images of the store, for the model with the store's compressor attached.

        `prompts` come from the model's chat template, and `names` has the images of each prompt.
        """
        if not self.manifest.takes_several and any(len(of_prompt) > 1 for of_prompt in names):
            raise UserError(f"{loaded.name} encodes an image in another way beside others: ask about one stored image")
        images = [[self[name] for name in of_prompt] for of_prompt in names]
        return stored_inputs(loaded.family, loaded.processor, self.compressor, prompts, images)


def read_tensors(store: Path, row: Row) -> dict[str, Tensor]:
    """Return the tensors of an image. Raise `Damaged` if they or the row are not as they were written."""
    name = row["path"]
    if Path(row["shard"]).parent != Path(SHARDS):
        raise _damaged(name, f"its shard {row['shard']!r} is not a file of the store")
    with _reading(name, row["shard"]), safe_open(store / row["shard"], "pt") as shard:
        prefix = f"{row['name']}."
        keys = [key for key in shard.keys() if key.startswith(prefix)]  # noqa: SIM118
        tensors: dict[str, Tensor] = {key.removeprefix(prefix): shard.get_tensor(key) for key in keys}
    if checksum(index.signed(row), tensors) != row["checksum"]:
        raise _damaged(name, "its checksum is wrong")
    return tensors


def _state(store: Path) -> object:
    """Return a value that changes whenever an index is written."""
    with suppress(OSError):
        status = (store / index.FILE).stat()
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None


def unused_bytes(store: Path, rows: Iterable[Row], shard_size: int) -> int:
    """Return the bytes of the tensors in the shards of these rows that no row names. Unreadable shards count 0.

    A shard has at most `shard_size` images. One with so many rows is all in use, and is not opened.
    """
    used: dict[str, set[str]] = {}
    for row in rows:
        used.setdefault(row["shard"], set()).add(row["name"])
    unused = 0
    for path, names in used.items():
        if len(names) == shard_size:
            continue
        with suppress(SafetensorError, OSError), safe_open(store / path, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                if key.partition(".")[0] not in names:
                    unused += shard.get_tensor(key).nbytes
    return unused


@contextmanager
def _reading(name: str, shard: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise _damaged(name, f"{shard} cannot be read ({' '.join(str(error).split())[:100]})") from None


def _damaged(name: str, reason: str) -> Damaged:
    return Damaged(f"{name!r} is damaged: {reason}; encode it again with vlmzip encode … --update")
