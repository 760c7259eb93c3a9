"""Load a model and its processor by name. Invalid names and broken checkpoints raise a one-line `UserError`."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

from vlmzip.compressor_file import refuse_lora
from vlmzip.errors import UserError, refusing
from vlmzip.files import is_file, is_folder
from vlmzip.models import FAMILIES, family_of
from vlmzip.models.family import Family
from vlmzip.processor import Processor
from vlmzip.runtime import pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Names of the models that ship with vlmzip, and the folder of each in the package.
SHIPPED = {"mini": Path("mini", "weights")}


@dataclass(frozen=True)
class Loaded:
    """A loaded model that is ready to answer, with its processor and family."""

    name: str
    """The name as the user wrote it."""
    model: PreTrainedModel
    processor: Processor
    family: Family


#: The model that was loaded last.
_latest: list[Loaded] = []


def load(name: str, device: str | None = None, dtype: str | None = None, *, allow_pickle: bool = False) -> Loaded:
    """Load `mini`, a checkpoint folder or a hub id. Raise `UserError` if the model cannot be loaded.

    By default the device is a GPU if there is one, and the dtype is that of the checkpoint. `allow_pickle` permits
    pickled weights, which can run code.
    """
    target = find_device(device)
    check_dtype(dtype)
    source = source_of(name)
    weights: dict[str, Any] = {"use_safetensors": None} if allow_pickle else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        hub_logging.set_verbosity_error()  # its warnings on retries repeat the final error
        config = pretrained.load_config(source)
        processor = pretrained.load_processor(source, config)
        model = pretrained.load_model(source, dtype=DTYPES.get(dtype or "", "auto"), **weights)
        with refusing(f"cannot move {name!r} to {target}"):
            module: nn.Module = model  # mypy cannot call the `to` that transformers wraps
            module.to(target).eval()
        family = family_of(model)
        pretrained.try_out(name, processor, family)
    loaded = Loaded(name, model, processor, family)
    _latest[:] = [loaded]
    return loaded


def load_without_weights(name: str) -> Loaded:
    """Load a model like `load`, but with shapes only: it can count tokens and needs neither weights nor memory."""
    source = source_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
        config = pretrained.load_config(source)
        processor = pretrained.load_processor(source, config)
        with refusing(f"cannot read the shape of {name!r}"), torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        family = family_of(model.eval())
        pretrained.try_out(name, processor, family)
    return Loaded(name, model, processor, family)


def refuse_model_at_fault(error: Exception) -> None:
    """Raise `UserError` if the model that was loaded last also fails without compression.

    Loading cannot detect every fault of a config. Do nothing after a "CUDA error": every later call fails, so a trial
    would prove nothing.
    """
    for loaded in _latest if "CUDA error" not in str(error) else ():
        pretrained.refuse_if_it_cannot_answer(loaded.name, loaded.processor, loaded.family)


def check_dtype(dtype: str | None) -> None:
    """Raise `UserError` unless `dtype` is `None` or a name in `DTYPES`."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")


def source_of(name: str) -> str:
    """Return the folder or hub id to load with transformers. Raise `UserError` for a name that is neither."""
    if name in SHIPPED:
        folder = Path(__file__).parents[1] / SHIPPED[name]
        if not (folder / "config.json").is_file():
            raise UserError(f"{name}'s weights are not in this installation; make them with `make {name}`")
        return str(folder)
    path = Path(name)
    if is_folder(path):
        if not is_file(path / "config.json"):
            refuse_lora(path)
            raise UserError(
                f"{name!r} is not a checkpoint (it has no config.json); give one that save_pretrained wrote"
            )
    elif is_file(path):
        raise UserError(f"{name!r} is a file; a model is a checkpoint folder or a hub id")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or name.count(os.sep) > 1 or "/" not in name:
        raise UserError(
            f"there is no folder {name!r}; a model is mini, a checkpoint folder or a hub id, "
            f"such as {FAMILIES[0].example}"
        )
    return name


def find_device(device: str | None) -> torch.device:
    """Return the device named `device`; for `None`, a GPU if there is one, otherwise the CPU.

    Raise `UserError` for a device that cannot be used.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about deprecated device types
            target = torch.device(device)
            torch.ones(1, device=target).item()  # fails without storage ("meta") or a backend
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device!r} cannot be used: {_first_sentence(error)}") from None
    return target


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())[:300]
