"""The prompts that Mini-Gemini's LLMs were trained with, as chat templates."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from vlmzip.errors import UserError

#: The text of a message. Each image stands on a line before the question.
CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
VICUNA = (
    "{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
    " and polite answers to the user\\'s questions. ' }}{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    + CONTENT
    + "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{% for message in messages %}{{ '<start_of_turn>' + ('user' if message['role'] == 'user' else 'model') + '\\n' }}"
    + CONTENT
    + "{{ '<end_of_turn>\\n' if message['role'] == 'user' else '<end_of_turn>\\n<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
CHATML = (
    "{{ '<|im_start|>system\\nAnswer the questions.<|im_end|>' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    + CONTENT
    + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def template_of(llm: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template for an LLM of this model type with this tokenizer.

    Vicuna, Yi (ChatML) and Llama 3 are all of the type llama. Raise `UserError` for Llama 3, whose prompt is not known.
    """
    if llm == "gemma":
        return GEMMA
    words = tokenizer.get_vocab()
    if "<|eot_id|>" in words:
        raise UserError("the checkpoint's LLM is a Llama 3, whose prompt vlmzip does not know; give another checkpoint")
    return CHATML if "<|im_start|>" in words else VICUNA
