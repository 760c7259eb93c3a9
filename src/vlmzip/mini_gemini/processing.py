"""The processor of Mini-Gemini."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlavaProcessor
from transformers.processing_utils import MultiModalData


class MiniGeminiProcessor(LlavaProcessor):
    """LLaVA's processor, with placeholders for all views of an image."""

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: object) -> str:
        *views, _, height, width = image_inputs["pixel_values"][image_idx].shape
        side: int = self.patch_size
        return str(self.image_token) * ((height // side) * (width // side) * (views[0] if views else 1))

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[object] | None = None, **kwargs: object
    ) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        size, grid = self.image_processor.view_size, self.image_processor.image_grid
        views = 1 if grid == 1 else 1 + grid**2
        tokens = (size // self.patch_size) ** 2 * views
        images = len(image_sizes)
        return MultiModalData(num_image_tokens=[tokens] * images, num_image_patches=[views] * images)
