"""Processors of tiny models with a chat template for images and videos."""

from tokenizers import Tokenizer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)

from tests.clips import with_videos
from tests.families import FAMILIES
from tests.tiny import PATCH, SIDE, tiny_tokenizer

#: A template without end of text that writes images and videos where they stand.
TEMPLATE = (
    "{% for m in messages %}{{ 'w4 ' if m.role == 'user' else 'w5 ' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }} {% else %}{{ '<' + part.type + '> ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
)


def processor_with_videos(name):
    """Return the processor of a tiny family, which takes videos if the family knows them."""
    family = FAMILIES[name]()
    processor = with_videos(family) if family.clips else family.processor()
    processor.chat_template = TEMPLATE
    processor.vision_start_token, processor.vision_end_token = "w97", "w96"
    return processor


def own_processor(name):
    """Return the processor that transformers has for a family, with its part for videos, which needs torchvision."""
    words = tiny_tokenizer().backend_tokenizer.to_str().replace('"w97"', '"<start>"').replace('"w96"', '"<end>"')
    special = {"image": "<image>", "video": "<video>", "vision_start": "<start>", "vision_end": "<end>"}
    named = {
        f"{kind}_token": f"<{text}>" for kind, text in (("pad", "pad"), ("bos", "s"), ("eos", "/s"), ("unk", "unk"))
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(words),
        extra_special_tokens={f"{kind}_token": word for kind, word in special.items()},
        **named,
    )
    images, square = FAMILIES[name].processor().image_processor, {"height": SIDE, "width": SIDE}
    patches = {"size": {"shortest_edge": 16 * 16, "longest_edge": 8 * SIDE**2}, "patch_size": 4, "merge_size": 2}
    if name == "qwen2_5_vl":
        return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(**patches), TEMPLATE)
    if name == "qwen3_vl":
        return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(**patches), TEMPLATE)
    images = VideoLlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
    videos = VideoLlavaVideoProcessor(size=square, crop_size=square)
    return VideoLlavaProcessor(
        images, videos, tokenizer, PATCH, "default", chat_template=TEMPLATE, num_additional_image_tokens=1
    )
