"""Make a store, continue one, or bring it to the state of its folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from PIL import Image

from vlmzip.compressor import Compressor
from vlmzip.errors import Damaged, UserError, collecting_warnings, counted
from vlmzip.files import is_file
from vlmzip.locks import hold
from vlmzip.progress import working
from vlmzip.runtime.attach import attach
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.saving import saved_weights
from vlmzip.serving.store import index
from vlmzip.serving.store.encoding import Encoder
from vlmzip.serving.store.folder import has_changed, image_names, read_image, refuse_place
from vlmzip.serving.store.index import Row
from vlmzip.serving.store.manifest import FILE as DESCRIPTION
from vlmzip.serving.store.manifest import Manifest, read_manifest
from vlmzip.serving.store.parts import SHARDS, UNFINISHED, Part, parts_of, write_part
from vlmzip.serving.store.reading import read_tensors, unused_bytes

log = logging.getLogger(__name__)
#: Encode parts of a store, and yield the number of images of each part that is done.
EncodeParts = Callable[[Sequence[Part]], Iterator[int]]


@dataclass(frozen=True)
class Written:
    """The state of a store after a run."""

    stored: int
    """Images in the store."""
    encoded: int
    """Images that this run encoded."""
    failed: dict[str, str]
    """The reason for each image that could not be stored."""
    token_bytes: int
    """The bytes of all tokens."""
    file_bytes: int
    """The bytes of the image files."""
    changed: list[str]
    """Images whose files have changed since they were stored; the store has their old tokens."""
    gone: list[str]
    """Images whose files are gone from the folder; the store has their tokens."""
    removed: int
    """Images that this run removed from the store, because their files are gone."""
    unused_bytes: int
    """The bytes of tokens in shards that no image uses any more."""


@dataclass
class Comparison:
    """What the folder and the store differ in."""

    new: list[str] = field(default_factory=list)
    """Images to encode: without a row, and those that could not be read before this run and can now."""
    again: list[str] = field(default_factory=list)
    """Images that an earlier process of this run could not encode."""
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


def check_before_load(
    folder: Path, store: Path, compressor: Compressor | None, batch: int, shard: int, dtype: str | None
) -> list[str]:
    """Return the names of the images below `folder`. Raise `UserError` for all that is wrong without the model.

    Give `None` for a `compressor` or `dtype` that depends on the model. Only a new folder and its lock are written.
    """
    refuse_place(folder, store, DESCRIPTION)
    names = image_names(folder)
    made = read_manifest(store)
    if made is None:
        _first_readable(folder, names)
    else:
        made.refuse_settings(store, compressor, batch, shard, dtype)
    hold(store).release()  # an error if another run is writing the store, or if it cannot be written
    return names


def write_store(
    folder: Path,
    store: Path,
    loaded: Loaded,
    compressor: Compressor,
    *,
    batch: int = 8,
    shard: int = 64,
    update: bool = False,
    names: Sequence[str] | None = None,
    in_processes: Callable[[Manifest], EncodeParts] | None = None,
) -> Written:
    """Write the compressed tokens of all images below `folder` to `store`; continue the store if it exists.

    `batch` images go through the encoder together, and `shard` images form a file. A run that was stopped at any moment
    can be continued: the files are then the same as without the stop. `names` come from `check_before_load`, which is
    called here by default. `in_processes` returns a function that encodes parts in other processes; by default this
    process encodes them.

    Images whose files have changed or are gone keep their tokens. With `update`, changed images and those whose tokens
    are damaged are encoded again, into further shards, and images whose files are gone are removed. The old tokens stay
    in a shard that other images use.

    Raise `UserError` if another run is writing the store, if it comes from another model or method, if the store would
    have the images in its folder, or if the tokens of this model or method cannot be stored.
    """
    if names is None:
        names = check_before_load(folder, store, compressor, batch, shard, None)
    lock = hold(store)
    try:
        encoder = _encoder(loaded, compressor)
        _remove_unfinished(store)
        manifest = _begin(folder, store, encoder, names, batch, shard)
        before = _rows([store / index.FILE])
        finished = {file: index.read_rows(file) for file in _unfinished(store)}
        compared = _compare(store, folder, names, before, index.newest(chain(*finished.values())), update=update)
        _forget(finished, compared.new)
        parts = _missing(before, finished, compared, shard)
        encode = in_processes(manifest) if in_processes else _in_this_process(store, folder, encoder, batch)
        missing = {name for part in parts for name in part.names}
        with working("encoding", len(missing)) as work:
            for count in encode(parts) if parts else ():
                work.advance(count)
        return _finish(store, names, missing, before, compared, shard, update=update)
    finally:
        lock.release()


def _encoder(loaded: Loaded, compressor: Compressor) -> Encoder:
    """Attach the compressor, and log its warnings."""
    with collecting_warnings() as notes:
        compressed = attach(loaded.model, compressor, weights=saved_weights(compressor, loaded.name))
    for note in notes:
        log.warning(note)
    return Encoder(loaded, compressed)


def _begin(folder: Path, store: Path, encoder: Encoder, names: Sequence[str], batch: int, shard: int) -> Manifest:
    """Return the manifest of the store, and write it if the store is new."""
    made = read_manifest(store)
    if made is None:
        encoder.check(_first_readable(folder, names))
    takes_several = encoder.takes_several if made is None else made.takes_several
    manifest = Manifest.of(encoder.loaded, encoder.compressed, batch, shard, takes_several=takes_several)
    if made is None:
        manifest.write(store)
        return manifest
    manifest.refuse_other(made, store)
    if changes := manifest.rounding_changes(made):
        log.warning(f"tokens may be rounded differently from those that the store has: {', '.join(changes)}")
    return made


def _first_readable(folder: Path, names: Sequence[str]) -> Image.Image:
    """Return the first image that can be read. Raise `UserError` if no image can be read."""
    first = next(_readable(folder, names), None)
    if first is None:
        raise UserError(f"no image in {str(folder)!r} can be read ({counted(len(names), 'image')} found)")
    return first


def _readable(folder: Path, names: Sequence[str]) -> Iterator[Image.Image]:
    for name in names:
        try:
            yield read_image(folder, name)[0]
        except UserError:
            continue


def _unfinished(store: Path) -> list[Path]:
    """Return the files with the rows of parts that the index does not have yet."""
    return sorted((store / UNFINISHED).glob("*.parquet"))


def _rows(files: Sequence[Path]) -> dict[str, Row]:
    """Return the newest row of each image in files with rows, of which the index can be missing."""
    return index.newest(row for file in files if is_file(file) for row in index.read_rows(file))


def _compare(
    store: Path,
    folder: Path,
    names: Sequence[str],
    before: dict[str, Row],
    of_this_run: dict[str, Row],
    *,
    update: bool,
) -> Comparison:
    """Compare the files of the folder with the rows of the store, and with `update` also the tokens with checksums.

    `before` has the rows of the index, and `of_this_run` those that it does not have yet.
    """
    rows = before | of_this_run
    compared = Comparison(gone=sorted(name for name in rows.keys() - set(names) if rows[name]["error"] is None))
    with working("comparing", len(names)) as work:
        for name in names:
            row = rows.get(name)
            if row is None:
                compared.new.append(name)
            elif row["error"] is not None:
                if next(_readable(folder, [name]), None) is not None:
                    (compared.again if name in of_this_run else compared.new).append(name)
            elif has_changed(folder / name, row["bytes"], row["sha256"]):
                (compared.new if update else compared.changed).append(name)
            elif update and _is_damaged(store, row):
                compared.new.append(name)
            work.advance()
    return compared


def _is_damaged(store: Path, row: Row) -> bool:
    try:
        read_tensors(store, row)
    except Damaged:
        return True
    return False


def _forget(finished: dict[Path, list[Row]], names: Sequence[str]) -> None:
    """Remove images that are encoded again from the rows of finished parts, which a stopped run has left.

    The rows of the new part could not be told from them otherwise: its number may be lower.
    """
    again = set(names)
    for file, rows in finished.items():
        if any(row["path"] in again for row in rows):
            index.write_rows(file, [row for row in rows if row["path"] not in again])


def _missing(before: dict[str, Row], finished: dict[Path, list[Row]], compared: Comparison, shard: int) -> list[Part]:
    """Return the parts to make."""
    shards = {row["shard"] for row in chain(before.values(), *finished.values())} - {None}
    # A part without a readable image has no shard.
    taken = {Path(file).stem for file in (*shards, *finished)}
    return parts_of(compared.new, compared.again, shard, taken)


def _in_this_process(store: Path, folder: Path, encoder: Encoder, batch: int) -> EncodeParts:
    def encode(parts: Sequence[Part]) -> Iterator[int]:
        for part in parts:
            write_part(store, folder, part, encoder, batch)
            yield len(part.names)

    return encode


def _finish(
    store: Path,
    names: Sequence[str],
    missing: set[str],
    before: dict[str, Row],
    compared: Comparison,
    shard: int,
    *,
    update: bool,
) -> Written:
    """Write the index, and remove the files that it replaces."""
    rows = before | _rows(_unfinished(store))
    if update:
        present = set(names)
        rows = {name: row for name, row in rows.items() if name in present}
    _remove_unfinished(store)
    if rows != before or not is_file(store / index.FILE):
        index.write_rows(store / index.FILE, rows.values())
    if (store / UNFINISHED).is_dir():
        for path in (store / UNFINISHED).iterdir():
            path.unlink()
        (store / UNFINISHED).rmdir()
    stored = [row for row in rows.values() if row["error"] is None]
    if update:
        shards = {row["shard"] for row in stored}
        for path in (store / SHARDS).glob("*.safetensors"):
            if f"{SHARDS}/{path.name}" not in shards:
                path.unlink()
    failed = {name: rows[name]["error"] for name in names if rows[name]["error"] is not None}
    token_bytes, file_bytes = (sum(row[column] for row in stored) for column in ("token_bytes", "bytes"))
    return Written(
        len(stored),
        len(missing - failed.keys()),
        failed,
        token_bytes,
        file_bytes,
        compared.changed,
        gone=[] if update else compared.gone,
        removed=len(compared.gone) if update else 0,
        unused_bytes=unused_bytes(store, stored, shard),
    )


def _remove_unfinished(store: Path) -> None:
    """Remove the temporary files of processes that were stopped while they wrote."""
    for folder in (store, store / SHARDS, store / UNFINISHED):
        for pattern in (".*.safetensors", ".*.parquet", ".*.json"):
            for path in folder.glob(pattern):
                path.unlink()
