"""The config of Mini-Gemini."""

from __future__ import annotations

from typing import Any

from transformers import ConvNextConfig, LlavaConfig, PreTrainedConfig


class MiniGeminiConfig(LlavaConfig):
    """LLaVA's config with a second encoder.

    `vision_config` is CLIP's. `aux_config` describes the ConvNeXt that sees each image at a high resolution.
    `image_grid` is 1, or 2 for the HD models, which encode 2 x 2 crops of each image and a global view with CLIP.
    """

    model_type = "mini_gemini"

    aux_config: dict[str, Any] | PreTrainedConfig | None = None
    image_grid: int = 1

    def __post_init__(self, **kwargs: object) -> None:
        # It is not among `sub_configs`, whose models all have attention.
        if self.aux_config is None:  # OpenCLIP's `convnext_large_d_320`, the one of the published checkpoints
            self.aux_config = ConvNextConfig(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3])
        elif isinstance(self.aux_config, dict):
            self.aux_config = ConvNextConfig(**self.aux_config)
        super().__post_init__(**kwargs)

    @property
    def views(self) -> int:
        """The number of images that CLIP sees of one image: the image, or a global view and its crops."""
        return 1 if self.image_grid == 1 else 1 + self.image_grid**2
