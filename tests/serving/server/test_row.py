"""The text, the end and the sampling of one answer."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmzip.serving.server.engine import Sampling
from vlmzip.serving.server.row import Row, Text

LETTERS = "añ日🙂 .\n"


class Bytes:
    """A processor of which each token is one byte, so that letters come in parts."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(token for token in tokens.tolist() if token).decode(errors="replace")


def row_of(text, **settings):
    """A row after all bytes of a text, or until it ended; its texts after each token."""
    row = Row(Sampling(**{"max_tokens": 1000, **settings}), frozenset([0]), Bytes())
    texts = []
    for token in [*text.encode(), 0]:
        row.add(token)
        texts.append(row.text)
        if row.reason:
            break
    return row, texts


@given(st.text(LETTERS, max_size=30))
def test_parts_of_letters_wait_for_the_rest(text):
    whole = Text(Bytes())
    for token in text.encode():
        whole.add(token)
        assert text.startswith(whole.text)
    whole.finish()
    assert whole.text == text


@given(st.text(LETTERS, max_size=20), st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_first_stop_text(text, stop):
    row, texts = row_of(text, stop=tuple(stop))
    found = [(at + len(each), at) for each in stop if (at := text.find(each)) >= 0]
    # Of stop texts that overlap, the one that is complete first ends the answer; of those, the longest.
    end = min(found)[1] if found else len(text)
    assert row.text == text[:end].strip()
    assert row.reason == "stop"
    for before, after in pairwise(texts):
        assert after.startswith(before), "a text that was sent was taken back"


def test_an_answer_ends_at_its_length_even_within_a_letter():
    row, texts = row_of("ab日", max_tokens=3)
    assert (row.reason, row.count, texts) == ("length", 3, ["a", "ab", "ab\ufffd"])


def test_spaces_around_an_answer_are_left_out():
    texts = row_of("  o t \n")[1]
    assert texts == ["", "", "o", "o", "o t", "o t", "o t", "o t"]


def sample(scores, count=4000, **settings):
    rows = [Row(Sampling(1, seed=seed, **settings), frozenset(), Bytes()) for seed in range(count)]
    return Counter(row.choose(torch.tensor(scores)) for row in rows)


def test_sampling_follows_temperature_and_top_p():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    counts = sample(scores, temperature=1.0)
    assert [counts[token] / 4000 for token in range(4)] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert set(sample(scores, 400, temperature=1.0, top_p=0.75)) == {0, 1}
    assert set(sample(scores, 50, temperature=1.0, top_p=0.01)) == {0}
    assert set(sample(scores, 50, temperature=0.0)) == {0}
    cold = sample(scores, temperature=0.5)
    assert cold[0] / 4000 == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.03)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e-40}, {"temperature": 1e-5}, {"temperature": 5e-324}, {"temperature": 1.0, "top_p": 1e-320}],
)
def test_settings_close_to_0_take_the_most_probable_token(settings):
    assert set(sample([-40.0, 90.0, 89.0, 3e4], 5, **settings)) == {3}
