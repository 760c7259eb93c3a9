"""Answer one question about images and videos and count the cost, for `ask`, `show` and `compare`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice

from PIL import Image

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, collecting_warnings, refusing
from vlmzip.lab.bench.timing import now
from vlmzip.models.family import Modality
from vlmzip.processor import InputDict, Inputs, Processor
from vlmzip.runtime.attach import attach
from vlmzip.runtime.detail import WORRYING
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.flops import kv_cache_bytes, prefill_flops
from vlmzip.runtime.images import load_image
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.prompt_text import special_tokens, unknown_words, visual_prompt
from vlmzip.runtime.report import ImageReport, Report
from vlmzip.runtime.saving import saved_weights
from vlmzip.runtime.videos import Clip, clip_arguments, is_video, read_clip_for, video_processor_of
from vlmzip.visualize.frames import draw_frames, first_frames
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


#: What a question is about: the path of an image, or the frames of a video.
Visual = str | Clip


def read_visuals(loaded: Loaded, paths: Sequence[str], frames: int | None = None) -> list[Visual]:
    """Return the paths of images as they are, and read the videos among them.

    `frames` is the number of frames of each video, evenly spaced; by default as many as the model's processor expects.
    Raise `UserError` for a video that cannot be read, and for a model that takes none.
    """
    if not any(map(is_video, paths)):
        return list(paths)
    processor = video_processor_of(loaded.processor, loaded.name)
    visuals = [read_clip_for(processor, path, frames) if is_video(path) else path for path in paths]
    for clip in visuals:
        if isinstance(clip, Clip) and frames and len(clip.frames) < frames:
            log.warning(f"{clip.path} has only {len(clip.frames)} frames")
    return visuals


def build_inputs(loaded: Loaded, visuals: Sequence[Visual], question: str) -> dict[str, object]:
    """Return model inputs for one conversation turn with all images and videos before the question."""
    images = [load_image(path) for path in visuals if isinstance(path, str)]
    clips = [clip for clip in visuals if isinstance(clip, Clip)]
    check_question(loaded, question)
    if images and clips and (shared := _shared_inputs(loaded.processor)):
        raise UserError(
            f"the processor of {loaded.name} puts images and videos into the same {min(shared)}: ask about one kind"
        )
    counts = sorted({len(clip.frames) for clip in clips})
    if len(counts) > 1 and loaded.family.stacks_videos:
        raise UserError(
            f"{loaded.name} takes videos of equally many frames, and these have {' and '.join(map(str, counts))}:"
            f" ask about one, or give --frames {counts[0]}"
        )
    prompt = visual_prompt(loaded.family, loaded.processor, question, [kind_of(visual) for visual in visuals])
    settings: dict[str, object] = dict(special_tokens(loaded.processor.tokenizer, prompt))
    if clips:
        settings |= clip_arguments(clips)
    with refusing(f"{loaded.name}'s processor refuses the video") if clips else nullcontext():
        inputs = loaded.processor(images=images or None, text=prompt, return_tensors="pt", **settings)
    return dict(inputs.to(loaded.model.device, loaded.model.dtype))


def check_question(loaded: Loaded, question: str) -> None:
    """Raise `UserError` for a question with a placeholder; log a warning for words that the model does not know."""
    for kind in ("image", "video"):
        if f"<{kind}>" in question or getattr(loaded.processor, f"{kind}_token", f"<{kind}>") in question:
            raise UserError(f"the question must not contain <{kind}>: {kind}s are placed before it")
    if words := unknown_words(loaded.processor, question):
        log.warning(f"{loaded.name} does not know {', '.join(map(repr, dict.fromkeys(words)))}")


def _shared_inputs(processor: Processor) -> set[str]:
    """Return the inputs that hold images or videos; processors replace those of images with those of videos."""
    parts = (processor.image_processor, getattr(processor, "video_processor", None))
    image_names, video_names = (set(getattr(part, "model_input_names", ())) for part in parts)
    return {name for name in image_names & video_names if name.startswith("pixel_values")}


def refuse_methods_for_clips(loaded: Loaded, compressor: Compressor, visuals: Sequence[Visual], inputs: Inputs) -> None:
    """Raise `UserError` if a method compares the frames of a video and the model takes them as images."""
    are_images = any(isinstance(visual, Clip) for visual in visuals) and "pixel_values_videos" not in inputs
    for stage in compressor.stages() if are_images else ():
        if stage.sees_clip:
            raise UserError(
                f"{stage.name()} compares the frames of a video, and {loaded.name} takes each frame as an image:"
                " choose another method"
            )


def kind_of(visual: Visual) -> Modality:
    return "video" if isinstance(visual, Clip) else "image"


def by_visual(visuals: Sequence[Visual], report: Report) -> list[list[ImageReport]]:
    """Return the reports on each image or video. Some models take the frames of a video as images."""
    remaining, parts = iter(report.images), []
    for visual in visuals:
        first = next(remaining)
        more = len(visual.frames) - 1 if isinstance(visual, Clip) and first.modality == "image" else 0
        parts.append([first, *islice(remaining, more)])
    return parts


def account_of(visual: Visual, reports: Sequence[ImageReport]) -> dict[str, object]:
    """Return the counts of an image or video for JSON, and the frames of a video."""
    lost = [report.detail_lost for report in reports]
    worst = None if None in lost else max(filter(None, lost), default=0.0)
    counts: dict[str, object] = {
        "path": path_of(visual),
        "before": sum(report.before for report in reports),
        "after": sum(report.after for report in reports),
        "by_layer": tuple(map(sum, zip(*(report.by_layer for report in reports), strict=True))),
        "detail_lost": worst and round(worst, 3),
    }
    if isinstance(visual, Clip):
        counts |= {"frames": visual.numbers, "seconds": visual.seconds}
    return counts


def path_of(visual: Visual) -> str:
    return visual.path if isinstance(visual, Clip) else visual


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
    # Stored images need neither.
    spent = {"vision encoder": parts.get("encoder", 0.0), "selection": parts.get("selection", 0.0)}
    spent["LLM"] = total - sum(spent.values()) - parts.get("bookkeeping", 0.0)
    report = compressed.report
    text_tokens = inputs["input_ids"].shape[1] - report.before
    by_layer = [text_tokens + count for count in report.by_layer]
    flops, kv_bytes = prefill_flops(loaded.family, by_layer), kv_cache_bytes(loaded.family, by_layer)
    account = Account(report.after, text_tokens + report.after, flops, kv_bytes, spent)
    return TimedAnswer(text, account, report)


def plain_account(loaded: Loaded, inputs: InputDict, report: Report) -> dict[str, object]:
    """Return the cost of the same prompt without compression. It is computed, not measured."""
    prompt = inputs["input_ids"].shape[1]
    account = Account(
        report.before, prompt, prefill_flops(loaded.family, prompt), kv_cache_bytes(loaded.family, prompt), {}
    )
    counted = asdict(account)
    del counted["milliseconds"]
    return counted


def warn_about_detail(report: Report, visuals: Sequence[Visual]) -> None:
    """Log a warning for each image and video that lost more detail than reading text allows.

    A method that restores all tokens after each layer gets no warning: its token map describes single layers only. A
    chain with such a method does, because the methods before it lose detail for good.
    """
    if report.compressor.restores:
        return
    for visual, reports in zip(visuals, by_visual(visuals, report), strict=True):
        worst = max(reports, key=lambda image: image.detail_lost or 0)
        if (worst.detail_lost or 0) > WORRYING:
            count = sum(image.by_layer[-1] for image in reports)
            log.warning(
                f"{count} token{'s leave' if count > 1 else ' leaves'} out {worst.detail_lost:.0%} of the detail in"
                f" {path_of(visual)}; dense text and small print need more (--keep 50%)"
            )


def draw(loaded: Loaded, inputs: dict[str, object], report: Report, visuals: Sequence[Visual]) -> Image.Image:
    """Draw the token maps of all images and videos, one below the other."""
    seen = iter(seen_images(loaded, inputs, visuals, report))
    pages: list[Image.Image] = []
    for visual, reports in zip(visuals, by_visual(visuals, report), strict=True):
        before, after = (sum(getattr(image, name) for image in reports) for name in ("before", "after"))
        counts = f"{report.compressor.name()}: {before} to {after} visual tokens"
        views = [view for of_image in islice(seen, len(reports)) for view in of_image]
        if isinstance(visual, Clip):
            pages.append(draw_frames(f"{visual.path}, {counts}", views, reports, visual))
        else:
            pages += _pages_of_views(counts, views, reports[0])
    return stack(pages)


def _pages_of_views(counts: str, seen: Sequence[Image.Image], image: ImageReport) -> list[Image.Image]:
    pages = []
    for number, (view_seen, view) in enumerate(zip(seen, image.views, strict=True), 1):
        assert view.token_map is not None  # methods without a map are refused earlier, see `check_method`
        title = counts if len(seen) == 1 else f"{counts}, view {number} of {len(seen)}"
        pages.append(draw_tokens(view_seen, view.token_map, view.grid, view.prefix, title))
    return pages


def seen_images(
    loaded: Loaded, inputs: dict[str, object], visuals: Sequence[Visual], report: Report
) -> list[list[Image.Image]]:
    """Return what each view covers of the image or video of each report, and each frame of it for videos."""
    originals: list[list[Image.Image]] = []
    for visual, reports in zip(visuals, by_visual(visuals, report), strict=True):
        if isinstance(visual, Clip) and len(reports) == 1:
            originals.append(first_frames(visual, len(reports[0].frames)))
        else:
            originals += [[frame] for frame in (visual.frames if isinstance(visual, Clip) else [load_image(visual)])]
    seen: dict[int, list[Image.Image]] = {}
    for family in loaded.family.modalities:
        numbers = [number for number, image in enumerate(report.images) if image.modality == family.modality]
        if numbers:
            processor = getattr(loaded.processor, f"{family.modality}_processor")
            reports = [report.images[number] for number in numbers]
            views = seen_views(family, processor, inputs, reports, [originals[number] for number in numbers])
            seen |= dict(zip(numbers, views, strict=True))
    return [seen[number] for number in range(len(report.images))]
