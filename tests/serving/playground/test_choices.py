"""The methods that the page offers, and their configurations at a budget."""

import pytest

from vlmzip import spec
from vlmzip.errors import BudgetError
from vlmzip.methods import DFMR, EVS, FastV, NoCompression, QFormer, VisionZip
from vlmzip.serving.playground.choices import configured, groups


def names_of(offered):
    return {choice.name for group in offered for choice in group.choices}


def test_mini_offers_what_works_on_it_without_training(mini):
    names = names_of(groups(mini, NoCompression()))
    assert {"visionzip", "fastv", "tome", "pool2d", "dfmr", "vcc"} <= names
    assert not names & {"qformer", "no_compression", "evs", "vidcom2", "pixelprune"}


def test_a_model_without_cls_that_takes_clips_offers_other_methods(qwen):
    names = names_of(groups(qwen, NoCompression()))
    assert {"visionzip", "evs", "vidcom2", "pixelprune", "fastv"} <= names
    assert not names & {"tome", "qformer"}


def test_groups_are_kinds_and_each_method_says_what_it_does(mini):
    offered = groups(mini, NoCompression())
    assert [group.heading.partition(":")[0] for group in offered] == [
        "Prune", "Prune and merge", "Merge", "Pool", "Chain",
    ]  # fmt: skip
    labels = {choice.name: choice.label for group in offered for choice in group.choices}
    assert labels["fastv"].startswith("fastv (inside the LLM): Keep the visual tokens")
    assert labels["pool2d"].startswith("pool2d: Average each factor x factor")
    assert [name for name, label in labels.items() if "ignores the budget" in label] == ["adaptive_visionzip", "dfmr"]
    assert labels["dfmr"].startswith("dfmr (ignores the budget): Average")


@pytest.mark.parametrize("method", [VisionZip(merge="mean"), QFormer(queries=9)])
def test_the_method_of_the_server_is_offered_with_its_settings(mini, method):
    assert spec.write(method) in names_of(groups(mini, method))


@pytest.mark.parametrize("method", [VisionZip(), VisionZip(keep=36), NoCompression()])
def test_a_budget_of_the_server_adds_no_method(mini, method):
    assert names_of(groups(mini, method)) == names_of(groups(mini, NoCompression()))


def test_a_method_with_trained_weights_keeps_its_settings(mini):
    method, note = configured(QFormer(queries=9), 48, mini.family.profile(), remaining=False, is_clip=False)
    assert method == QFormer(queries=9)
    assert "weights were trained" in note


@pytest.mark.parametrize(
    ("method", "remaining", "expected"),
    [
        (VisionZip(), False, VisionZip(keep=48)),
        (FastV(), False, FastV(keep=16)),
        (FastV(), True, FastV(keep=48)),
    ],
)
def test_a_budget_counts_the_average_or_the_remaining_tokens(mini, method, remaining, expected):
    profile = mini.family.profile()
    assert configured(method, 48, profile, remaining=remaining, is_clip=False) == (expected, "")


def test_a_method_that_decides_by_content_keeps_its_settings_and_says_so(mini):
    method, note = configured(DFMR(), 48, mini.family.profile(), remaining=False, is_clip=False)
    assert method == DFMR()
    assert note == "ignores the budget: the image decides how many tokens remain"


def test_a_budget_that_cannot_be_met_is_an_error(mini):
    advice = "give a budget of 37 or more, or count the tokens after the method has acted"
    with pytest.raises(BudgetError, match=f"2 of 8 layers see all tokens before fastv acts.*; {advice}$"):
        configured(FastV(), 20, mini.family.profile(), remaining=False, is_clip=False)
    assert configured(FastV(), 37, mini.family.profile(), remaining=False, is_clip=False)[0].keep == 1


def test_methods_for_videos_get_the_budget_of_a_clip_only(qwen):
    profile = qwen.family.profile()
    assert configured(EVS(), 8, profile, remaining=False, is_clip=True)[0].keep == 8
    with pytest.raises(BudgetError, match="drops tokens of videos only"):
        configured(EVS(), 8, profile, remaining=False, is_clip=False)
