"""One question about some pictures, answered and accounted for; what `ask`, `show` and `compare` have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmzip.cli.loading import Loaded, note
from vlmzip.cli.pictures import load_picture
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.files import is_file
from vlmzip.measure.flops import kv_cache_bytes, prefill_flops
from vlmzip.measure.timing import now
from vlmzip.runtime.detail import WORRYING
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.prompts import chat_prompt, special_tokens, unknown_words
from vlmzip.runtime.report import Report
from vlmzip.runtime.saving import attach_saved
from vlmzip.visualize.overlay import draw_tokens, seen_picture, stack


@dataclass(frozen=True)
class Account:
    """What an answer cost."""

    visual_tokens: int
    prompt_tokens: int
    prefill_flops: int
    kv_cache_bytes: int
    milliseconds: dict[str, float]
    """vision encoder, selection and LLM (projector, prefill and decoding)."""


@dataclass(frozen=True)
class Answer:
    text: str
    account: Account
    report: Report


def build_inputs(loaded: Loaded, paths: list[str], question: str) -> dict[str, Any]:
    """Model inputs for one conversation turn with all pictures before the question."""
    pictures = [load_picture(path) for path in paths]
    if "<image>" in question or getattr(loaded.processor, "image_token", "<image>") in question:
        raise UserError("the question must not contain <image>: pictures are placed before it")
    if words := unknown_words(loaded.processor, question):
        note(f"{loaded.name} does not know {', '.join(map(repr, dict.fromkeys(words)))}")
    prompt = chat_prompt(loaded.adapter, loaded.processor, question, len(pictures))
    special = special_tokens(loaded.processor.tokenizer, prompt)
    inputs = loaded.processor(images=pictures or None, text=prompt, return_tensors="pt", **special)
    return dict(inputs.to(loaded.model.device, loaded.model.dtype))


def compressed(loaded: Loaded, compressor: Compressor) -> CompressedModel:
    """`attach`, with its warnings as one note each."""
    small, notes = attach_with_notes(loaded, compressor)
    for said in notes:
        note(said)
    return small


def attach_with_notes(loaded: Loaded, compressor: Compressor) -> tuple[CompressedModel, list[str]]:
    """`attach`, and what it warns of."""
    return attach_saved(loaded.model, compressor, loaded.name)


def answer(loaded: Loaded, small: CompressedModel, inputs: dict[str, Any], max_new_tokens: int) -> Answer:
    """Greedy decoding, timed as a whole and by part."""
    start = now(loaded.model.device)
    out = small.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    total = 1000 * (now(loaded.model.device) - start)
    new = out[0, inputs["input_ids"].shape[1] :]
    text = loaded.processor.decode(new, skip_special_tokens=True).strip()
    parts = small.report.milliseconds
    spent = {"vision encoder": parts["encoder"], "selection": parts["selection"]}
    spent["LLM"] = total - sum(spent.values()) - parts.get("bookkeeping", 0.0)
    report = small.report
    text_tokens = inputs["input_ids"].shape[1] - report.before
    by_layer = [text_tokens + count for count in report.by_layer]
    flops, kv_bytes = prefill_flops(loaded.adapter, by_layer), kv_cache_bytes(loaded.adapter, by_layer)
    account = Account(report.after, text_tokens + report.after, flops, kv_bytes, spent)
    return Answer(text, account, report)


def plain_account(loaded: Loaded, inputs: dict[str, Any], report: Report) -> dict[str, Any]:
    """What the same prompt costs without compression; counted, not run."""
    prompt = inputs["input_ids"].shape[1]
    account = Account(
        report.before, prompt, prefill_flops(loaded.adapter, prompt), kv_cache_bytes(loaded.adapter, prompt), {}
    )
    counted = asdict(account)
    del counted["milliseconds"]
    return counted


def warn_about_detail(report: Report, paths: list[str]) -> None:
    """One note for each picture that lost more detail than reading can spare."""
    for picture, path in zip(report.pictures, paths, strict=True):
        if (picture.detail_lost or 0) > WORRYING:
            count = picture.by_layer[-1]
            note(
                f"{count} token{'s leave' if count > 1 else ' leaves'} out {picture.detail_lost:.0%} of the detail in"
                f" {path}; dense text and small print need more (--keep 50%)"
            )


def draw(loaded: Loaded, inputs: dict[str, Any], report: Report, paths: list[str]) -> Image.Image:
    """The token maps of all pictures below one another."""
    pages = []
    for seen, picture in zip(seen_pictures(loaded, inputs, paths), report.pictures, strict=True):
        if picture.grid is None:
            raise UserError("the tokens left lie on no grid, so there is nothing to draw them on")
        assert picture.token_map is not None  # what has none is refused at the beginning, see `check_method`
        title = f"{report.compressor.name()}: {picture.before} to {picture.after} visual tokens"
        pages.append(draw_tokens(seen, picture.token_map, picture.grid, picture.prefix, title))
    return stack(pages)


def seen_pictures(loaded: Loaded, inputs: dict[str, Any], paths: list[str]) -> list[Image.Image]:
    """The pictures as their grids cover them."""
    images, pixels = loaded.processor.image_processor, inputs[loaded.adapter.picture_inputs[0]]
    if pixels.ndim == 4:  # pictures as the encoder sees them, cropped and scaled
        return [seen_picture(one, images.image_mean, images.image_std) for one in pixels]
    return [load_picture(path) for path in paths]  # patches of any number: the grid covers the whole picture


def split_pictures_and_question(words: list[str], command: str) -> tuple[list[str], str]:
    """`IMAGE… QUESTION`: the last word is the question. Raises `UserError` where it looks like a forgotten one."""
    *paths, question = words
    if not paths:
        if Path(question).suffix.lower() in Image.registered_extensions():
            raise UserError(f'there is a picture but no question; try: vlmzip {command} {question} "What is there?"')
        raise UserError(f'give at least one picture before the question: vlmzip {command} picture.png "What is there?"')
    if is_file(question) or Path(question).suffix.lower() in Image.registered_extensions():
        raise UserError(f"the last word is the question, but {question!r} is a picture: add a question behind it")
    if not question.strip():
        raise UserError("the question is empty")
    return paths, question
