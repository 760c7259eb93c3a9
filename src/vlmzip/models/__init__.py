"""The families of models, one per file. Models of other families get the default family."""

from __future__ import annotations

from torch import nn

from vlmzip.errors import ADD_A_FAMILY, UserError
from vlmzip.models.family import Family
from vlmzip.models.llava import Llava
from vlmzip.models.llava_next import LlavaNext
from vlmzip.models.llava_next_video import LlavaNextVideo
from vlmzip.models.llava_onevision import LlavaOnevision
from vlmzip.models.mini_gemini import MiniGemini
from vlmzip.models.ovis2 import Ovis2
from vlmzip.models.paligemma import PaliGemma
from vlmzip.models.parts import missing_in
from vlmzip.models.qwen2_5_vl import Qwen25VL
from vlmzip.models.qwen2_vl import Qwen2VL
from vlmzip.models.qwen3_vl import Qwen3VL
from vlmzip.models.video_llava import VideoLlava
from vlmzip.models.vipllava import VipLlava

FAMILIES: tuple[type[Family], ...] = (
    Llava,
    LlavaNext,
    LlavaNextVideo,
    LlavaOnevision,
    MiniGemini,
    Ovis2,
    PaliGemma,
    Qwen25VL,
    Qwen2VL,
    Qwen3VL,
    VideoLlava,
    VipLlava,
)


def family_of(model: nn.Module) -> Family:
    """Return the family object for a model; the default `Family` for a model of another family.

    Raise `UserError` if vlmzip cannot compress the model.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = next((family for family in FAMILIES if model_type in family.model_types), None)
    if known is None and (missing := missing_in(model)):
        supported = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise UserError(
            f"vlmzip cannot compress {type(model).__name__} (model type {model_type!r}): it has no {missing};"
            f" {ADD_A_FAMILY}. It supports: {supported}"
        )
    family = Family(model) if known is None else known(model)
    if family.model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no head that answers: load AutoModelForImageTextToText")
    return family
