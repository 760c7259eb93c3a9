"""From the form to model inputs. Images pass the checks of the server's API; clips have the same limits."""

from __future__ import annotations

import base64
import binascii
import copy
import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from pydantic import ValidationError

from vlmzip.compressor import Profile
from vlmzip.errors import UserError, alternatives, refusing
from vlmzip.models import FAMILIES
from vlmzip.models.family import Family
from vlmzip.processor import InputDict
from vlmzip.runtime.images import COMMON_FORMATS
from vlmzip.runtime.prompt_text import special_tokens, unknown_words, visual_prompt
from vlmzip.runtime.videos import (
    BYTES_PER_PIXEL,
    Clip,
    clip_arguments,
    evenly_spaced,
    expected_frames,
    read_clip,
    video_processor_of,
)
from vlmzip.serving.server.images import read_images
from vlmzip.serving.server.schema import ChatRequest
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.worker import HuggingFaceEngine

#: Characters of a question.
LONGEST = 2000
#: Frames of a clip that are read at most.
MOST_FRAMES = 32
_CLIP = re.compile(r"data:video/[\w.+-]{1,40};base64,", re.ASCII | re.IGNORECASE)
#: What files of MP4 and MOV, WebM and MKV, and AVI begin with. FFmpeg reads playlists, too, which name other files.
_BEGINNINGS = re.compile(rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI ", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """A question about an image or a clip, ready for every method."""

    visual: Image.Image | Clip
    inputs: InputDict
    """The outputs of the processor, on the CPU."""
    family: Family
    """The family for images or for videos."""
    profile: Profile
    """The sizes that budgets are set for: those of this image or clip, or of a frame that is taken as an image."""
    note: str = ""

    @property
    def is_clip(self) -> bool:
        return isinstance(self.visual, Clip)

    @property
    def visual_tokens(self) -> int:
        """Return the number of visual tokens without compression, to which a budget refers."""
        return self.profile.size


class Reader:
    """Reads questions for a model. Several threads can use it."""

    def __init__(self, engine: HuggingFaceEngine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        # Tokenizers refuse to be used by two threads at once, and the server uses the other one.
        self._processor = copy.deepcopy(engine.loaded.processor)
        self._one_at_a_time = threading.Lock()
        self.takes_clips = len(engine.loaded.family.modalities) > 1 and hasattr(self._processor, "video_processor")

    @property
    def about_clips(self) -> str:
        """Return what the page says about clips."""
        if self.takes_clips:
            return "This model takes images and short clips (MP4, MOV, WebM, MKV or AVI)."
        return "This model takes images, not clips."

    def read(self, url: str, question: str) -> Asked:
        """Return a question about an image or a clip, which is a data URL.

        Raise `UserError` or `RequestError` for anything that cannot be answered.
        """
        if not url:
            raise UserError("give an image first: drop one on the field, or choose an example")
        if len(question) > LONGEST:
            raise UserError(f"the question has {len(question):,} characters; at most {LONGEST:,} are allowed")
        if url[:11].lower() == "data:video/":
            asked = self._clip(url, question)
        elif url[:11].lower() == "data:image/":
            asked = self._image(url, question)
        else:
            raise UserError(f"the file is not {alternatives(COMMON_FORMATS)}")
        return replace(asked, note=self._note(question))

    def _note(self, question: str) -> str:
        with self._one_at_a_time:
            unknown = dict.fromkeys(unknown_words(self._processor, question))
        return f"{self._engine.model} does not know {', '.join(map(repr, unknown))}" if unknown else ""

    def _image(self, url: str, question: str) -> Asked:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {
            "model": self._engine.model,
            "messages": [{"role": "user", "content": parts}],
            "vlmzip": {"method": "no_compression"},
        }
        try:
            request = ChatRequest.model_validate(body)
        except ValidationError as error:
            raise UserError(f"this cannot be asked: {error.errors()[0]['msg']}") from None
        prepared = self._engine.prepare(request)
        (image,) = read_images([url], self._settings)
        return self._asked(image, prepared.inputs, self._engine.loaded.family)

    def _clip(self, url: str, question: str) -> Asked:
        if not self.takes_clips:
            able = ", ".join(family.example for family in FAMILIES if family.video_inputs)
            raise UserError(f"{self._engine.model} takes no clips; models that take them are {able}")
        clip = self._read_clip(_bytes_of_clip(url))
        loaded = self._engine.loaded
        if any(f"<{kind}>" in question or getattr(self._processor, f"{kind}_token", f"<{kind}>") in question
               for kind in ("image", "video")):  # fmt: skip
            raise UserError("the question must not contain the placeholder of an image or video")
        with self._one_at_a_time, refusing("the processor refuses the clip"):
            prompt = visual_prompt(loaded.family, self._processor, question, ["video"])
            settings = special_tokens(self._processor.tokenizer, prompt) | clip_arguments([clip])
            inputs = dict(self._processor(text=prompt, return_tensors="pt", **settings))
        return self._asked(clip, inputs, loaded.family.present_in(inputs)[0])

    def _read_clip(self, content: bytes) -> Clip:
        """Return as many frames as the model expects, or as the server's limit of pixels allows."""
        processor = video_processor_of(self._processor, self._engine.model)
        pixels = self._settings.max_pixels

        def choose(total: int, fps: float | None) -> Sequence[int]:
            width, height = first.frames[0].size
            most = min(MOST_FRAMES, pixels // (width * height))
            return evenly_spaced(total, min(expected_frames(processor, total, fps), most))

        with tempfile.TemporaryDirectory(prefix="vlmzip-clip-") as folder:
            path = Path(folder, "clip")
            path.write_bytes(content)
            try:
                first = read_clip(path, lambda total, fps: [0], BYTES_PER_PIXEL * pixels)
                clip = read_clip(path, choose, BYTES_PER_PIXEL * pixels)
            except UserError as error:
                raise UserError(str(error).replace(repr(str(path)), "the clip")) from None
        return replace(clip, path="clip")

    def _asked(self, visual: Image.Image | Clip, inputs: InputDict, family: Family) -> Asked:
        layouts = family.layouts(inputs)
        seen = layouts[0] if layouts[0].is_video else layouts[0].unpadded()[0]  # what the LLM sees, as in reports
        first, *others = seen.views
        profile = replace(family.profile(), grid=first, tiles=tuple(others))
        return Asked(visual, inputs, family, profile)


def _bytes_of_clip(url: str) -> bytes:
    match = _CLIP.match(url)
    try:
        content = base64.b64decode(url[match.end() :] if match else "", validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not _BEGINNINGS.match(content):
        raise UserError("the file is not a video in MP4, MOV, WebM, MKV or AVI")
    return content
