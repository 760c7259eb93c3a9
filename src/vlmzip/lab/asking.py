"""Answer one question about images and count the cost, for `ask`, `show` and `compare`."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, collecting_warnings
from vlmzip.lab.bench.timing import now
from vlmzip.processor import InputDict
from vlmzip.runtime.attach import attach
from vlmzip.runtime.detail import WORRYING
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.flops import kv_cache_bytes, prefill_flops
from vlmzip.runtime.images import load_image
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.prompt_text import chat_prompt, special_tokens, unknown_words
from vlmzip.runtime.report import Report
from vlmzip.runtime.saving import saved_weights
from vlmzip.visualize.overlay import draw_tokens, stack
from vlmzip.visualize.views import seen_views

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Account:
    """The cost of an answer."""

    visual_tokens: int
    prompt_tokens: int
    prefill_flops: int
    kv_cache_bytes: int
    milliseconds: dict[str, float]
    """Times of the vision encoder, the selection, and the LLM (projector, prefill and decoding)."""


@dataclass(frozen=True)
class TimedAnswer:
    text: str
    account: Account
    report: Report


def build_inputs(loaded: Loaded, paths: list[str], question: str) -> dict[str, object]:
    """Return model inputs for one conversation turn with all images before the question."""
    images = [load_image(path) for path in paths]
    if "<image>" in question or getattr(loaded.processor, "image_token", "<image>") in question:
        raise UserError("the question must not contain <image>: images are placed before it")
    if words := unknown_words(loaded.processor, question):
        log.warning(f"{loaded.name} does not know {', '.join(map(repr, dict.fromkeys(words)))}")
    prompt = chat_prompt(loaded.family, loaded.processor, question, len(images))
    special = special_tokens(loaded.processor.tokenizer, prompt)
    inputs = loaded.processor(images=images or None, text=prompt, return_tensors="pt", **special)
    return dict(inputs.to(loaded.model.device, loaded.model.dtype))


def attach_and_note(loaded: Loaded, compressor: Compressor) -> CompressedModel:
    """Attach a compressor, and log each of the warnings once."""
    compressed, notes = attach_with_notes(loaded, compressor)
    for text in notes:
        log.warning(text)
    return compressed


def attach_with_notes(loaded: Loaded, compressor: Compressor) -> tuple[CompressedModel, list[str]]:
    """Attach a compressor, and return the warnings too."""
    with collecting_warnings() as notes:
        compressed = attach(loaded.model, compressor, weights=saved_weights(compressor, loaded.name))
    return compressed, notes


def answer(loaded: Loaded, compressed: CompressedModel, inputs: InputDict, max_new_tokens: int) -> TimedAnswer:
    """Answer with greedy decoding, and time the whole and its parts."""
    start = now(loaded.model.device)
    out = compressed.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    total = 1000 * (now(loaded.model.device) - start)
    new = out[0, inputs["input_ids"].shape[1] :]
    text = loaded.processor.decode(new, skip_special_tokens=True).strip()
    parts = compressed.report.milliseconds
    spent = {"vision encoder": parts["encoder"], "selection": parts["selection"]}
    spent["LLM"] = total - sum(spent.values()) - parts.get("bookkeeping", 0.0)
    report = compressed.report
    text_tokens = inputs["input_ids"].shape[1] - report.before
    by_layer = [text_tokens + count for count in report.by_layer]
    flops, kv_bytes = prefill_flops(loaded.family, by_layer), kv_cache_bytes(loaded.family, by_layer)
    account = Account(report.after, text_tokens + report.after, flops, kv_bytes, spent)
    return TimedAnswer(text, account, report)


def plain_account(loaded: Loaded, inputs: InputDict, report: Report) -> dict[str, Any]:
    """Return the cost of the same prompt without compression. It is computed, not measured."""
    prompt = inputs["input_ids"].shape[1]
    account = Account(
        report.before, prompt, prefill_flops(loaded.family, prompt), kv_cache_bytes(loaded.family, prompt), {}
    )
    counted = asdict(account)
    del counted["milliseconds"]
    return counted


def warn_about_detail(report: Report, paths: list[str]) -> None:
    """Log a warning for each image that lost more detail than reading text allows."""
    for image, path in zip(report.images, paths, strict=True):
        if (image.detail_lost or 0) > WORRYING:
            count = image.by_layer[-1]
            log.warning(
                f"{count} token{'s leave' if count > 1 else ' leaves'} out {image.detail_lost:.0%} of the detail in"
                f" {path}; dense text and small print need more (--keep 50%)"
            )


def draw(loaded: Loaded, inputs: dict[str, object], report: Report, paths: list[str]) -> Image.Image:
    """Draw the token maps of all images, one below the other."""
    pages = []
    for views, image in zip(seen_images(loaded, inputs, paths, report), report.images, strict=True):
        counts = f"{report.compressor.name()}: {image.before} to {image.after} visual tokens"
        for number, (seen, view) in enumerate(zip(views, image.views, strict=True), 1):
            assert view.token_map is not None  # methods without a map are refused earlier, see `check_method`
            title = counts if len(views) == 1 else f"{counts}, view {number} of {len(views)}"
            pages.append(draw_tokens(seen, view.token_map, view.grid, view.prefix, title))
    return stack(pages)


def seen_images(loaded: Loaded, inputs: dict[str, object], paths: list[str], report: Report) -> list[list[Image.Image]]:
    """Return the views of the images, cropped to the areas that their grids cover."""
    images = [load_image(path) for path in paths]
    return seen_views(loaded.family, loaded.processor.image_processor, inputs, report.images, images)
