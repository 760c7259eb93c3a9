"""Processors of tiny models for images and videos. transformers' own parts for videos need torchvision."""

from tests.clips import FramesOfVideos, PatchesOfVideos
from tests.families import FAMILIES
from tests.tiny import VIDEO_TOKEN

#: A template without end of text that writes images and videos where they stand.
TEMPLATE = (
    "{% for m in messages %}{{ 'w4 ' if m.role == 'user' else 'w5 ' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }} {% else %}{{ '<' + part.type + '> ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
)


def processor_with_videos(name):
    """Return the processor of a tiny family with a chat template and, if the family knows videos, a part for them."""
    family = FAMILIES[name]
    processor = family.processor()
    processor.chat_template = TEMPLATE
    if family.clips:
        if hasattr(processor.image_processor, "merge_size"):
            processor.video_processor = PatchesOfVideos(family.config().vision_config)
        else:
            tiled = hasattr(processor.image_processor, "image_grid_pinpoints")
            whole_image = FAMILIES["llava"] if tiled else family
            processor.video_processor = FramesOfVideos(whole_image.processor().image_processor)
        processor.tokenizer.add_tokens(["<video>"], special_tokens=True)
        processor.video_token, processor.video_token_id = "<video>", VIDEO_TOKEN
        processor.vision_start_token, processor.vision_end_token = "w97", "w96"
    return processor
