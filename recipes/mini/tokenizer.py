"""A word-level tokenizer: a known word is one token, numbers are split into digits, and other words are <unk>."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmzip.mini.words import vocabulary

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
# As in LLaVA-1.5: USER: <image>\nquestion ASSISTANT: answer</s>. There is no <s> in front, and mini is trained without
# it: some callers add one to a templated prompt, some add two and some add none.
CHAT_TEMPLATE = """\
{% for message in messages %}\
{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}\
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}\
{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\
{% endif %}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}\
{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    digits = [str(digit) for digit in range(10)]
    # "##7" is a 7 inside a number: "347" becomes 3 ##4 ##7, and is decoded without spaces.
    tokens = [*SPECIAL, *vocabulary(), *digits, *(f"##{digit}" for digit in digits)]
    tokenizer = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"t-shirts?"), "tshirt"),
            normalizers.Replace("colour", "color"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
