"""A tiny model with a task of a few questions about a few images."""

from tests.families import FAMILIES, tiny_llava
from tests.lab.test_tasks import question, write
from vlmzip.lab.analyses.subject import Subject
from vlmzip.lab.tasks.catalogue import read_task
from vlmzip.processes import Processes

WORDS = ("w4 w5", "w6", "w7 w8 w9", "w10", "w11 w12", "w13", "w14")
#: As LLaVA's, in words that the tiny tokenizer has.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w90 {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% endif %}{% endfor %}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}{% else %}w91 "
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w91{% endif %}"
)


def numbered_subject(folder, words=WORDS, images="aabbacd", batch=3, model=None, processor=None):
    """Questions number n is about image `images[n]`; the right answers are what nobody says."""
    lines = [question(f"{name}.png", question=text) for name, text in zip(images, words, strict=True)]
    names = [f"{name}.png" for name in sorted(set(images))]
    task = read_task(write(folder / "q", *lines, images=names) + ":exact", None, None)
    if processor is None:
        processor = FAMILIES["llava"].processor()
        processor.chat_template = TEMPLATE
    model = model or tiny_llava()
    return Subject(model, processor, "tiny", task, folder / "out", batch, 0, Processes())
