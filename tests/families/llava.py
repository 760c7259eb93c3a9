"""LLaVA 1.5: a CLIP with CLS, whose last layer but one makes 36 visual tokens, and a Llama."""

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests.tiny import IMAGE_TOKEN, LLM, PATCH, SIDE, TOKENS, VIT, Family, tiny_tokenizer


class Llava(Family):
    name = "llava"
    leads = True
    every_case = True
    model_class = LlavaForConditionalGeneration

    @classmethod
    def config(cls, **settings):
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**VIT),
            text_config=LlamaConfig(**LLM, bos_token_id=1, eos_token_id=2),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=TOKENS,
            **settings,
        )

    @classmethod
    def processor(cls):
        images = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
        return LlavaProcessor(images, tiny_tokenizer(), PATCH, "default", num_additional_image_tokens=1)
