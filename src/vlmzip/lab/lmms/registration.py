"""The entry point by which lmms-eval finds this library: `--model vlmzip`."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Return which class lmms-eval uses for the model name `vlmzip`. lmms-eval calls this when it starts."""
    return ModelManifest(model_id="vlmzip", chat_class_path="vlmzip.lab.lmms.adapter.CompressedForLmms")
