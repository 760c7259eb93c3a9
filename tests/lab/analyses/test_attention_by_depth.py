"""Shares of attention, against the weights that eager attention returns."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.lab.analyses.numbered import numbered_subject
from tests.tiny import IMAGE_TOKEN
from vlmzip.lab.analyses import attention_by_depth as analysis
from vlmzip.lab.analyses.subject import Unsuited
from vlmzip.models import family_of

pytestmark = pytest.mark.slow  # whole runs of an analysis

STEPS = 5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_are_those_of_eager_attention(fresh, attention):
    """Grouped queries, rotary positions on one and three axes, padding, prompts that see each other both ways."""
    family = fresh
    inputs = family.batch([1, "image", 5, 6], [1, 3, "image", 7, 5, 6, 8])
    visual = inputs["input_ids"] == IMAGE_TOKEN
    generate = dict(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    family.model.set_attn_implementation(attention)
    with torch.no_grad(), analysis.reading(family_of(family.model), visual) as read:
        family.model.generate(**inputs, **generate)
    family.model.set_attn_implementation("eager")
    out = family.model.generate(**inputs, **generate, output_attentions=True, return_dict_in_generate=True)
    length = visual.shape[1]
    for step, layers in enumerate(out.attentions):
        for layer, weights in enumerate(layers):
            row = weights.mean(1)[:, -1]
            expected = (row[:, :length] * visual).sum(-1)
            torch.testing.assert_close(read.shares[layer][step], expected, atol=1e-5, rtol=1e-4)
            if layer == 0:
                some = (row > 0).sum(-1)
                torch.testing.assert_close(read.uniform[step], visual.sum(-1) / some)
    assert [len(own) for own in read.shares] == [STEPS] * len(out.attentions[0])
    assert not any(layer._forward_pre_hooks for layer in family_of(family.model).decoder_layers)


def test_an_answer_ends_before_its_end():
    tokens = torch.tensor([[5, 6, 2, 0], [2, 0, 0, 0], [5, 6, 7, 8]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(analysis.says_something(tokens, 2), expected)
    assert torch.equal(analysis.says_something(tokens, [2, 9]), expected)
    assert analysis.says_something(tokens, None).all()


def test_means_are_over_the_steps_that_count():
    read = analysis.Read(torch.ones(2, 3, dtype=torch.bool), [[], []])
    for layer in range(2):
        read.shares[layer] = [torch.tensor([0.1, 0.2]) * (layer + 1), torch.tensor([0.3, 0.9])]
    read.uniform = [torch.tensor([0.5, 0.4]), torch.tensor([0.7, 0.9])]
    shares, uniform = read.over(torch.tensor([[True, True], [True, False]]))
    torch.testing.assert_close(shares, torch.tensor([[0.2, 0.25], [0.2, 0.4]]))
    torch.testing.assert_close(uniform, torch.tensor([0.6, 0.4]))


def test_answers_on_a_gpu_meet_what_was_read():
    """Fake tensors have devices but no numbers; they need no GPU."""
    with FakeTensorMode():
        read = analysis.Read(torch.ones(2, 3, dtype=torch.bool, device="cuda"), [[torch.ones(2)]], [torch.ones(2)])
        shares, uniform = read.over(torch.ones(2, 1, dtype=torch.bool, device="cuda"))
        assert shares.device == uniform.device == torch.device("cpu")


def test_rows_of_the_table_are_means_over_questions(tmp_path):
    subject = numbered_subject(tmp_path)
    rows = analysis.measure(subject)
    answers = analysis._answer(subject.study(), subject.task, range(3))
    answers += analysis._answer(subject.study(), subject.task, range(3, len(subject.task.samples)))
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    for layer, row in enumerate(rows):
        mean = 100 * sum(answer["attention"][layer] for answer in answers) / len(answers)
        assert row["attention"] == pytest.approx(mean, abs=0.006)
        assert row["low"] <= row["attention"] <= row["high"]
        assert row["visual_tokens"] == 36
    assert rows[0]["uniform"] == pytest.approx(100 * sum(a["uniform"] for a in answers) / len(answers), abs=0.006)
    assert rows == analysis.measure(subject)  # from the records


def test_sliding_windows_do_not_suit_it(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "has_sliding_windows", lambda model_family: True)
    with pytest.raises(Unsuited, match="sliding windows"):
        analysis.measure(numbered_subject(tmp_path))
