"""Ovis2: an encoder without CLS whose 36 visual tokens are mixtures of a visual vocabulary, and a Qwen2."""

from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2Processor
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from tests.tiny import IMAGE_TOKEN, LLM, SIDE, TOKENS, VIT, VOCABULARY, Family, tiny_tokenizer


class Processor(Ovis2Processor):
    """With the placeholder of the tiny tokenizer."""

    def replace_image_token(self, image_inputs, image_idx, **settings):
        return super().replace_image_token(image_inputs, image_idx, **settings).replace("<IMG_ATOM>", "<image>")


class Ovis2(Family):
    name = "ovis2"
    model_class = Ovis2ForConditionalGeneration
    scored_by = "all tokens"

    @classmethod
    def config(cls, **settings):
        return Ovis2Config(
            vision_config=dict(**VIT, vocab_size=67, num_visual_indicator_tokens=3),
            text_config=dict(model_type="qwen2", **LLM, bos_token_id=1, eos_token_id=2),
            image_token_id=IMAGE_TOKEN,
            visual_indicator_token_ids=[96, 97, 98],
            hidden_size=LLM["hidden_size"],
            vocab_size=VOCABULARY,
            **settings,
        )

    @classmethod
    def processor(cls):
        images = Ovis2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=False)
        return Processor(images, tiny_tokenizer(), image_seq_length=TOKENS)

    def encoded(self, inputs):
        return self.model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
