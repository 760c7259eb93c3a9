"""ViP-LLaVA: as LLaVA, but the features of a visual token come from two layers of the CLIP."""

from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

from tests.families.llava import Llava
from tests.tiny import IMAGE_TOKEN, LLM, VIT


class VipLlava(Llava):
    name = "vipllava"
    model_class = VipLlavaForConditionalGeneration
    feature_layers = (-2, 1)
    seed = 2

    @classmethod
    def config(cls, **settings):
        return VipLlavaConfig(
            vision_config=CLIPVisionConfig(**VIT),
            text_config=LlamaConfig(**LLM, bos_token_id=1, eos_token_id=2),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layers=list(cls.feature_layers),
            **settings,
        )
