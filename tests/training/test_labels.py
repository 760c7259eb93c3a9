"""The labels are exactly the answers, with every kind of tokenizer that checkpoints have."""

from functools import cache

import pytest
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from tests.families import tiny_llava
from tests.tiny import PATCH, SIDE
from tests.training.test_records import record
from vlmzip.errors import UserError
from vlmzip.models import family_of
from vlmzip.training.batches import IGNORE, Preprocessor
from vlmzip.training.records import read_record

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
CORPUS = [
    "USER: is it red? ASSISTANT: yes no",
    "USER: what is there?\nASSISTANT: a red ring\n\nand more  of it nyes",
] * 50
BYTES = [f"<0x{number:02X}>" for number in range(256)]
QWEN_WORDS = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(trim=None, split=None):
    """Return GPT-2's tokenizer. With `split`, it is Llama-3's if `trim` is true, else Qwen2's."""
    bpe = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    words = pre_tokenizers.Split(Regex(split), "isolated") if split else None
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of]) if words else bytes_of
    bpe.decoder = decoders.ByteLevel()
    if trim is not None:
        bpe.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = dict(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(**settings))
    return bpe


def sentencepiece_bpe(prefix):
    """Return a tokenizer like Llama-2's or Gemma's.

    `prefix="legacy"` writes a space before each part between special tokens, "first" only before the first part.
    """
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL + BYTES, show_progress=False)
    bpe.train_from_iterator(CORPUS, words)
    if prefix == "first":
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        bpe.pre_tokenizer = None
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        bpe.normalizer = normalizers.Sequence(steps if prefix == "legacy" else steps[1:])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return bpe


def unigram():
    """Return a tokenizer like T5's: pieces with their log-likelihoods."""
    pieces = [(text, 0.0) for text in SPECIAL] + [("▁" + word, -2.0) for word in ("yes", "no", "red", "nyes", "USER:")]
    letters = sorted({letter for text in [*CORPUS, "▁😀é日!"] for letter in text})
    made = Tokenizer(models.Unigram([*pieces, *((letter, -9.0) for letter in letters)], SPECIAL.index("<unk>")))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Replace("▁", " ")
    return made


def word_level():
    words = sorted({word for text in CORPUS for word in text.replace("?", " ? ").replace(":", " : ").split()} | {"!"})
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


MAKERS = {
    "GPT-2": byte_level,
    "Llama-3": lambda: byte_level(trim=True, split=QWEN_WORDS),
    "Qwen2": lambda: byte_level(trim=False, split=QWEN_WORDS),
    "RoBERTa": lambda: byte_level(trim=True),
    "Llama-2, legacy": lambda: sentencepiece_bpe("legacy"),
    "Llama-2": lambda: sentencepiece_bpe("first"),
    "Gemma": lambda: sentencepiece_bpe("none"),
    "T5": unigram,
    "mini": word_level,
}
#: White space between the prompt and the answer.
BETWEEN = {"a space": " ", "a newline": "\n", "newlines": "\n\n", "spaces": "   "}
#: Whether the generation prompt ends with that white space, or the answer begins with it.
ENDS = ["in the prompt", "in the answer"]
ANSWERS = ["yes", "a red ring", "😀", "é日 yes", "no\n\nand more", "a  red   ring", "!"]


@cache
def tokenizer(name):
    return MAKERS[name]()


def wrapped(made, end="</s>"):
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": end, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(made.to_str()), extra_special_tokens={"image_token": "<image>"}, **named
    )


def template(between, where, behind="", around=("", "")):
    """Return a template of USER: and ASSISTANT: turns with `between` after ASSISTANT: and `around` the answer."""
    prompt, answer = ("ASSISTANT:" + between, "") if where == "in the prompt" else ("ASSISTANT:", between)
    said = "{% for c in m.content %}{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}"
    return (
        "{% for m in messages %}{% if m.role == 'user' %}USER: " + said + "{{ '\n' }}{% else %}"
        f"{{{{ {prompt + answer + around[0]!r} }}}}{said}{{{{ {around[1] + behind!r} }}}}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}"
    )


def conversations(words, chat_template):
    images = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    processor = LlavaProcessor(
        images, words, PATCH, "default", num_additional_image_tokens=1, chat_template=chat_template
    )
    model = tiny_llava()
    model.config.image_token_id = words.convert_tokens_to_ids("<image>")
    return Preprocessor(processor, family_of(model), 900)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "a.png")
    return tmp_path


def learned(asked, folder, *answers):
    """Return the text of each run of labels."""
    turns = [text for answer in answers for text in ("is it red?", answer)]
    row = asked(read_record(record("<image>\n" + turns[0], *turns[1:])), folder)
    runs, before = [], IGNORE
    for label in row["labels"].tolist():
        if label != IGNORE:
            runs = [*runs, [label]] if before == IGNORE else [*runs[:-1], [*runs[-1], label]]
        before = label
    assert [int(i) for i in row["input_ids"][row["labels"] != IGNORE]] == [n for run in runs for n in run]
    return [asked.tokenizer.decode(run) for run in runs]


def known(words, answers):
    """Return the answers that the tokenizer can encode."""
    return [text for text in answers if words.unk_token_id not in words(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("where", ENDS)
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("name", MAKERS)
def test_a_whole_answer_and_its_end_are_learned(folder, name, between, where):
    words = wrapped(tokenizer(name))
    asked = conversations(words, template(BETWEEN[between], where, behind="\n"))
    answers = known(words, ANSWERS)
    assert len(answers) >= (3 if name == "mini" else 5)
    for said, answer in zip(learned(asked, folder, *answers), answers, strict=True):
        if name == "mini":  # its tokenizer drops white space
            assert said.split() == [*answer.split(), "</s>"]
        else:
            assert said.strip() == f"{answer}</s>"


@pytest.mark.parametrize("name", MAKERS)
def test_the_templates_words_around_the_question_are_not_learned(folder, name):
    words = wrapped(tokenizer(name))
    asked = conversations(words, template(" ", "in the prompt"))
    for said in learned(asked, folder, "yes", "no", "yes"):
        assert said.split("</s>")[0].strip() in ("yes", "no")
        assert not said.partition("</s>")[2]


def test_the_first_word_is_learned_if_its_token_begins_in_the_prompt(folder):
    words = wrapped(tokenizer("GPT-2"))
    assert words.tokenize("ASSISTANT: yes")[-1] == "Ġyes"
    asked = conversations(words, template(" ", "in the prompt"))
    assert learned(asked, folder, "yes") == [" yes</s>"]


@pytest.mark.parametrize("trim", [True, False])
def test_white_space_within_an_answer_is_learned(folder, trim):
    """With `trim_offsets`, the span of a token that is only a space is empty."""
    words = wrapped(byte_level(trim=trim))
    assert "Ġ" in words.tokenize("yes   no")
    asked = conversations(words, template(" ", "in the answer"))
    assert learned(asked, folder, "yes   no", "no") == [" yes   no</s>", " no</s>"]
    asked = conversations(words, template("   ", "in the prompt"))
    (said,) = learned(asked, folder, "yes")
    assert said.lstrip() == "yes</s>"
    assert len(said) <= len(" yes</s>")  # the other spaces belong to the prompt


@pytest.mark.parametrize("side", ["rstrip", "lstrip"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama-2", "T5"])
def test_an_end_token_that_includes_white_space_is_learned(folder, name, side):
    """Phi-3's end token includes the newline after it."""
    words = wrapped(tokenizer(name), end=AddedToken("<|end|>", special=True, **{side: True}))
    spans = words("yes <|end|>\n", return_offsets_mapping=True)["offset_mapping"]
    assert ((4, 12) if side == "rstrip" else (3, 11)) in map(tuple, spans)
    asked = conversations(words, template(" ", "in the answer", behind="\n"))
    for said, answer in zip(learned(asked, folder, "yes", "no"), ["yes", "no"], strict=True):
        assert said.split() == [f"{answer}<|end|>"] or said.split() == [answer, "<|end|>"]


@pytest.mark.parametrize("name", ["GPT-2", "Llama-2", "T5", "mini"])
def test_template_words_inside_the_answers_turn_are_learned(folder, name):
    asked = conversations(wrapped(tokenizer(name)), template(" ", "in the answer", around=("a ", " it")))
    (said,) = learned(asked, folder, "red ring")
    assert said.split("</s>")[0].split() in (["a", "red", "ring", "it"], ["a", "red", "ring"])


@pytest.mark.parametrize("name", MAKERS)
def test_a_template_that_joins_answers_to_words_of_the_prompt_is_refused(name):
    words = wrapped(tokenizer(name))
    spans = words(" nyes", return_offsets_mapping=True)["offset_mapping"]
    assert any(begin < 2 < stop for begin, stop in spans), "the test needs a tokenizer with a token for it"
    joining = template(" n", "in the prompt")
    with pytest.raises(UserError, match=r"its chat template joins the answer to the prompt: '.*nyes' is one token"):
        conversations(words, joining)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast, eos_token = False, "</s>"

    asked = conversations(wrapped(tokenizer("GPT-2")), template(" ", "in the prompt"))
    asked.processor.tokenizer = Slow()
    with pytest.raises(UserError, match="no fast tokenizer"):
        Preprocessor(asked.processor, family_of(tiny_llava()), 900)
