"""Answers side by side: numbers, drawings, errors."""

import numpy as np
import pytest
from PIL import Image

from tests.serving.playground.running import EXAMPLES
from tests.serving.server.running import QUESTION, data_url, encoded, engine_of
from vlmzip.lab.asking import answer, attach_and_note, build_inputs, plain_account
from vlmzip.methods import FastV, VisionZip
from vlmzip.serving.playground.play import SHARE, Budget, Playground
from vlmzip.serving.server.errors import RequestError
from vlmzip.serving.server.settings import Settings
from vlmzip.visualize.page import data_uri

AVERAGE_48 = Budget(48, remaining=False)


def cards_of(playground, url, names, budget=AVERAGE_48, question=QUESTION):
    return list(playground.run(url, question, budget, names))[-1].cards


def test_answers_and_costs_are_those_of_vlmzip_ask(playground, image, mini, request):
    plain, visionzip, fastv = cards_of(playground, image, ["visionzip", "fastv"])
    inputs = build_inputs(mini, [str(request.config.rootpath / "examples" / "flat.png")], QUESTION)
    for card, method in ((visionzip, VisionZip(keep=48)), (fastv, FastV(keep=16))):
        expected = answer(mini, attach_and_note(mini, method), inputs, 32)
        assert (card.answer.text, card.answer.flops) == (expected.text, expected.account.prefill_flops)
        assert card.answer.by_layer == expected.report.by_layer
        assert card.answer.milliseconds.keys() == expected.account.milliseconds.keys()
    assert plain.answer.flops == plain_account(mini, inputs, expected.report)["prefill_flops"]
    assert (plain.answer.text, plain.answer.by_layer) == ("orange", [144] * 8)
    assert visionzip.answer.fates == "39 kept, CLS kept, 105 merged into 8"
    assert fastv.answer.fates == "16 kept, 128 dropped"


def test_examples_are_different_images_that_are_answered_correctly_with_and_without_compression(playground):
    budget = Budget(round(SHARE * playground.usual_tokens), remaining=True)
    images = [example.image for example in EXAMPLES]
    answers = [
        [card.answer.text for card in cards_of(playground, url, playground.chosen, budget, example.question)]
        for url, example in zip(map(data_uri, images), EXAMPLES, strict=True)
    ]
    assert answers == [["orange"] * 3, ["6"] * 3, ["5"] * 3]
    assert len({image.tobytes() for image in images}) == len(images)


def test_cards_fill_one_after_another(playground, image):
    filled = [
        [not card.pending for card in so_far.cards]
        for so_far in playground.run(image, QUESTION, AVERAGE_48, ["visionzip", "pool2d"])
    ]
    assert filled == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]


def test_tokens_are_drawn_on_the_image_and_the_plain_image_stays(playground, image):
    plain, fastv = (np.asarray(card.answer.images[0]) for card in cards_of(playground, image, ["fastv"]))
    assert plain.shape == fastv.shape
    assert (fastv.mean(axis=(0, 1)) < plain.mean(axis=(0, 1)) / 2).all()  # dropped tokens are dark


def test_a_budget_that_cannot_be_met_is_said_on_the_card_and_the_others_answer(playground, image):
    _, fastv, pool = cards_of(playground, image, ["fastv", "pool2d"], Budget(20, remaining=False))
    assert fastv.error.startswith("2 of 8 layers see all tokens before fastv acts")
    assert fastv.answer is None
    assert pool.answer.by_layer == [16] * 8
    assert pool.note == "the nearest to 13.9% that it has is 11.1%"


@pytest.mark.parametrize("keep", [1, 9, 48])
def test_all_methods_that_are_chosen_at_first_answer_at_the_first_kind_of_budget(playground, image, keep):
    _, *cards = cards_of(playground, image, playground.chosen, Budget(keep, remaining=True))
    assert [card.error for card in cards] == [""] * 2


def test_a_defect_of_a_method_is_said_on_its_card(playground, image, monkeypatch):
    def broken(self, tokens):
        raise RuntimeError("secret path")

    monkeypatch.setattr(VisionZip, "assign", broken)
    _, visionzip, pool = cards_of(playground, image, ["visionzip", "pool2d"])
    assert visionzip.error == "failed with this image; the server's log says where"
    assert pool.answer is not None


def test_a_defect_of_the_model_is_said_on_one_card(playground, image, monkeypatch):
    """Otherwise Gradio would print its text."""

    def broken(*arguments):
        raise RuntimeError("secret path")

    with monkeypatch.context() as patched:
        patched.setattr(playground._answerer, "answer", broken)
        (card,) = cards_of(playground, image, ["pool2d"])
    assert card.error == "failed with this image; the server's log says where"
    monkeypatch.setattr(playground.reader, "read", broken)
    with pytest.raises(RequestError, match="failed with this image"):
        playground.count(image)


@pytest.mark.parametrize(
    ("url", "question", "names", "message"),
    [
        ("", QUESTION, [], "give an image first"),
        (None, "  ", [], "type a question first"),
        (None, "x" * 2001, [], "the question has 2,001 characters"),
        (None, "<image> ?", [], "text must not contain <image>"),
        ("data:image/png;base64,AAAA", QUESTION, [], "image 1 is not PNG, JPEG, WEBP, GIF or BMP"),
        ("http://localhost/a.png", QUESTION, [], "the file is not PNG, JPEG, WEBP, GIF or BMP"),
        ("data:video/mp4;base64,AAAA", QUESTION, [], "mini takes no clips; models that take them are "),
        (None, QUESTION, ["visionzip(keep=3)"], "there is no method"),
        (None, QUESTION, ["visionzip"] * 9, "choose at most 8"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(playground, image, url, question, names, message):
    (card,) = cards_of(playground, image if url is None else url, names, question=question)
    assert message in card.error
    assert "\n" not in card.error


def test_an_image_has_the_limits_of_the_server(engine):
    url = data_url(encoded(Image.new("RGB", (40, 40))))
    (card,) = cards_of(Playground(engine, Settings(max_pixels=1000)), url, [])
    assert "1,000" in card.error


def test_words_that_the_model_does_not_know_are_named(playground, image):
    *_, last = playground.run(image, "what color is the zebra ?", AVERAGE_48, [])
    assert "mini does not know 'zebra'" in last.notes


def test_an_answer_that_takes_too_long_is_an_error(engine, image):
    playground = Playground(engine, Settings(max_seconds=0.0001))
    (card,) = cards_of(playground, image, [])
    assert card.error == "not answered within 0.0001 seconds"


def test_a_stopped_engine_is_said(mini, image):
    (card,) = cards_of(Playground(engine_of(mini, Settings()), Settings()), image, [])
    assert card.error == "the engine has stopped"


def test_methods_are_detached_after_each_answer(playground, image, mini):
    before = sum(len(module._forward_pre_hooks) for module in mini.model.modules())
    cards_of(playground, image, ["fastv", "vcc"])
    assert sum(len(module._forward_pre_hooks) for module in mini.model.modules()) == before


def test_count_is_that_of_the_image(playground, image):
    assert playground.count(image) == playground.usual_tokens == 144


def test_a_budget_above_the_tokens_of_the_image_is_refused(playground, image):
    (card,) = cards_of(playground, image, ["visionzip"], Budget(145, remaining=True))
    assert card.error == "the budget is 145 visual tokens; give 1 to 144, as the image has"
