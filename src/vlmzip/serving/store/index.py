"""The index of a store: a Parquet file with a row for each image of the folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmzip.errors import UserError, how_to_install, refusing
from vlmzip.files import write_whole
from vlmzip.runtime.images import shortened

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    raise UserError(f"stores need pyarrow: {how_to_install('store')}") from None

FILE = "index.parquet"
#: The advice for a damaged file that describes the store.
ADVICE = "encode the images into another store"
#: A row of the index by column.
Row = dict[str, Any]
#: The columns and their types. A row with an `error` stands for an image that is not in the store; the columns that
#: describe tokens are null there.
SCHEMA = pyarrow.schema(
    {
        "path": pyarrow.string(),
        "sha256": pyarrow.string(),
        "bytes": pyarrow.int64(),
        "width": pyarrow.int32(),
        "height": pyarrow.int32(),
        "tokens_before": pyarrow.int32(),
        "tokens_after": pyarrow.int32(),
        "token_bytes": pyarrow.int64(),
        "shard": pyarrow.string(),
        "name": pyarrow.string(),
        "checksum": pyarrow.string(),
        "error": pyarrow.string(),
    }
)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows in the order of their paths, whole or not at all."""
    table = pyarrow.Table.from_pylist(sorted(rows, key=lambda row: row["path"]), schema=SCHEMA)
    write_whole(path, lambda name: parquet.write_table(table, name, write_page_checksum=True))


def read_table(path: Path) -> pyarrow.Table:
    """Return the table of a file. Raise `UserError` if it is damaged."""
    with refusing(f"{str(path)!r} is damaged, or it is not the index of a store; {ADVICE}"):
        table = parquet.read_table(path, page_checksum_verification=True)
        if table.schema.names != SCHEMA.names:
            raise UserError(f"{str(path)!r} has other columns than the index of a store; {ADVICE}")
        table = table.cast(SCHEMA)
        table.validate(full=True)
        return table


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file. Raise `UserError` if it is damaged."""
    rows: list[Row] = read_table(path).to_pylist()
    return rows


def newest(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the row of each path: the last one without an error, else the last one."""
    chosen: dict[str, Row] = {}
    for row in rows:
        if row["error"] is None or row["path"] not in chosen:
            chosen[row["path"]] = row
    return chosen


def left_out(name: str, reason: str) -> str:
    """Say that an image is not in the store, and why. Many reasons begin with its name."""
    named = f"{shortened(name)!r} "
    if reason.startswith(named):
        reason = f"it {reason.removeprefix(named)}"
    return f"{name!r} is not in the store: {reason}"


def signed(row: Mapping[str, object]) -> Row:
    """Return the part of a row that its checksum covers."""
    return {name: value for name, value in row.items() if name != "checksum"}
