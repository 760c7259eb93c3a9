"""Mini-Gemini in transformers' style, which transformers itself does not have. Importing it registers the Auto classes.

Li et al., "Mini-Gemini: Mining the Potential of Multi-modality Vision Language Models" (arXiv 2403.18814).
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from vlmzip.mini_gemini.configuration import MiniGeminiConfig
from vlmzip.mini_gemini.image_processing import MiniGeminiImageProcessor
from vlmzip.mini_gemini.modeling import MiniGeminiForConditionalGeneration, MiniGeminiModel
from vlmzip.mini_gemini.processing import MiniGeminiProcessor

__all__ = [
    "MiniGeminiConfig",
    "MiniGeminiForConditionalGeneration",
    "MiniGeminiImageProcessor",
    "MiniGeminiModel",
    "MiniGeminiProcessor",
]

AutoConfig.register(MiniGeminiConfig.model_type, MiniGeminiConfig, exist_ok=True)
AutoModel.register(MiniGeminiConfig, MiniGeminiModel, exist_ok=True)
AutoModelForImageTextToText.register(MiniGeminiConfig, MiniGeminiForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(MiniGeminiConfig, image_processor_classes={"pil": MiniGeminiImageProcessor}, exist_ok=True)
AutoProcessor.register(MiniGeminiConfig, MiniGeminiProcessor, exist_ok=True)
