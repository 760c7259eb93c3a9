"""The families of models: one file, one family."""

from __future__ import annotations

from torch import nn

from vlmzip.errors import UserError
from vlmzip.models.adapter import ModelAdapter
from vlmzip.models.llava import Llava
from vlmzip.models.llava_next import LlavaNext
from vlmzip.models.paligemma import PaliGemma
from vlmzip.models.qwen2_5_vl import Qwen25VL
from vlmzip.models.qwen3_vl import Qwen3VL
from vlmzip.models.vipllava import VipLlava

FAMILIES: tuple[type[ModelAdapter], ...] = (Llava, LlavaNext, PaliGemma, Qwen25VL, Qwen3VL, VipLlava)


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of the model's family. Raises `UserError` for a model that vlmzip cannot compress."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            adapter = family(model)
            if adapter.model.get_output_embeddings() is None:
                raise UserError(f"{type(model).__name__} has no head that answers: load AutoModelForImageTextToText")
            return adapter
    supported = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UserError(
        f"vlmzip cannot compress {type(model).__name__} (model type {model_type!r}); it supports: {supported}"
    )
