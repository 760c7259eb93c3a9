"""The results as HTML."""

import torch
from PIL import Image

from vlmzip.serving.playground.answering import PARTS, Answer
from vlmzip.serving.playground.cards import Card, Results, scaled, timing


def answer(text="orange", by_layer=(144,) * 8, flops=1_236_000_000):
    milliseconds = dict(zip(PARTS, (10.0, 1.0, 20.0), strict=True))
    return Answer("visionzip(keep=48)", text, 144, by_layer, "39 kept", flops, milliseconds, [Image.new("RGB", (8, 8))])


def test_a_card_compares_with_the_plain_answer():
    card = Card("fastv", answer("yellow", (144,) * 2 + (16,) * 6, 412_000_000), plain=answer())
    assert card.facts == [
        ("visual tokens", "144 → 48", "33.3% on average over the layers"),
        ("by layer", "144×2 → 16×6", ""),
        ("prefill FLOPs", "412 M", "3.0x fewer"),
        ("ms", "31", "vision encoder 10, selection 1, LLM 20"),
    ]
    html = Results([card]).html()
    assert "another answer" in html
    assert "tokens × layers of the LLM" in html
    assert "data:image/png;base64," in html


def test_texts_are_escaped():
    html = Results([Card("a", answer("<script>alert(1)</script>")), Card("b", error="<b>")], ["<i>"]).html()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "<b>&" not in html
    assert "&lt;i&gt;" in html


def test_a_note_stands_before_the_answer():
    html = Results([Card("dfmr", answer(), note="ignores the budget")]).html()
    assert html.index("ignores the budget") < html.index("orange")


def test_an_error_stands_alone():
    html = Results([Card("fastv", error="2 of 8 layers see all tokens")]).html()
    assert "2 of 8 layers" in html
    assert "<img" not in html


def test_a_card_without_answer_waits():
    assert "waits" in Results([Card("fastv")]).html()


def test_milliseconds_say_what_they_include():
    text = timing(torch.device("cpu"), torch.float32)
    assert "on cpu, float32" in text
    assert "projector, prefill and decoding" in text


def test_operations_have_units():
    assert [scaled(value) for value in (0, 999, 1236, 1.236e9, 8.2e18)] == ["0", "999", "1.24 k", "1.24 G", "8,200 P"]
