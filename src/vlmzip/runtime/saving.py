"""Load a model that was saved with its compressor, and find the saved weights of a method."""

from __future__ import annotations

import os
from pathlib import Path

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.compressor_file import NotInstalled, read_compressor, refuse_lora
from vlmzip.errors import UserError
from vlmzip.files import is_file, is_folder
from vlmzip.outline import FILE
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.pretrained import load_model


def from_pretrained(
    folder: str | os.PathLike[str], compressor: spec.CompressorLike | None = None, **kwargs: object
) -> CompressedModel:
    """Load a model with its compressor, as saved by `save_pretrained`. `kwargs` go to transformers.

    `compressor` replaces the saved compressor; it is as in `attach`. If the method has weights, they are read from
    `resampler.safetensors` in `folder`. Raise `UserError` for a folder without a model, an unknown method or field, and
    weights that are missing or do not fit. Without the argument `compressor`, also raise it if `compressor.json` is
    missing or written by a newer vlmzip.
    """
    if compressor is None:
        compressor = read_compressor(folder)
    _check_model(Path(folder))
    return attach(load_model(folder, **kwargs), compressor, weights=folder)


def saved_weights(compressor: Compressor, folder: str | os.PathLike[str]) -> str | os.PathLike[str] | None:
    """Return `folder` if `compressor` equals the compressor saved there, and its weights with it; otherwise `None`."""
    if not is_file(Path(folder) / FILE):
        return None
    try:
        return folder if read_compressor(folder, type(compressor)) == compressor else None
    except NotInstalled:  # the saved compressor is another method
        return None


def _check_model(folder: Path) -> None:
    """Raise `UserError` for a folder without a model. A path that is not a folder may be a hub id."""
    if is_folder(folder) and not is_file(folder / "config.json"):
        refuse_lora(folder)
        raise UserError(f"{str(folder)!r} has no config.json; give a folder that save_pretrained wrote")
