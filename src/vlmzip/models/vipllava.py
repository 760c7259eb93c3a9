"""ViP-LLaVA: LLaVA with concatenated features of several encoder layers, in one tensor for all images."""

from __future__ import annotations

from typing import Any, ClassVar

from vlmzip.models.llava import Llava
from vlmzip.processor import Inputs
from vlmzip.visual_tokens import Site


class VipLlava(Llava):
    """`VipLlavaForConditionalGeneration`. Attention row and keys come from the deepest feature layer."""

    model_types = ("vipllava",)
    example = "llava-hf/vip-llava-7b-hf"
    sites: ClassVar[tuple[Site, ...]] = (Site.PIXELS, Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)
    features_as_list = False

    def setting(self, inputs: Inputs, name: str, default: Any = None) -> Any:
        if name == "vision_feature_layer" and not hasattr(self.model.config, name):
            name = "vision_feature_layers"  # the name of the setting up to transformers 5.21
        return super().setting(inputs, name, default)
