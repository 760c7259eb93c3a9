"""Check one model with every method, and say what works."""

from __future__ import annotations

import importlib.util
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vlmzip.catalogue import available
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.lab.conformance.families import FAMILIES, Tiny
from vlmzip.lab.conformance.images import Inputs
from vlmzip.lab.conformance.prompts import Prompts, Row
from vlmzip.lab.conformance.results import Checked
from vlmzip.lab.conformance.tiny import model_class, tiny_model
from vlmzip.lab.conformance.videos import check_video
from vlmzip.methods import EVS, NoCompression, RandomTokens
from vlmzip.models import family_of
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.version import __version__

#: Rows of prompts by mode. Numbers are token ids; "image" stands for the placeholders of the next image.
MODES: dict[str, list[Row]] = {
    "image": [[1, "image", 105, 106, 107]],
    "several images": [[1, 105, "image", 106, "image", 107]],
    "batch": [[1, 105, "image", 106, "image", 107], [1, "image", 108, 109, 110], [1, 111, 112]],
}
#: The number of new tokens of an answer.
ANSWER = 3
#: Tokens that an answer may not have: special tokens, such as placeholders and the end of an answer.
SUPPRESSED = list(range(100))
#: The largest difference of logits that rounding explains, as a share of the largest logit.
TOLERANCE = 1e-3
#: Methods that other methods make up.
COMBINED = ("chain",)


def check(folder: str) -> Checked:
    """Check a model folder of transformers with every method. Never raise an error of the model or of a method."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    tiny = FAMILIES.get(folder, Tiny())
    cls = None if tiny.refused else model_class(folder)
    if cls is None:
        reason = tiny.refused or "it has no class that answers questions about images"
        return Checked(folder, "", "", "refused", reason, {})
    name, reason = cls.__name__, tiny.plain_fails
    if tiny.package and not importlib.util.find_spec(tiny.package):
        reason = f"it needs the package {tiny.package}"
    if reason:
        return Checked(folder, name, "", "plain model fails", reason, {})
    try:
        model = tiny_model(cls, tiny.changes)
        prompts = Prompts(model, tiny)
        plain = Answers(model, prompts)
    except Exception as error:  # any code of transformers can run here
        return Checked(folder, name, "", "plain model fails", _last_line(error), {})
    try:
        family = type(family_of(model)).__module__.rpartition(".")[2]
    except UserError as error:
        return Checked(folder, name, "", "refused", str(error).partition(". It supports")[0], {})
    cells = {method.name(): _check_method(model, prompts, plain, method) for method in methods()}
    of_video = [NoCompression(), RandomTokens(keep=0.5), EVS(keep=0.5)]
    video = check_video(model, prompts, of_video, TOLERANCE)
    return Checked(folder, name, family, "", "", cells, video)


def methods() -> Iterator[Compressor]:
    """Return each method with half of the tokens, or with its default settings if it has no budget."""
    for name, cls in available().items():
        if name not in COMBINED:
            yield cls().with_keep(0.5) if "keep" in cls.field_names() else cls()


def versions() -> dict[str, str]:
    """Return the versions that the results depend on."""
    return {"vlmzip": __version__, "transformers": transformers.__version__, "torch": torch.__version__}


class Answers:
    """What a model answers in each mode, and which checks hold for it."""

    def __init__(self, model: nn.Module, prompts: Prompts) -> None:
        self.logits = {mode: self._logits(model, prompts.batch(*rows)) for mode, rows in MODES.items()}
        try:
            self.is_batch_alone = _close(self.logits["batch"], self.rows_alone(model, prompts))
        except TypeError:  # some models need an image
            self.is_batch_alone = False
        inputs = prompts.batch(*MODES["image"])
        self.tokens = self.cached(model, inputs)
        self.is_cached_uncached = self.is_causal(model, prompts) and torch.equal(
            self.tokens, self.uncached(model, prompts)
        )

    @staticmethod
    @torch.no_grad()
    def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
        """Return the logits of the last token of each row."""
        logits: Tensor = model(**inputs).logits[:, -1].float()
        return logits

    @classmethod
    def is_causal(cls, model: nn.Module, prompts: Prompts) -> bool:
        """Return whether the prompt is the same to the model if an answer follows it.

        PaliGemma's `forward` lets the tokens of a prompt see later ones, which an answer without a cache changes.
        """
        (row,) = MODES["image"]
        inputs = prompts.batch([*row, SUPPRESSED[-1] + 1])
        with torch.no_grad():
            before_last = model(**inputs).logits[:, -2].float()
        return _close(before_last, cls._logits(model, prompts.batch(row)))

    @classmethod
    def rows_alone(cls, model: nn.Module, prompts: Prompts) -> Tensor:
        """Return the logits of the rows of the batch, one row at a time."""
        rows, first = [], 0
        for row in MODES["batch"]:
            rows.append(cls._logits(model, prompts.batch(row, first=first)))
            first += row.count("image")
        return torch.cat(rows)

    @staticmethod
    @torch.no_grad()
    def cached(model: Any, inputs: Inputs) -> Tensor:
        """Return the new tokens of a greedy answer."""
        tokens: Tensor = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False, suppress_tokens=SUPPRESSED)
        return tokens[:, -ANSWER:]

    @classmethod
    def uncached(cls, model: nn.Module, prompts: Prompts, length: int = ANSWER) -> Tensor:
        """Return the new tokens of a greedy answer without a cache: the whole prompt again for each token."""
        (row,) = MODES["image"]
        tokens: list[int] = []
        for _ in range(length):
            logits = cls._logits(model, prompts.batch([*row, *tokens]))
            logits[:, SUPPRESSED] = -torch.inf
            tokens.append(int(logits.argmax()))
        return torch.tensor([tokens])


def _check_method(model: nn.Module, prompts: Prompts, plain: Answers, method: Compressor) -> dict[str, list[str]]:
    """Return the status and the reason of a method in each mode."""
    cells = {}
    for mode, rows in MODES.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with attach(model, method) as compressed:
                    fault = _fault(compressed, prompts, plain, mode, rows, is_plain=method.name() == "no_compression")
        except UserError as error:
            cells[mode] = ["refused", str(error)]
        except Exception as error:  # whatever a model raises belongs into the table
            cells[mode] = ["fails", _last_line(error)]
        else:
            cells[mode] = ["fails" if fault else "works", fault]
    return cells


def _fault(
    compressed: CompressedModel, prompts: Prompts, plain: Answers, mode: str, rows: list[Row], *, is_plain: bool
) -> str:
    """Return what is wrong with the answers of a compressed model, or an empty text."""
    logits = Answers._logits(compressed, prompts.batch(*rows))
    if not logits.isfinite().all():
        return "its logits are not finite"
    if is_plain and not _close(logits, plain.logits[mode]):
        return (
            f"without compression, logits differ from the plain model's by {_distance(logits, plain.logits[mode]):.1e}"
        )
    if mode == "batch" and plain.is_batch_alone:
        alone = Answers.rows_alone(compressed, prompts)
        if not _close(logits, alone):
            return f"rows in a batch differ from the same rows alone by {_distance(logits, alone):.1e}"
    if mode == "image":
        tokens = Answers.cached(compressed, prompts.batch(*rows))
        # A method inside the LLM, or one that reads the question, may look at the last tokens of the prompt: an answer
        # that grows changes its choice.
        length = 1 if compressed.compressor.layers or compressed.compressor.text_aware else ANSWER
        if plain.is_cached_uncached and not torch.equal(
            tokens[:, :length], Answers.uncached(compressed, prompts, length)
        ):
            return "a generated answer differs from the answer without a cache"
    return ""


def _distance(logits: Tensor, others: Tensor) -> float:
    return float((logits - others).abs().max())


def _close(logits: Tensor, others: Tensor) -> bool:
    return _distance(logits, others) <= TOLERANCE * float(others.abs().max())


def _last_line(error: Exception) -> str:
    """Return the type, the first line and the place of an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {message} ({frame.filename.rpartition('/')[2]}:{frame.lineno})"
