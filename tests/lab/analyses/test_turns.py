"""Second turns, against the whole conversation without a cache; replayed tokens, against those that were kept."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.families import FAMILIES, tiny_llava
from tests.lab.analyses.numbered import numbered_subject
from vlmzip import FastV, NoCompression, TokenMap, VisionZip, attach
from vlmzip.lab.analyses import turns
from vlmzip.lab.analyses.subject import Unsuited
from vlmzip.lab.stats import Bootstrap

pytestmark = pytest.mark.slow  # whole runs of an analysis


def ending_tiny_llava():
    """Some of its answers end before the longest: their rows are padded, and their end is said."""
    model = tiny_llava()
    model.generation_config.eos_token_id = [2, 10, 59, 73]
    return model


@pytest.fixture
def subject(tmp_path):
    return numbered_subject(tmp_path, model=ending_tiny_llava(), batch=2)


def test_every_question_stands_in_both_places_once(subject):
    samples = subject.task.samples
    places = [(samples.index(first), samples.index(second)) for first, second in turns.pairs(samples)]
    assert places == [(4, 0), (0, 1), (1, 4), (3, 2), (2, 3)]


@pytest.mark.parametrize("compressor", [NoCompression(), VisionZip(keep=9), FastV(keep=9, layer=2)])
def test_a_second_turn_is_the_whole_conversation(subject, compressor):
    """Both answers of a batch of pairs, beside each pair alone with its conversation in one prompt and no cache.

    Of FastV the first answers alone: in one prompt the last question chooses its tokens, not the first.
    """
    study, pairs = subject.study(), turns.pairs(subject.task.samples)
    with attach(subject.model, compressor) as compressed:
        found = turns.converse(study, subject.task, compressed, pairs)
    ended = []
    for (first, second), record in zip(pairs, found, strict=True):
        with attach(subject.model, compressor) as compressed:
            inputs = study.answerer.inputs([first.load()], [first.question])
            length = inputs["input_ids"].shape[1]
            ids = compressed.generate(**inputs, max_new_tokens=subject.task.max_new_tokens, do_sample=False)
            assert record["first"]["given"] == said(subject, ids[:, length:])
            ended.append(bool(torch.isin(ids[0, -1], torch.tensor(subject.model.generation_config.eos_token_id))))
            end = "" if ended[-1] else "</s>"
            more = subject.processor.tokenizer(
                f"{end}w90 {second.question} w91", add_special_tokens=False, return_tensors="pt"
            )
            whole = torch.cat([ids, more["input_ids"]], 1)
            if isinstance(compressor, FastV):
                continue
            inputs = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
            out = compressed.generate(**inputs, max_new_tokens=subject.task.max_new_tokens, do_sample=False)
            assert record["given"] == said(subject, out[:, whole.shape[1] :])
    assert len(set(ended)) == 2  # some answers ended, some were cut


def said(subject, ids):
    return subject.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_what_is_replayed_was_kept_for_the_other_question(subject):
    """The tokens that the LLM is left with, beside those that FastV keeps of each pair alone."""
    study, fastv = subject.study(), FastV(keep=3, layer=1)
    pairs = turns.pairs(subject.task.samples)
    own, other = (turns.kept_for(study, fastv, [pair[n] for pair in pairs]) for n in (1, 0))
    assert [turns.left(one).sum() for one in own] == [3] * 5
    assert not all(torch.equal(turns.left(a), turns.left(b)) for a, b in zip(own, other, strict=True))
    used = []

    def spy(compressor, tokens):
        used.append(compressor.kept)
        return TokenMap.keep(compressor.kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns.Replayed, "assign", spy)
        turns.replay(study, subject.task, fastv, pairs)
    assert torch.equal(used[0], torch.cat([turns.left(report) for report in other]))


def test_replaying_a_questions_own_tokens_changes_nothing(subject):
    study, fastv = subject.study(), FastV(keep=3, layer=1)
    samples = [second for _, second in turns.pairs(subject.task.samples)]
    found = turns.replay(study, subject.task, fastv, [(sample, sample) for sample in samples])
    images, questions = [sample.load() for sample in samples], [sample.question for sample in samples]
    with attach(subject.model, fastv) as compressed:
        expected = study.answerer.answer(compressed, images, questions, subject.task.max_new_tokens)
    assert [record["given"] for record in found] == [answer.text for answer in expected]
    assert {tuple(record["visual_tokens_by_layer"]) for record in found} == {(36, 3, 3, 3)}


def test_images_of_several_sizes_get_their_own_tokens(tmp_path):
    subject = numbered_subject(
        tmp_path, model=FAMILIES["qwen2_5_vl"].build(), processor=FAMILIES["qwen2_5_vl"].processor()
    )
    Image.open(tmp_path / "q" / "b.png").resize((32, 48)).save(tmp_path / "q" / "b.png")
    study, fastv, pairs = subject.study(), FastV(keep=3, layer=1), turns.pairs(subject.task.samples)
    found = turns.replay(study, subject.task, fastv, pairs)
    assert len({record["visual_tokens_by_layer"][0] for record in found}) == 2
    assert found == [turns.replay(study, subject.task, fastv, [pair])[0] for pair in pairs]


def test_rows_compare_with_the_plain_model_in_the_same_place():
    def records(*scores):
        return [{"score": score, "visual_tokens_by_layer": [36, 4]} for score in scores]

    plain = {"first": records(1, 1, 1, 0), "second": records(1, 1, 0, 0)}
    compressed = {"first": records(1, 1, 0, 0), "second": records(0, 0, 0, 0), "replayed": records(1, 0, 0, 0)}
    bootstrap = Bootstrap("aabb", 0)
    rows = {place: turns._row(bootstrap, "fastv", "50%", place, compressed, plain) for place in compressed}
    assert {place: row["score"] for place, row in rows.items()} == {"first": 50, "second": 0, "replayed": 25}
    assert {place: row["difference"] for place, row in rows.items()} == {"first": -25, "second": -50, "replayed": -50}
    assert {place: row["extra_loss"] for place, row in rows.items()} == {"first": 0, "second": 25, "replayed": 25}
    assert rows["second"]["tokens"] == 20
    # Images a and b: of the plain model's 1 and 0 in second place nothing is left, whichever are drawn.
    assert (rows["second"]["difference_low"], rows["second"]["difference_high"]) == (-100, 0)
    assert np.isclose(rows["second"]["extra_loss_high"], 100)
    told = turns.findings(
        [
            {**rows["first"], "method": "no_compression"},
            turns._row(bootstrap, "no_compression", "100%", "second", plain, plain),
            *rows.values(),
        ]
    )
    assert "50.0 on first questions, 50.0 on second ones" in told[0]
    assert (
        "second turns: -50.0 points compared with the plain model, where first questions have -25.0; extra loss 25.0"
        in told[1]
    )


def test_the_table_has_each_method_in_its_places_and_is_kept(subject, monkeypatch):
    monkeypatch.setattr(turns, "BUDGETS", ("75%", "33%"))
    rows = turns.measure(subject)
    places = [(row["method"], row["budget"], row["place"]) for row in rows]
    expected = [("no_compression", "100%", "first"), ("no_compression", "100%", "second")]
    expected += [("visionzip", budget, place) for budget in ("75%", "33%") for place in ("first", "second")]
    # FastV acts after two of the four layers, which leaves it more than 33 %.
    expected += [("fastv", "75%", place) for place in ("first", "second", "replayed")]
    assert places == expected
    assert {row["questions"] for row in rows} == {5}
    assert [row["tokens"] for row in rows] == [36] * 2 + [27] * 2 + [12] * 2 + [27] * 3
    monkeypatch.setattr(turns, "converse", None)
    monkeypatch.setattr(turns, "replay", None)
    assert turns.measure(subject) == rows


def test_it_says_what_it_cannot_do(tmp_path, subject):
    alone = numbered_subject(tmp_path / "alone", words=("w4", "w5"), images="ab")
    with pytest.raises(Unsuited, match="two or more questions"):
        turns.measure(alone)
    subject.processor.chat_template = None
    with pytest.raises(Unsuited, match="chat template"):
        turns.measure(subject)
