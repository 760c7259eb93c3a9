"""Images that fit, counted one by one; questions about one of several images, made by hand."""

from dataclasses import replace

import pytest
import torch

from tests.lab.analyses.numbered import TEMPLATE, numbered_subject
from tests.lab.test_study import asked
from vlmzip import NoCompression, Pool2d, attach
from vlmzip.lab.analyses import context
from vlmzip.runtime.answering import Answerer

pytestmark = pytest.mark.slow  # whole runs of an analysis


@pytest.fixture
def subject(tmp_path):
    return numbered_subject(tmp_path)


def test_what_fits_is_the_longest_prompt_within_the_positions(subject):
    """Counted by making longer and longer prompts, in which a word follows each image."""
    subject.processor.chat_template = TEMPLATE.replace("<image>", "<image> w92")
    study = subject.study()
    study.family.llm_config.max_position_embeddings = 200
    tokens, room, between = context._room(study, subject.task)
    image, count = subject.task.samples[0].load(), 1
    longest = max((sample.question for sample in subject.task.samples), key=lambda text: len(text.split()))
    while True:
        length = study.answerer.inputs([image] * (count + 1), [longest])["input_ids"].shape[1]
        if length + subject.task.max_new_tokens > 200:
            break
        count += 1
    assert (context.fitting(tokens, room, between), count) == (4, 4)
    # One position fewer than five images need.
    length = study.answerer.inputs([image] * 5, [longest])["input_ids"].shape[1] + subject.task.max_new_tokens
    for positions, fits in ((length, 5), (length - 1, 4)):
        study.family.llm_config.max_position_embeddings = positions
        assert context.fitting(*context._room(study, subject.task)) == fits


def test_text_between_images_counts():
    assert [context.fitting(10, room, 2) for room in (11, 12, 23, 24)] == [0, 1, 1, 2]


def test_the_asked_image_is_first_or_last_among_those_that_follow(subject):
    samples = subject.task.samples  # about the images a, a, b, b, a, c, d
    pixels = {sample.image: sample.load().tobytes() for sample in samples}
    a, b, c, d = dict.fromkeys(sample.image for sample in samples)

    def order(*arguments):
        return [image.tobytes() for image in context.arranged(samples, *arguments)]

    assert order(samples[4], 3, "first") == [pixels[name] for name in (a, b, c)]
    assert order(samples[4], 3, "last") == [pixels[name] for name in (b, c, a)]
    assert order(samples[6], 3, "last") == [pixels[name] for name in (a, b, d)]
    assert order(samples[2], 1, "only") == [pixels[b]]


@pytest.mark.parametrize(("place", "number"), [("first", 0), ("last", 2)])
def test_answers_are_those_to_prompts_made_by_hand(subject, place, number):
    study, (asked, *_) = subject.study(), subject.task.samples
    (found,) = context._answer(study, subject.task, Pool2d(factor=2), 3, place, [0])
    others = [next(s for s in subject.task.samples if s.image != asked.image), subject.task.samples[5]]
    images = [sample.load() for sample in others]
    images.insert(number, asked.load())
    text = f"w90 <image> <image> <image> {asked.question} w91"
    inputs = subject.processor(images=images, text=[text], return_tensors="pt")
    with attach(subject.model, Pool2d(factor=2)) as compressed:
        ids = compressed.generate(**inputs, max_new_tokens=subject.task.max_new_tokens, do_sample=False)
    assert found["given"] == subject.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["visual_tokens_by_layer"] == [27] * 4


@pytest.mark.parametrize(("place", "number"), [("first", 1), ("last", 3)])
def test_the_prompt_names_the_image_that_is_asked_about(subject, monkeypatch, place, number):
    monkeypatch.setattr(context, "STATED", "w5{number} w6{count} {question}")
    heard = asked(monkeypatch)
    context._answer(subject.study(), subject.task, NoCompression(), 3, place, [1])
    assert heard == [[f"w5{number} w63 w6"]]


def test_prompts_say_which_image_where_the_words_are_known(subject, monkeypatch):
    sample = subject.task.samples[1]
    assert context.question(subject.processor, sample, 2, 3) == sample.question
    monkeypatch.setattr(context, "STATED", "w50 {question}")
    assert context.question(subject.processor, sample, 2, 3) == "w50 w6"
    assert context.question(subject.processor, sample, 1, 1) == "w6"
    monkeypatch.setattr(context, "STATED", "w5{number} w6{count} {question}")
    assert context.question(subject.processor, sample, 2, 3) == "w52 w63 w6"


@pytest.mark.slow
def test_the_table(subject, monkeypatch):
    rows = context.measure(subject)
    fits = {(row["what"], row["budget"]): row["images"] for row in rows if row["part"] == "fits"}
    assert fits["LLaVA-1.5 image", "100%"] == 6  # 3,968 positions for images of 576
    assert fits["LLaVA-1.5 image", "11%"] == 62  # of 63 tokens
    assert fits["Video-LLaVA frame", "100%"] == 15
    asked = [row for row in rows if row["part"] == "asked"]
    tried = [("only", 1), ("first", 2), ("last", 2), ("first", 4), ("last", 4)]  # there are no eight images
    for method in ("no_compression", "visionzip"):  # DFMR has no images for its threshold here
        mine = [row for row in asked if row["method"] == method]
        assert [(row["place"], row["images"]) for row in mine] == tried
        assert {row["tokens"] for row in mine} == {36.0 if method == "no_compression" else 9.0}
    assert len(asked) == 10
    assert all(row.keys() == rows[0].keys() for row in rows)
    monkeypatch.delattr(Answerer, "answer")
    assert context.measure(subject) == rows  # from the records
    subject.model.config.text_config.max_position_embeddings = 100
    few = [row["images"] for row in context.measure(subject) if row["method"] == "no_compression"]
    assert few == [1, 2, 2]


def test_more_questions_in_the_same_folder_give_what_a_fresh_one_gives(subject, tmp_path, monkeypatch):
    """Which images stand beside the last ones depends on how many questions are asked."""
    heard = {}

    def answer(study, task, compressor, count, place, places):
        beside = {n: context.arranged(task.samples, task.samples[n], count, place) for n in places}
        text = {n: "-".join(str(sum(image.tobytes())) for image in images) for n, images in beside.items()}
        heard[study.folder] = heard.get(study.folder, 0) + len(places)
        return [{"given": text[n], "visual_tokens_by_layer": [9 * count] * 4} for n in places]

    def given(subject):
        """The answers in the order of the questions, by number and place of the images."""
        told = {}
        real = context.resumable_records

        def keep(study, task, name, settings, *rest):
            records = real(study, task, name, settings, *rest)
            told[settings["method"], settings["images"], settings["place"]] = [one["given"] for one in records]
            return records

        with monkeypatch.context() as patched:
            patched.setattr(context, "resumable_records", keep)
            return context.measure(subject), told

    monkeypatch.setattr(context, "_answer", answer)
    few = replace(subject, task=replace(subject.task, samples=subject.task.samples[:4]))  # two of the four images
    given(few)
    fresh = replace(subject, folder=tmp_path / "fresh")
    assert given(subject) == given(fresh)
    before = dict(heard)
    given(few)
    assert given(subject) == given(fresh)
    assert heard == before  # and what was asked once is not asked again


def test_differences_are_from_the_same_method_with_one_image(subject, monkeypatch):
    right = {("only", 1): "it", ("first", 2): "no", ("last", 2): "it"}

    def answer(study, task, compressor, count, place, places):
        return [{"given": right[place, count], "visual_tokens_by_layer": [9 * count] * 4} for _ in places]

    monkeypatch.setattr(context, "_answer", answer)
    monkeypatch.setattr(context, "COUNTS", (1, 2))
    monkeypatch.setattr(context, "METHODS", "pool2d")
    rows = [row for row in context.measure(subject) if row["method"] == "pool2d"]
    assert [(row["score"], row["difference"]) for row in rows] == [(100, 0), (0, -100), (100, 0)]


def test_several_images_a_prompt_are_summed_up(subject):
    """The counts of `Answerer.answer`, which everything here goes by."""
    answerer = subject.study().answerer
    images = [sample.load() for sample in subject.task.samples[:4]]
    with attach(subject.model, NoCompression()) as compressed, torch.inference_mode():
        answers = answerer.answer(compressed, images, ["w4", "w5 w6"], 2)
    assert [(answer.visual_tokens, answer.by_layer) for answer in answers] == [(72, (72,) * 4)] * 2
    assert [answer.text_tokens for answer in answers] == [3, 4]
