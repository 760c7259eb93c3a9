"""Video-LLaVA: LLaVA with two encoders; the LLM sees CLS of each of a video's frames."""

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaProcessor,
)

from tests.families.llava import Llava
from tests.families.qwen2_5_vl import ImagesOnly
from tests.tiny import IMAGE_TOKEN, LLM, PATCH, SIDE, TOKENS, VIDEO_TOKEN, VIT, tiny_tokenizer


class Processor(ImagesOnly, VideoLlavaProcessor):
    pass


class VideoLlava(Llava):
    name = "video_llava"
    since = "5.23"  # before it, pixel_values had another name in this model
    every_case = False
    seed = 2
    model_class = VideoLlavaForConditionalGeneration
    clips = ((3, SIDE // PATCH, SIDE // PATCH),)
    clip_prefix = 1

    @classmethod
    def config(cls, **settings):
        return VideoLlavaConfig(
            vision_config=CLIPVisionConfig(**VIT),
            text_config=LlamaConfig(**LLM, bos_token_id=1, eos_token_id=2),
            image_token_index=IMAGE_TOKEN,
            video_token_index=VIDEO_TOKEN,
            image_seq_length=TOKENS,
            **settings,
        )

    @classmethod
    def processor(cls):
        images = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
        return Processor(images, None, tiny_tokenizer(), PATCH, "default", num_additional_image_tokens=1)

    def encoded(self, inputs):
        hidden = self.model.model.image_tower(self.pixels_of_views(inputs), output_hidden_states=True).hidden_states
        return hidden[self.feature_layers[0]]
