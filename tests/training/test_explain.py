"""The exact cost of a schedule, next to LLaVolta's printed values."""

import pytest
import torch

from tests.families import FAMILIES
from vlmzip.errors import UserError
from vlmzip.lab.bench.presets import PRESETS, make_model
from vlmzip.lab.papers.llavolta import explain_beside_paper as explain
from vlmzip.models import family_of
from vlmzip.training.explain import COLUMNS, draw_staircase, lines
from vlmzip.training.schedule import SCHEMES, read_schedule, scheme

#: Exact means over the stages, computed by hand from the token counts of Eq. 3: (3312 + 18432) / 2 and so on.
TOKENS = {
    "none": 18432,
    "two-stage": 10872,
    "three-stage-deeper": 10704,
    "three-stage-wider": 10512,
    "four-stage-wider-then-deeper": 11340,
    "four-stage-deeper-then-wider": 11484,
    "last-stage-compression": 7848,
}


@pytest.fixture(scope="module")
def llava_7b():
    return family_of(make_model(PRESETS["llava-1.5-7b"].config(), "meta", torch.bfloat16))


@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_are_the_exact_means_with_the_papers_values(llava_7b, name):
    cost = explain(scheme(name), llava_7b, steps=5196, text_tokens=62)
    assert cost.tokens == pytest.approx(TOKENS[name])
    assert cost.ratio == pytest.approx(18432 / TOKENS[name])
    assert sum(stage.steps for stage in cost.stages) == 5196
    if name != "none":
        assert len(cost.printed) == 3  # tokens, CR, hours
        for stage in cost.stages:  # 825.81 is printed as 825
            printed = float(stage.printed[0].removeprefix("CR ").removesuffix(" %"))
            assert 100 * stage.ratio == pytest.approx(printed, abs=1)


def test_the_last_stage_scheme_agrees_with_the_papers_total(llava_7b):
    assert explain(scheme("last-stage-compression"), llava_7b, 30, 62).printed[:2] == ("7848 tokens", "CR 235 %")


def test_flops_are_counted_per_layer(llava_7b):
    """Linear layers alone would give the share of all tokens; products between tokens make it slightly smaller."""
    cost = explain(scheme("two-stage"), llava_7b, 100, text_tokens=62)
    linear = (3312 + 32 * 62) / (18432 + 32 * 62)
    assert linear - 0.02 < cost.stages[0].flops < linear
    assert cost.stages[1].flops == 1
    assert cost.flops == pytest.approx((cost.stages[0].flops + 1) / 2)


def test_shares_weigh_the_mean_and_hide_the_papers_totals(llava_7b):
    cost = explain(read_schedule({"name": "two-stage", "split": [25, 75]}), llava_7b, 100, 62)
    assert cost.tokens == pytest.approx(0.25 * 3312 + 0.75 * 18432)
    assert cost.printed == ()
    assert [stage.printed for stage in cost.stages] == [("CR 557 %",), ("CR 100 %",)]
    assert [stage.steps for stage in cost.stages] == [25, 75]


def test_a_scheme_without_one_of_its_stages_is_not_the_papers(llava_7b):
    cost = explain(read_schedule({"name": "three-stage-deeper", "split": [50, 0, 50]}), llava_7b, 100, 62)
    assert [stage.compressor for stage in cost.stages] == ["llavolta(layer=2,stride=8)", "no_compression"]
    assert [stage.printed for stage in cost.stages] == [(), ()]
    assert cost.printed == ()


def test_means_are_over_the_steps_that_are_run(llava_7b):
    four = scheme("four-stage-deeper-then-wider")
    one = explain(four, llava_7b, 1, 62)
    assert [line[2] for line in lines(one)] == ["1", "0", "0", "0", "1"]
    assert (one.tokens, one.flops) == (3312, one.stages[0].flops)
    assert one.printed == ()
    assert explain(four, llava_7b, 5, 62).tokens == pytest.approx((2 * 3312 + 10368 + 13824 + 18432) / 5)
    never = explain(read_schedule({"stages": [{"compressor": "none"}, {"compressor": "dfmr"}]}), llava_7b, 1, 62)
    assert never.tokens == 18432


def test_random_factors_give_a_mean_and_dfmr_no_number(llava_7b):
    random = explain(read_schedule("random_factor"), llava_7b, 10, 62)
    assert random.tokens == pytest.approx(32 * (576 + 144 + 64) / 3)
    dfmr = explain(read_schedule({"stages": [{"compressor": "dfmr"}, {"compressor": "none"}]}), llava_7b, 10, 62)
    assert (dfmr.tokens, dfmr.flops, dfmr.stages[0].ratio) == (None, None, None)
    assert dfmr.stages[1].tokens == 18432
    assert "the images decide" in lines(dfmr)[0]
    draw_staircase(dfmr, "dfmr")


def test_default_layers_move_as_in_training():
    family = family_of(FAMILIES["qwen3_vl"].build(streams=(0, 1, 2)))
    (stage,) = explain(read_schedule("fastv"), family, 10, 62).stages
    assert stage.compressor == "fastv(layer=3)"
    assert stage.tokens == family.profile().size * 3.5


def test_layers_beyond_the_llm_are_refused(llava_7b):
    with pytest.raises(UserError, match=r"layer must be from 1 to .*, got 40"):
        explain(read_schedule("llavolta(layer=40)"), llava_7b, 10, 62)


def test_lines_and_staircase(llava_7b):
    cost = explain(scheme("four-stage-wider-then-deeper"), llava_7b, 400, 62)
    found = lines(cost)
    assert {len(line) for line in found} == {len(COLUMNS)}
    assert found[0] == [
        "1",
        "0% to 25%",
        "100",
        "llavolta(layer=2,stride=8)",
        "3,312",
        "556.52 %",
        found[0][6],
        "CR 557 %",
    ]
    assert found[-1][4:6] == ["11,340", "162.54 %"]
    assert found[-1][-1] == "11088 tokens, CR 166 %, 12.9 h"
    bars = draw_staircase(cost, "four stages").axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([17.97, 53.125, 75, 100], abs=0.01)
    assert [bar.get_x() for bar in bars] == [0, 25, 50, 75]
