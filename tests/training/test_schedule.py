"""Schedules: the stage at each step, LLaVolta's schemes, and the forms in a configuration file."""

from fractions import Fraction

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vlmzip import DFMR, LLaVolta, NoCompression
from vlmzip.errors import UserError
from vlmzip.lab.papers import published
from vlmzip.lab.papers.llavolta import IN_THE_PAPER
from vlmzip.training.schedule import SCHEMES, Schedule, Stage, constant, read_schedule, scheme


@pytest.mark.parametrize("name", IN_THE_PAPER)
def test_schemes_are_those_of_table_1(name):
    rows = [row for row in published("llavolta") if row.table == "Table 1"]
    printed = [row for row in rows if row.settings["scheme"] == IN_THE_PAPER[name]]
    stages = scheme(name).stages
    assert len(printed) == len(stages)
    for row, stage in zip(printed, stages, strict=True):
        if "layer" in row.settings:
            assert stage.compressor == LLaVolta(layer=int(row.settings["layer"]), stride=int(row.settings["stride"]))
        else:
            assert stage.compressor == NoCompression()


def test_every_scheme_of_table_1_is_here():
    assert {"none", *IN_THE_PAPER} == set(SCHEMES)
    assert scheme("none").stages == (Stage(NoCompression()),)


def test_only_the_last_scheme_compresses_afterwards():
    after = {name: scheme(name).afterwards for name in SCHEMES}
    assert after.pop("last-stage-compression") == LLaVolta(layer=16, stride=4)
    assert set(after.values()) == {NoCompression()}


def test_layers_scale_with_the_depth_of_the_llm():
    layers = [stage.compressor.layer for stage in scheme("last-stage-compression", depth=8).stages]
    assert layers == [1, 4, 4]


@given(st.lists(st.integers(1, 99), min_size=1, max_size=5), st.integers(1, 300))
def test_steps_agree_with_at(shares, total):
    stages = tuple(Stage(LLaVolta(layer=i + 1), Fraction(share)) for i, share in enumerate(shares))
    schedule = Schedule(stages)
    at = [schedule.at(Fraction(step, total)).compressor.layer - 1 for step in range(total)]
    assert [at.count(i) for i in range(len(stages))] == schedule.steps(total)
    assert at == sorted(at)
    assert schedule.ends[-1] == 1


def test_a_stage_begins_where_the_one_before_ends():
    schedule = scheme("three-stage-deeper")
    assert [schedule.index(Fraction(step, 6)) for step in range(7)] == [0, 0, 1, 1, 2, 2, 2]
    assert scheme("two-stage").index(0.5) == 1
    for nonsense in (-0.01, 1.01):
        with pytest.raises(UserError, match=r"progress must be in \[0, 1\], got"):
            schedule.at(nonsense)


def test_table_9_splits_unevenly_and_0_leaves_a_stage_out():
    schedule = read_schedule({"name": "two-stage", "split": [25, 75]})
    assert schedule.steps(100) == [25, 75]
    assert [one.compressor for one in read_schedule({"name": "two-stage", "split": [100, 0]}).stages] == [LLaVolta()]
    assert read_schedule({"name": "two-stage", "split": [100, 0]}).afterwards == NoCompression()
    with pytest.raises(UserError, match="3 shares for 2 stages"):
        read_schedule({"name": "two-stage", "split": [1, 2, 3]})


def test_any_method_at_any_site_from_yaml():
    content = yaml.safe_load(
        """
        stages:
          - {compressor: "visionzip(keep=25%)", share: 1/3}
          - {compressor: "dfmr(tau=0.2)+fastv(layer=3)", share: 50%}
          - {compressor: none, share: 10}
        afterwards: dfmr
        """
    )
    schedule = read_schedule(content)
    assert [stage.compressor.name() for stage in schedule.stages] == ["visionzip", "chain", "no_compression"]
    assert [stage.share for stage in schedule.stages] == [Fraction(1, 3), 50, 10]
    assert schedule.afterwards == DFMR()
    assert read_schedule("dfmr") == constant(DFMR())
    assert read_schedule("random_factor").afterwards == NoCompression()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("three-stage", "unknown schedule or method 'three-stage'; did you mean 'three-stage-wider'"),
        (3, "3 is not a schedule"),
        ({}, "give name or stages"),
        ({"name": "none", "stages": []}, "give name or stages"),
        ({"name": "two-stage", "splits": [1, 2]}, "unknown key 'splits'; did you mean 'split'"),
        ({"name": "two-stage", "split": 25}, "split must be a list of shares such as .*, got 25"),
        ({"name": "two-stage", "split": [1, "a"]}, "share 'a' is not a number"),
        ({"name": "two-stage", "split": [1, -1]}, "below 0"),
        ({"name": "two-stage", "split": [0, 0]}, "at least one stage"),
        ({"stages": []}, "at least one stage"),
        ({"stages": ["none"]}, "stages must be a list"),
        ({"stages": [{"share": 1}]}, "stage 1 has no compressor"),
        ({"stages": [{"compressor": "none"}, {"compressor": 5}]}, "5 is not a compressor"),
        ({"stages": [{"compressor": "none", "shares": 1}]}, "stage 1: unknown key 'shares'; did you mean 'share'"),
        ({"stages": [{"compressor": "none", "share": 0}]}, "stage 1 has a share of 0"),
        ("random_factor(per=step)+fastv(layer=1)", "random_factor cannot be chained"),
        ("random_factor+fastv(layer=1)", "random_factor cannot be chained"),
        ("fastv(layer=1) + random_factor", "random_factor cannot be chained"),
        ({"stages": [{"compressor": "random_factor+fastv"}]}, "random_factor cannot be chained"),
        ({"name": "two-stage", "afterwards": "random_factor(per=step)"}, "afterwards: random_factor is for training"),
    ],
)
def test_mistakes_are_named(content, said):
    with pytest.raises(UserError, match=said):
        read_schedule(content)
