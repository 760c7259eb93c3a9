"""A model saved with its compressor: load it again, and find the weights that belong to a method."""

from __future__ import annotations

import os
from pathlib import Path

from vlmzip.compressor import Compressor
from vlmzip.compressor_file import FILE, NotInstalled, read_compressor, refuse_lora
from vlmzip.errors import UserError
from vlmzip.files import is_file, is_folder
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.pretrained import load_model


def from_pretrained(
    folder: str | os.PathLike[str], compressor: Compressor | str | None = None, **kwargs: object
) -> CompressedModel:
    """Load what `save_pretrained` wrote: the model with its compressor. `kwargs` go to transformers.

    `compressor` replaces the saved one; it may be text, as for `attach`. The weights of a method that has some come
    from `resampler.safetensors`. Raise `UserError` for a folder without `compressor.json`, an unknown method or field,
    weights that are missing or do not fit, or a file that a newer vlmzip wrote.
    """
    if compressor is None:
        compressor = read_compressor(folder)
    _check_model(Path(folder))
    return attach(load_model(folder, **kwargs), compressor, weights=folder)


def saved_weights(compressor: Compressor, folder: str | os.PathLike[str]) -> str | os.PathLike[str] | None:
    """Return `folder` if `compressor` is the one saved there, else `None`: its weights are not in that folder."""
    if not is_file(Path(folder) / FILE):
        return None
    try:
        return folder if read_compressor(folder, type(compressor)) == compressor else None
    except NotInstalled:  # the saved method is another one
        return None


def _check_model(folder: Path) -> None:
    """Raise `UserError` for a folder without a model; a path that is no folder may be a hub id."""
    if is_folder(folder) and not is_file(folder / "config.json"):
        refuse_lora(folder)
        raise UserError(f"{str(folder)!r} holds no model (config.json is missing)")
