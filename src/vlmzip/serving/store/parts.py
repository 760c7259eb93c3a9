"""The parts of a store: some images each, with their tokens in one shard and their rows in one file.

A part is written whole or not at all: first its shard, then its rows. What a part contains follows from the names of
its images, so that it is the same in every process that makes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlmzip.errors import UserError
from vlmzip.files import write_whole
from vlmzip.serving.store import index
from vlmzip.serving.store.encoding import Encoder
from vlmzip.serving.store.folder import read_image
from vlmzip.serving.store.image import StoredImage, checksum
from vlmzip.serving.store.index import Row

log = logging.getLogger(__name__)
#: The folder of the shards.
SHARDS = "shards"
#: The folder with the rows of finished parts that the index does not have yet.
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Part:
    """A part of a store that is to be made."""

    number: int
    names: tuple[str, ...]
    """The paths of its images below the folder."""

    @property
    def stem(self) -> str:
        """Return the name of its files without their suffixes."""
        return f"{self.number:06}"

    @property
    def shard(self) -> str:
        """Return the path of its shard below the store."""
        return f"{SHARDS}/{self.stem}.safetensors"

    def rows_in(self, store: Path) -> Path:
        """Return the file of its rows."""
        return store / UNFINISHED / f"{self.stem}.parquet"


def parts_of(new: Sequence[str], again: Sequence[str], shard: int, taken: set[str]) -> list[Part]:
    """Divide images into parts of `shard` images, with the lowest numbers whose stems are not `taken`.

    The images to try `again` get parts after all others, so that they do not change which images share a part.
    """
    free = (number for number in count() if Part(number, ()).stem not in taken)
    groups = chain(_groups(new, shard), _groups(again, shard))
    return [Part(number, names) for number, names in zip(free, groups, strict=False)]


def write_part(store: Path, folder: Path, part: Part, encoder: Encoder, batch: int) -> list[Row]:
    """Encode the images of a part, `batch` of them together, and write the part. Return its rows."""
    rows: list[Row] = []
    tensors: dict[str, Tensor] = {}
    for names in _groups(part.names, batch):
        for name, stored in _encoded(encoder, folder, names):
            row = dict.fromkeys(index.SCHEMA.names) | {"path": name}
            if isinstance(stored, str):
                rows.append(row | {"error": stored})
                continue
            image, described = stored
            number = str(len(rows))
            row |= described | {
                "tokens_before": image.layout.placeholders,
                "tokens_after": len(image.places),
                "token_bytes": image.size,
                "shard": part.shard,
                "name": number,
            }
            content = image.tensors()
            row["checksum"] = checksum(index.signed(row), content)
            rows.append(row)
            tensors |= {f"{number}.{kind}": values for kind, values in content.items()}
    if tensors:
        write_whole(store / part.shard, lambda path: _save(tensors, path))
    index.write_rows(part.rows_in(store), rows)
    return rows


def _save(tensors: dict[str, Tensor], path: str) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # safetensors raises it for a full disk, too
        raise OSError(str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]) from None


def _encoded(
    encoder: Encoder, folder: Path, names: Sequence[str]
) -> Iterator[tuple[str, str | tuple[StoredImage, Row]]]:
    """Yield each name with its image and the columns that describe its file, or with the reason why it is left out."""
    images: dict[str, Image.Image] = {}
    described: dict[str, Row] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            images[name], described[name] = read_image(folder, name)
        except UserError as error:
            failed[name] = str(error)
    stored: dict[str, StoredImage] = {}
    with suppress(UserError):  # it is the fault of one of the images
        stored = dict(zip(images, encoder.encode(list(images.values())), strict=True)) if images else {}
    for name in images.keys() - stored.keys():
        try:
            (stored[name],) = encoder.encode([images[name]])
        except UserError as error:
            failed[name] = str(error)
    for name in names:
        yield name, failed[name] if name in failed else (stored[name], described[name])


def _groups(names: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """Yield the names, `size` at a time; the last group may be smaller."""
    for start in range(0, len(names), size):
        yield tuple(names[start : start + size])
