"""From records to tensors: the model's inputs, the labels, and the records that are left out."""

import json

import pytest
import torch
from PIL import Image

from tests.families import FAMILIES, tiny_llava
from tests.tiny import IMAGE_TOKEN, PAD, TOKENS
from tests.training.test_records import film, record, said, write
from vlmzip import Pool2d, attach
from vlmzip.errors import UserError
from vlmzip.models import family_of
from vlmzip.runtime import images
from vlmzip.training.batches import IGNORE, Collator, Examples, Preprocessor, count_bad, note_bad
from vlmzip.training.records import BadRecord, Records, read_record

#: A template without end of text, like LLaVA-1.5's.
TEMPLATE = (
    "{% for m in messages %}{{ 'w4 ' if m.role == 'user' else 'w5 ' }}"
    "{% for part in m.content if part.type == 'image' %}<image> {% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}w5 {% endif %}"
)
USER, MODEL, END = 4, 5, 2


@pytest.fixture(scope="module")
def processor():
    made = FAMILIES["llava"].processor()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def conversations(processor, llava):
    return Preprocessor(processor, family_of(llava), max_length=150)


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", 9), ("b.png", 200)):
        Image.new("RGB", (24, 24), (colour, 0, 0)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    return tmp_path


def with_template(template):
    made = FAMILIES["llava"].processor()
    made.chat_template = template
    return made


def qwen_conversations():
    """Return a preprocessor whose words for images and videos are not LLaVA's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = FAMILIES["qwen2_5_vl"].processor()
    words = made.tokenizer.backend_tokenizer.to_str()
    words = words.replace("<image>", "<|image_pad|>").replace('"<video>"', '"<|video_pad|>"')
    special = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    named = {f"{name}_token": f"<{text}>" for name, text in (("pad", "pad"), ("eos", "/s"), ("unk", "unk"))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(words), extra_special_tokens=special, **named
    )
    processor = type(made)(made.image_processor, tokenizer)
    processor.chat_template = TEMPLATE.replace("<image>", "<|image_pad|>")
    return Preprocessor(processor, family_of(FAMILIES["qwen2_5_vl"].build()), max_length=600)


def without_images(ids):
    return [token for token in ids.tolist() if token != IMAGE_TOKEN]


def test_labels_are_the_answers_and_their_ends(conversations, folder):
    row = conversations(read_record(record("<image>\nw10 w11", "w20 w21", "w12", "w22")), folder)
    said = [USER, 10, 11, MODEL, 20, 21, END, USER, 12, MODEL, 22, END]
    assert without_images(row["input_ids"]) == said
    assert (row["input_ids"] == IMAGE_TOKEN).sum() == TOKENS
    labels = row["labels"][row["input_ids"] != IMAGE_TOKEN].tolist()
    assert labels == [-100] * 4 + [20, 21, END] + [-100] * 3 + [22, END]
    assert (row["labels"][row["input_ids"] == IMAGE_TOKEN] == IGNORE).all()
    assert row["pixel_values"].shape[0] == 1


def test_a_template_with_an_end_gets_no_second_one(processor, llava, folder):
    ending = FAMILIES["llava"].processor()
    ending.chat_template = TEMPLATE.replace(
        "{% endfor %}{% endfor %}", "{% endfor %}{{ '</s> ' if m.role != 'user' }}{% endfor %}"
    )
    row = Preprocessor(ending, family_of(llava), 150)(read_record(record("<image> w10", "w20", "w11", "w21")), folder)
    assert without_images(row["input_ids"]) == [USER, 10, MODEL, 20, END, USER, 11, MODEL, 21, END]
    kept = row["labels"][row["labels"] != IGNORE].tolist()
    assert kept == [20, END, 21, END]


def test_an_end_of_text_after_a_question_is_not_learned(llava, folder):
    """Some templates end each part of a conversation but the last."""
    asking = with_template(TEMPLATE.replace("'w4 '", "'</s> w4 '"))
    row = Preprocessor(asking, family_of(llava), 150)(read_record(record("<image> w10", "w20", "w11", "w21")), folder)
    assert row["labels"][row["labels"] != IGNORE].tolist() == [20, END, 21, END]


@pytest.mark.parametrize("template", [TEMPLATE, "{{ '<s>' }}" + TEMPLATE])
def test_a_conversation_has_one_first_token(llava, folder, template):
    """The template may write the first token (Llama-3), or the tokenizer may add it."""
    from tokenizers.processors import TemplateProcessing

    beginning = with_template(template)
    beginning.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert beginning.tokenizer("w9")["input_ids"] == [1, 9]
    row = Preprocessor(beginning, family_of(llava), 150)(read_record(record("<image> w10", "w20")), folder)
    assert without_images(row["input_ids"]) == [1, USER, 10, MODEL, 20, END]
    labels = row["labels"][row["input_ids"] != IMAGE_TOKEN].tolist()
    assert labels == [IGNORE] * 4 + [20, END]


def test_the_frames_of_a_video_are_seen_in_order(conversations, folder):
    content = film("<video>\nw9", "w20", video=["a.png", "b.png", "a.png"])
    row = conversations(read_record(content), folder)
    assert (row["input_ids"] == IMAGE_TOKEN).sum() == 3 * TOKENS
    means = [image.mean().item() for image in row["pixel_values"]]
    assert means[0] == means[2] < means[1]


@pytest.mark.parametrize("said", [("<image> w9 {}", "w20"), ("<image> w9", "w20 {} w21")])
@pytest.mark.parametrize("word", ["<|image_pad|>", "<|video_pad|>"])
def test_a_word_that_would_be_another_image_is_bad(folder, word, said):
    content = record(*(text.format(word) for text in said))
    with pytest.raises(BadRecord, match="in the text, which stands for an image or video here"):
        qwen_conversations()(read_record(content), folder)


def test_what_the_processor_refuses_is_bad(folder, monkeypatch):
    Image.new("RGB", (1000, 2)).save(folder / "thin.png")
    asked, thin = qwen_conversations(), read_record(record("<image> w9", "w20", image="thin.png"))
    assert (asked(read_record(record("<image> w9", "w20")), folder)["input_ids"] == IMAGE_TOKEN).any()
    assert (asked(thin, folder)["input_ids"] == IMAGE_TOKEN).any()  # squeezed, as in every command
    monkeypatch.setattr(images, "LONGEST_TO_SHORTEST", 1000)
    with pytest.raises(BadRecord, match=r"^the processor refuses it: absolute aspect ratio must be smaller than 200$"):
        asked(thin, folder)


def test_an_error_of_a_broken_processor_is_not_a_bad_record(llava, monkeypatch):
    def broken(*_, **__):
        raise TypeError("no such argument")

    made = with_template(TEMPLATE)
    monkeypatch.setattr(type(made), "__call__", broken)
    with pytest.raises(TypeError, match="no such argument"):
        Preprocessor(made, family_of(llava), 150)


def test_an_answer_that_would_end_early_is_bad(conversations, folder):
    with pytest.raises(BadRecord, match="an answer with the end of text in it, </s>"):
        conversations(read_record(record("<image> w9", "w20 </s> w21")), folder)
    asked = conversations(read_record(record("<image> </s> w9", "w20")), folder)
    assert asked["labels"][asked["labels"] != IGNORE].tolist() == [20, END]


def test_a_record_longer_than_the_llms_positions_is_bad(processor, llava, folder):
    long = Preprocessor(processor, family_of(llava), max_length=9999)
    rest = 512 - TOKENS - 4  # the LLM's positions without the image and the words of the template
    assert len(long(read_record(record("<image>" + " w9" * rest, "w20")), folder)["input_ids"]) == 512
    with pytest.raises(BadRecord, match="longer than the LLM's 512 positions"):
        long(read_record(record("<image>" + " w9" * (rest + 1), "w20")), folder)


def test_words_of_the_question_are_not_learned_even_if_the_answer_has_them(conversations, folder):
    row = conversations(read_record(record("<image> w20 w5 w20", "w20")), folder)
    assert row["labels"][row["labels"] != IGNORE].tolist() == [20, END]
    assert row["labels"][-2:].tolist() == [20, END]


def test_several_images_and_none(conversations, folder):
    two = conversations(read_record(record("<image> w9 <image>", "w20", image=["a.png", "b.png"])), folder)
    assert two["pixel_values"].shape[0] == 2
    assert two["pixel_values"][0].mean() < two["pixel_values"][1].mean()
    assert (two["input_ids"] == IMAGE_TOKEN).sum() == 2 * TOKENS
    none = conversations(read_record({"conversations": said("w9", "w20")}), folder)
    assert "pixel_values" not in none
    assert none["input_ids"].tolist() == [USER, 9, MODEL, 20, END]


def test_long_and_broken_records_are_bad(processor, llava, folder):
    short = Preprocessor(processor, family_of(llava), max_length=TOKENS + 5)
    assert len(short(read_record(record("<image> w10", "w20")), folder)["input_ids"]) == TOKENS + 5
    for content, reason in (
        (record("<image> w10", "w20 w21"), f"longer than {TOKENS + 5} tokens"),
        (record("<image>", "w20", image="none.png"), "an image is missing"),
        (record("<image>", "w20", image="broken.png"), "cannot be read"),
    ):
        with pytest.raises(BadRecord, match=reason):
            short(read_record(content), folder)


def test_bad_records_are_replaced_noted_once_and_counted(conversations, folder):
    content = [record("<image> w10", f"w{20 + n}") for n in range(4)]
    content[1]["image"], content[3]["image"] = "none.png", "broken.png"
    found = Records(write(folder / "data.json", [{"id": "no record"}, *content], lines=True))
    examples = Examples(found, folder, conversations, folder / "bad.jsonl")
    for _ in range(2):
        learned = [row["labels"][row["labels"] != IGNORE][0].item() for row in map(examples.__getitem__, range(4))]
        assert learned == [20, 22, 22, 20]  # a bad record is replaced by the next good one; the first follows the last
    assert count_bad(folder / "bad.jsonl") == {"an image is missing": 1, "an image cannot be read": 1}
    noted = [json.loads(line)["record"] for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert noted == [2, 4]  # numbers in the file, whose record 0 is invalid


def test_a_record_that_two_processes_met_is_counted_once(conversations, folder):
    content = [record("<image> w10", "w20"), record("<image> w10", "w21", image="none.png")]
    found = Records(write(folder / "data.json", content, lines=True))
    for _ in range(2):
        Examples(found, folder, conversations, folder / "bad.jsonl")[1]
    assert len((folder / "bad.jsonl").read_text().splitlines()) == 2
    assert count_bad(folder / "bad.jsonl") == {"an image is missing": 1}


def test_a_note_cut_short_is_left_out(tmp_path):
    notes = tmp_path / "bad.jsonl"
    note_bad(notes, [(1, "one"), (2, "two")])
    whole = notes.read_bytes()
    for end in range(whole.index(b"\n") + 1, len(whole) - 1):
        notes.write_bytes(whole[:end])
        assert count_bad(notes) == {"one": 1}
        note_bad(notes, [(3, "three")])
        note_bad(notes, [(4, "four")])
        assert count_bad(notes) == {"one": 1, "three": 1, "four": 1}
    notes.write_bytes(whole + b"{no JSON}\n")
    with pytest.raises(
        UserError, match=r"bad\.jsonl:\d+ cannot be read as a note about a skipped record: .*; delete the"
    ):
        count_bad(notes)


def test_a_file_without_good_records_is_refused(conversations, folder):
    found = Records(write(folder / "data.json", [record("<image>", "w20", image="none.png")], lines=True))
    with pytest.raises(UserError, match=r"^no record of"):
        Examples(found, folder, conversations, folder / "bad.jsonl")[0]


def test_the_loss_of_a_batch_is_that_of_its_rows(conversations, folder):
    """The batch has a row without image and a row with two images."""
    contents = [
        record("<image> w10 w11 w12", "w20 w21"),
        {"conversations": said("w9", "w20")},
        record("<image> w9 <image>", "w22", image=["a.png", "b.png"]),
    ]
    rows = [conversations(read_record(content), folder) for content in contents]
    pad = Collator(pad_id=0)
    compressed = attach(tiny_llava(), Pool2d(factor=2))
    losses, counts = [], []
    for row in rows:
        alone = pad([row])
        losses.append(compressed(**alone).loss.item())
        counts.append(int((alone["labels"][:, 1:] != IGNORE).sum()))
    together = compressed(**pad(rows)).loss.item()
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert together == pytest.approx(expected, rel=1e-5)


def test_rows_are_padded_on_the_right_and_padding_is_not_learned():
    rows = [
        {
            "input_ids": torch.tensor([7, 8, 9]),
            "attention_mask": torch.ones(3).long(),
            "labels": torch.tensor([7, 8, 9]),
        },
        {"input_ids": torch.tensor([5]), "attention_mask": torch.ones(1).long(), "labels": torch.tensor([5])},
    ]
    batch = Collator(pad_id=PAD + 3)(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [5, IGNORE, IGNORE]]


def test_a_batch_without_images_gets_a_blank_image_without_gradients(conversations, folder):
    text = conversations(read_record({"conversations": said("w9 w8", "w7")}), folder)
    seen = conversations(read_record(record("<image> w10", "w20", image="a.png")), folder)
    pad = Collator(0, conversations.blank())
    assert len(pad([text, seen])["input_ids"]) == 2
    batch = pad([text])
    assert len(batch["input_ids"]) == 2
    assert len(batch["pixel_values"]) == 1
    assert bool((batch["labels"][1] == IGNORE).all())
    compressed = attach(tiny_llava(), Pool2d(factor=2))
    loss = compressed(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(compressed(**Collator(0)([text])).loss.item(), rel=1e-6)
    gradients = [parameter.grad for parameter in family_of(compressed.inner).projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_lengths_order_records_by_length(conversations, folder):
    content = [
        record("<image> w10", "w20"),
        {"conversations": said("w9", "w20")},
        {"conversations": said("w9 " * 90, "w2")},
    ]
    found = Records(write(folder / "data.json", content, lines=True))
    one, none, words = Examples(found, folder, conversations, folder / "bad.jsonl").lengths(visual_tokens=TOKENS)
    assert none < one
    assert none + 60 < words


def test_processors_that_cannot_be_used_are_refused(llava):
    bare = FAMILIES["llava"].processor()
    with pytest.raises(UserError, match="no chat template"):
        Preprocessor(bare, family_of(llava), 100)
    bare.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        Preprocessor(bare, family_of(llava), 100)
    bare.chat_template = TEMPLATE.replace("'w5 ' }}", "'w5 ' if loop.last else 'w6 ' }}")
    with pytest.raises(UserError, match="rewrites earlier turns"):
        Preprocessor(bare, family_of(llava), 100)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # raised in the processor
def test_a_processor_that_rewrites_prompts_is_refused(llava):
    rewriting = FAMILIES["paligemma"].processor()
    rewriting.chat_template = TEMPLATE
    with pytest.raises(UserError, match="PaliGemmaProcessor rewrites it"):
        Preprocessor(rewriting, family_of(llava), 100)


def test_mini_learns_the_answers_in_its_own_template(tmp_path):
    from vlmzip.runtime.loading import load

    loaded = load("mini")
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    row = Preprocessor(loaded.processor, loaded.family, 400)(
        read_record(record("<image>\nwhat color is the ring ?", "red", "where is it ?", "top left")), tmp_path
    )
    kept = row["labels"][row["labels"] != IGNORE]
    assert loaded.processor.tokenizer.convert_ids_to_tokens(kept) == ["red", "</s>", "top", "left", "</s>"]
    assert torch.equal(row["attention_mask"], torch.ones_like(row["input_ids"]))


def test_what_the_template_refuses_is_a_bad_record(llava, folder):
    refusing = "{% if 'w13' in messages[0].content[-1].text %}{{ raise_exception('no w13 here') }}{% endif %}"
    conversations = Preprocessor(with_template(refusing + TEMPLATE), family_of(llava), 150)
    conversations(read_record(record("<image> w10", "w20")), folder)
    with pytest.raises(BadRecord, match="the chat template refuses it: no w13 here"):
        conversations(read_record(record("<image> w13", "w20")), folder)
