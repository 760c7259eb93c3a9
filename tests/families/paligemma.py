"""PaliGemma: a SigLIP without CLS, whose last layer makes 36 visual tokens, and a Gemma."""

import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.tiny import IMAGE_TOKEN, LLM, SIDE, TOKENS, VIT, Family, tiny_tokenizer


class PaliGemma(Family):
    name = "paligemma"
    model_class = PaliGemmaForConditionalGeneration
    scored_by = "all tokens"
    sees_prompt_both_ways = True
    generates_from_embeddings = False
    first_position = 1
    packs_rows = False

    @classmethod
    def config(cls, **settings):
        return PaliGemmaConfig(
            vision_config=dict(model_type="siglip_vision_model", **VIT, projection_dim=48, vision_use_head=False),
            text_config=dict(model_type="gemma", **LLM, head_dim=8),
            image_token_index=IMAGE_TOKEN,
            projection_dim=48,
            hidden_size=48,
            **settings,
        )

    @classmethod
    def processor(cls):
        images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
        images.image_seq_length = TOKENS
        return PaliGemmaProcessor(images, tiny_tokenizer())

    def token_types(self, ids, prompt_length):
        """The prompt sees both ways, later turns are causal."""
        later = torch.arange(ids.shape[1]) >= prompt_length
        return {"token_type_ids": later.long().expand_as(ids)}

    def encoded(self, inputs):
        return self.model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
