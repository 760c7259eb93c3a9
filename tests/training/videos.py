"""Processors of tiny models with a chat template for images and videos."""

from tests.clips import with_videos
from tests.families import FAMILIES

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
