"""Write the text of a prompt: one question after its images, or a whole conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlmzip.errors import UserError, reason
from vlmzip.models.family import Family, Modality
from vlmzip.processor import Processor

#: The order of the parts of a prompt without a chat template.
ORDER = ("image", "video", "text")


def chat_prompt(family: Family, processor: Processor, question: str, images: int) -> str:
    """Return the prompt of a question about `images` images.

    The processor's chat template writes it, or the family if the checkpoint has no template.
    """
    return visual_prompt(family, processor, question, ["image"] * images)


def visual_prompt(family: Family, processor: Processor, question: str, kinds: Sequence[Modality]) -> str:
    """Return the prompt of a question about images and videos, in this order. It is made as by `chat_prompt`."""
    content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": question}]
    return conversation_prompt(family, processor, [{"role": "user", "content": content}])


def conversation_prompt(family: Family, processor: Processor, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the prompt of a conversation like `chat_prompt`.

    The `content` of each message is a list of {"type": "image"}, {"type": "video"} and {"type": "text", "text": …}.
    Without a chat template, raise `UserError` for several turns, for images after videos, and for both after text.
    """
    if getattr(processor, "chat_template", None):
        try:
            return processor.apply_chat_template(list(messages), add_generation_prompt=True)
        except Exception as error:  # templates are code, and may raise anything
            raise UserError(f"the chat template cannot be used: {reason(error)}") from error
    kinds = [part["type"] for message in messages for part in message["content"]]
    if [message["role"] for message in messages] != ["user"] or kinds != sorted(kinds, key=ORDER.index):
        raise UserError(
            "this checkpoint has no chat template: only one question with all images before it can be asked, no"
            " conversation, no image after text and none after a video"
        )
    texts = [part["text"] for part in messages[0]["content"] if part["type"] == "text"]
    return family.prompt("\n".join(texts), kinds.count("image"), kinds.count("video"))


def special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, bool]:
    """Return the processor's arguments with which a text begins with only one BOS, even if its template wrote one."""
    return {"add_special_tokens": False} if tokenizer.bos_token and text.startswith(tokenizer.bos_token) else {}


def unknown_words(processor: Processor, question: str) -> list[str]:
    """Return the words that the tokenizer cannot encode. Most models' tokenizers can encode any text; mini's cannot."""
    tokenizer = processor.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in tokenizer(question, add_special_tokens=False)["input_ids"]:
        return []
    return [word for word in question.split() if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]
