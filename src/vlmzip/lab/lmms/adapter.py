"""Let lmms-eval ask a model with a compressor: questions in batches, answers with their costs.

    python -m lmms_eval --model vlmzip --model_args "pretrained=DIR,method=visionzip(keep=64)" --tasks pope

    from lmms_eval.evaluator import simple_evaluate
    simple_evaluate(model=CompressedForLmms(compressed, processor, batch_size=8), tasks=["pope"])

Any error ends the run. lmms-eval's own adapters log an exception and return an empty answer, so that a broken method
gets a low score instead of an error.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.compressor_file import read_compressor
from vlmzip.errors import UserError, reason, telling_beyond_positions
from vlmzip.files import is_file
from vlmzip.lab.asking import attach_with_notes
from vlmzip.lab.lmms.requests import (
    NO_LIKELIHOODS,
    AnswerFailed,
    Chat,
    Generation,
    Message,
    read_chat,
    read_generation,
    read_settings,
)
from vlmzip.models import family_of
from vlmzip.outline import FILE, METHOD_FORMS
from vlmzip.processes import Processes
from vlmzip.processor import Processor
from vlmzip.runtime.answering import Answer, Answerer
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.loading import load
from vlmzip.runtime.prompt_text import conversation_prompt
from vlmzip.runtime.report import compact


def note(text: str) -> None:
    """Print a note for the user on stderr. lmms-eval's command line sets up no logging for this package."""
    print(f"note: {text}", file=sys.stderr)


@dataclass
class Costs(TokenCounts):
    """The token counts of one request, which lmms-eval writes next to the answer.

    `input_tokens` is the length of the compressed prompt.
    """

    visual_tokens: int = 0
    """The count without compression."""
    visual_tokens_by_layer: str = ""
    """The number at each LLM layer, in short form: `16`, or `144×2 → 18×4`."""
    retention: float = 1.0
    """Visual tokens over all layers, as a share of those without compression."""

    def to_dict(self) -> dict[str, object]:
        shown = {"visual_tokens": self.visual_tokens, "visual_tokens_by_layer": self.visual_tokens_by_layer}
        return {**super().to_dict(), **shown, "retention": round(self.retention, 6)}


@dataclass(frozen=True)
class LmmsQuestion:
    """A request: its index, the conversation, and the generation settings."""

    place: int
    chat: Chat
    generation: Generation


class CompressedForLmms(lmms):
    """A model that `attach` returned, for lmms-eval. The plain model has the compressor `NoCompression`."""

    is_simple = False  # tasks provide messages, not a text and images

    def __init__(self, compressed: CompressedModel, processor: Processor, batch_size: int = 1) -> None:
        """Prepare to answer. Raise `UserError` for a batch size below 1."""
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: give at least 1")
        self.compressed, self.batch_size = compressed, batch_size
        self.answerer = Answerer(family_of(compressed.inner), processor)
        self.device = self.answerer.family.model.device
        self.ends_process = False
        self._noted: set[str] = set()

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str | Mapping[str, str], additional_config: Mapping[str, object] | None = None
    ) -> CompressedForLmms:
        """Return the adapter for `--model_args`: `pretrained` (default mini), `method`, `device`, `dtype`,
        `batch_size`.

        End the process with code 2 on an error, because lmms-eval's command line catches every exception and then ends
        with 0.
        """
        config = {name: str(value) for name, value in (additional_config or {}).items() if value is not None}
        try:
            written = dict(arg_string) if isinstance(arg_string, Mapping) else read_settings(arg_string)
            family = cls._load(config | written)
        except UserError as error:
            print(f"vlmzip: {reason(error)}", file=sys.stderr)
            raise SystemExit(2) from error
        family.ends_process = True
        return family

    @classmethod
    def _load(cls, settings: Mapping[str, str]) -> CompressedForLmms:
        name = settings.get("pretrained", "mini")
        compressor = _compressor(name, settings.get("method"))
        device = Processes().device(settings.get("device"))
        loaded = load(name, device, settings.get("dtype"))
        compressor = compressor.placed(loaded.family.profile())
        compressed, notes = attach_with_notes(loaded, compressor)
        for text in notes:
            note(text)
        try:
            batch_size = int(settings.get("batch_size", 1))
        except ValueError:
            raise UserError(
                f"batch_size must be a number, got {settings['batch_size']!r}; vlmzip does not choose it by itself"
            ) from None
        return cls(compressed, loaded.processor, batch_size)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return the answers in the order of the requests."""
        results: list[object] = [None] * len(requests)
        start = time.perf_counter()
        with self._stopping(), tqdm(total=len(requests), desc="answering", disable=self.rank != 0) as bar:
            for begin in range(0, len(requests), self.batch_size):
                together = requests[begin : begin + self.batch_size]
                with _naming(together):
                    questions = [self._question(place, request) for place, request in enumerate(together, begin)]
                    for place, result in self._answer(questions):
                        results[place] = result
                bar.update(len(together))
        self._log(results, time.perf_counter() - start)
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Return the answers of all rounds of each request. Requests are answered one after the other."""
        with self._stopping():
            out = []
            for request in tqdm(requests, desc="answering", disable=self.rank != 0):
                with _naming([request]):
                    out.append(self._rounds(request))
            return out

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raise `UserError`. lmms-eval does not ask adapters that take messages for likelihoods."""
        with self._stopping():
            task = requests[0].args[-2] if requests else "this task"
            raise UserError(f"{task} {NO_LIKELIHOODS}")

    # ---------------------------------------------------------------- one batch

    def _question(self, place: int, request: Instance) -> LmmsQuestion:
        _, doc_to_messages, settings, doc_id, task, split = request.args
        chat = self._read(doc_to_messages(self.task_dict[task][split][doc_id]))
        return LmmsQuestion(place, chat, self._generation(settings))

    def _read(self, messages: Sequence[Message]) -> Chat:
        placeholders = {"<image>", getattr(self.answerer.processor, "image_token", "<image>")}
        return read_chat(messages, sorted(placeholders))

    def _generation(self, settings: Mapping[str, object]) -> Generation:
        generation = read_generation(settings)
        for name in generation.unused:
            if name not in self._noted:
                self._noted.add(name)
                note(f"the task's generation setting {name!r} means nothing here")
        return generation

    def _answer(self, questions: Sequence[LmmsQuestion]) -> Iterator[tuple[int, GenerationResult]]:
        """Answer in batches: questions with equal image counts and equal generation settings go together."""
        order = sorted(questions, key=_kind)
        for _, alike in groupby(order, key=_kind):
            group = list(alike)
            how = group[0].generation
            prompts = [self._prompt(question.chat) for question in group]
            images = [question.chat.images for question in group]
            answers = self.answerer.answer_prompts(self.compressed, prompts, images, **how.arguments)
            for question, answer in zip(group, answers, strict=True):
                yield question.place, GenerationResult(how.cut(answer.text), _costs(answer))

    def _prompt(self, chat: Chat) -> str:
        return conversation_prompt(self.answerer.family, self.answerer.processor, chat.messages)

    def _rounds(self, request: Instance) -> list[str]:
        """Return the answers of all rounds of a request.

        For each round the task makes a new conversation from the answers so far, until it says that it is done.
        """
        _, doc_to_messages, settings, doc_id, task, split = request.args
        doc, how = self.task_dict[task][split][doc_id], self._generation(settings)
        answers: list[str] = []
        messages, state, done = doc_to_messages(doc), None, False
        while not done:
            (_, result), *_ = self._answer([LmmsQuestion(0, self._read(messages), how)])
            answers.append(result.text)
            step = doc_to_messages(
                doc, round_idx=len(answers), previous_output=list(answers), previous_round_info=state
            )
            if not (isinstance(step, tuple) and len(step) == 4):
                break  # the task's messages do not depend on rounds
            messages, done, _, state = step
        return answers

    def _log(self, results: Sequence[GenerationResult], seconds: float) -> None:
        """Add the costs to lmms-eval's result file, under `throughput`."""
        costs = [result.token_counts for result in results if isinstance(result.token_counts, Costs)]
        new = sum(cost.output_tokens or 0 for cost in costs)
        means = {
            "visual_tokens_without_compression": sum(cost.visual_tokens for cost in costs) / max(1, len(costs)),
            "retention": sum(cost.retention for cost in costs) / max(1, len(costs)),
        }
        log_metrics(total_elapsed_time=seconds, total_gen_tokens=new, avg_speed=new / seconds, additional_metrics=means)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Let every error end the process, even under lmms-eval's command line."""
        try:
            with telling_beyond_positions(note):
                yield
        except Exception as error:
            if not self.ends_process:
                raise
            mistake = isinstance(error.__cause__ or error, UserError)
            if not mistake:
                traceback.print_exc()
            print(f"vlmzip: {error}", file=sys.stderr)
            raise SystemExit(2 if mistake else 1) from error


@contextmanager
def _naming(requests: Sequence[Instance]) -> Iterator[None]:
    """Add to an error the documents of the questions that broke."""
    try:
        yield
    except Exception as error:
        first, last = requests[0].args, requests[-1].args
        where = f"{first[4]}, document {first[3]}" + (f" to {last[4]}, document {last[3]}" if len(requests) > 1 else "")
        raise AnswerFailed(f"{where}: {reason(error)}") from error


def _kind(question: LmmsQuestion) -> tuple[int, str]:
    how = question.generation
    return len(question.chat.images), json.dumps([how.arguments, how.until], sort_keys=True, default=str)


def _costs(answer: Answer) -> Costs:
    after = answer.by_layer[0] if answer.by_layer else 0
    return Costs(
        input_tokens=answer.text_tokens + after,
        output_tokens=answer.new_tokens,
        visual_tokens=answer.visual_tokens,
        visual_tokens_by_layer=compact(answer.by_layer) if answer.by_layer else "0",
        retention=answer.retention,
    )


def _compressor(name: str, method: str | None) -> Compressor:
    """Return the compressor that `method` names, or the saved one. Raise `UserError` without either."""
    if method is not None:
        return spec.read(method)
    if is_file(Path(name) / FILE):
        return read_compressor(name)
    raise UserError(f"--model_args needs method=…, {METHOD_FORMS}; the plain model is method=no_compression")
