"""Model and processor from a folder or a hub id; whatever is none, refused in one line before anything slow."""

from __future__ import annotations

import os
import re
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmzip.cli.console import Console
from vlmzip.cli.tables import show_bytes
from vlmzip.compressor_file import refuse_lora
from vlmzip.errors import UserError
from vlmzip.files import is_file, is_folder
from vlmzip.models import FAMILIES, adapter_for
from vlmzip.models.adapter import ModelAdapter
from vlmzip.runtime.prompts import unknown_words

if TYPE_CHECKING:
    from vlmzip.lab.tasks.task import Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

console = Console(stderr=True)


@dataclass(frozen=True)
class Loaded:
    """A model ready to be asked."""

    name: str
    model: Any
    processor: Any
    adapter: ModelAdapter


#: The model that was loaded last.
_latest: list[Loaded] = []


def load(name: str, device: str | None = None, dtype: str | None = None, *, allow_pickle: bool = False) -> Loaded:
    """Load `mini`, a checkpoint folder or a hub id. Raises `UserError` for anything else."""
    target = find_device(device)
    check_dtype(dtype)
    source = source_of(name)
    weights: dict[str, Any] = {"use_safetensors": None} if allow_pickle else {}
    with progress(f"loading {name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        from vlmzip.runtime import checkpoints

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        hub_logging.set_verbosity_error()  # the error that ends its retries says what they would
        config = checkpoints.load_config(source)
        processor = checkpoints.load_processor(source, config)
        model = checkpoints.load_model(source, dtype=DTYPES.get(dtype or "", "auto"), **weights)
        with checkpoints.refusing(f"cannot move {name!r} to {target}"):
            model.to(target).eval()
        adapter = adapter_for(model)
        checkpoints.try_out(name, processor, adapter)
    loaded = Loaded(name, model, processor, adapter)
    _latest[:] = [loaded]
    return loaded


def refuse_model_at_fault(error: Exception) -> None:
    """Raise `UserError` where the model that was loaded fails without vlmzip, too; return where it does not.

    Loading cannot notice all that is wrong with a config. After a "CUDA error" everything fails: nothing is learned.
    """
    from vlmzip.runtime.checkpoints import refuse_if_it_cannot_answer

    for loaded in _latest if "CUDA error" not in str(error) else ():
        refuse_if_it_cannot_answer(loaded.name, loaded.processor, loaded.adapter)


def refuse_too_much_at_once(error: Exception, args: Namespace) -> None:
    """Raise `UserError` where the memory was full, with the options that need less of it; return for other errors."""
    on_cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)  # torch has no class for it
    if not on_cpu and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return
    found = re.search(r"ried to allocate ([\d.]+) ?(\w+)", str(error))
    size, unit = found.groups() if found else ("", "")
    wanted = show_bytes(int(size)) if unit == "bytes" else f"{size} {unit}"
    said = f": {wanted} more were needed" if found else ""
    options = [f"a smaller --{name}" for name in ("batch", "scale") if hasattr(args, name)]
    options += ["--dtype bfloat16"] * (getattr(args, "dtype", "bfloat16") in (None, "float32"))
    options += ["--set batch_per_process=1"] * hasattr(args, "set")
    raise UserError(f"the memory is full{said}; try {', or '.join(options or ['fewer images'])}") from None


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")


def tell(text: str) -> None:
    """Says on stderr, in a line, how far the work is or how it ended."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Says on stderr, in a line, what the user should know but did not ask."""
    tell(f"note: {text}")


def note_unknown_words(loaded: Loaded, task: Task) -> None:
    """Says how many of a task's questions have words that the model has no token for."""
    words = {sample.question: unknown_words(loaded.processor, sample.question) for sample in task.samples}
    strange = [sample.question for sample in task.samples if words[sample.question]]
    if strange:
        note(
            f"{len(strange):,} of {len(task.samples):,} questions of {task.name} have words that {loaded.name}"
            f" does not know, {words[strange[0]][0]!r} for one"
        )


@contextmanager
def progress(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} …"):
        yield


def source_of(name: str) -> str:
    """Where transformers finds a model. Raises `UserError` for what is neither a checkpoint folder nor a hub id."""
    if name == "mini":
        from vlmzip import mini

        if not (mini.weights_folder() / "config.json").is_file():
            raise UserError("mini's weights are not in this installation; make them with `make mini`")
        return str(mini.weights_folder())
    path = Path(name)
    if is_folder(path):
        if not is_file(path / "config.json"):
            refuse_lora(path)
            raise UserError(f"{name!r} is no checkpoint: there is no config.json in it")
    elif is_file(path):
        raise UserError(f"{name!r} is a file; a model is a checkpoint folder or a hub id")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or name.count(os.sep) > 1 or "/" not in name:
        raise UserError(
            f"there is no folder {name!r}; a model is mini, a checkpoint folder or a hub id, "
            f"such as {FAMILIES[0].example}"
        )
    return name


def find_device(device: str | None) -> torch.device:
    """The device of that name, or a GPU if there is one. Raises `UserError` for one that cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of kinds of devices that it will not know for long
            target = torch.device(device)
            torch.ones(1, device=target).item()  # a kind of device can lack memory ("meta") or all code to use it
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device!r} cannot be used: {_first_sentence(error)}") from None
    return target


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())[:300]
