"""Files of published numbers are complete and consistent, fit our methods, and match measured numbers."""

import importlib.util
import math
from pathlib import Path

import pytest

from vlmzip import Grid, LLaVolta, Profile, QFormer, UserError, VisionZip
from vlmzip.lab.papers import CERTAINTIES, MeasuredScore, against, averages, papers, published, show
from vlmzip.lab.papers.averages import AVERAGED, KNOWN, every_column, sets_that_fit
from vlmzip.lab.papers.published import read, tables
from vlmzip.methods.sparsevlm import SCHEDULES

#: LLaVA-1.5-7B, as in the papers.
PAPER = Profile(Grid(1, 24, 24), layers=32)
#: Files that no command reads, beside the script that makes docs/papers.md from them.
BESIDE = Path(__file__).parents[2] / "docs" / "_make" / "published"
FILES = tables() | {path.name: read(path.read_text(encoding="utf-8")) for path in BESIDE.glob("*.csv")}
EVERY = [row for rows in FILES.values() for row in rows]

# --- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(FILES))
def test_every_row_is_whole_and_says_where_it_is_from(file):
    rows = FILES[file]
    assert rows
    for row in rows:
        assert all((row.paper, row.table, row.model, row.method, row.metric, row.unit, row.source)), row
        assert row.certainty in CERTAINTIES, row
        assert row.note or row.certainty != "unconfirmed", row
        assert math.isfinite(row.value), row
        assert not row.keep or float(row.keep.removesuffix("%")) >= 0, row
        assert all(cell == cell.strip() for cell in vars(row).values() if isinstance(cell, str)), row


def test_the_files_are_the_package_s_own_and_named_by_paper():
    folder = Path(importlib.util.find_spec("vlmzip.lab.papers").origin).parent
    assert set(tables()) == {path.name for path in folder.glob("*.csv")}
    assert {"visionzip", "llavolta", "llava-zip", "fastv"} <= set(papers())
    assert {*papers(), "sparsevlm", "diffprune"} == {row.paper for row in EVERY}


def test_the_package_has_the_files_that_commands_show():
    """`eval --against` compares scores; `train --explain` prints what LLaVolta's tables say of its schemes."""

    def is_shown(row):
        return row.metric in ("score", "relative score") or (row.paper, row.table) == ("llavolta", "Table 1")

    assert [file for file, rows in FILES.items() if any(map(is_shown, rows)) != (file in tables())] == []
    assert len(FILES) > len(tables())


def test_no_number_stands_twice():
    keys = [(r.paper, r.table, r.model, r.method, r.setting, r.keep, r.benchmark, r.metric) for r in EVERY]
    assert [key for key in set(keys) if keys.count(key) > 1] == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("57.7", "n/a", "could not convert"),
        (",note\n", "\n", "columns must be"),
        ("a note", "a note,more", "cells"),
        (",a note", "", "cells"),
    ],
)
def test_a_broken_file_is_refused(old, new, message):
    text = (
        "paper,table,model,method,setting,keep,benchmark,metric,value,unit,source,certainty,note\n"
        "p,Table 1,m,visionzip,layer=2; retrained,64,GQA,score,57.7,points,Table 1,as printed,a note\n"
    )
    (row,) = read(text)
    assert (row.value, row.decimals, row.settings) == (57.7, 1, {"layer": "2"})
    with pytest.raises(ValueError, match=message):
        read(text.replace(old, new))


# --- against themselves -------------------------------------------------------------------------------------------

COMPLETE = [average for paper in papers() for average in averages(paper) if average.complete]


def name(average):
    row = average.row
    return f"{row.paper}-{row.table}-{row.method}-{row.setting}-{row.keep}".replace(" ", "")


@pytest.mark.parametrize("average", COMPLETE, ids=name)
def test_an_average_follows_from_its_columns_or_is_known_not_to(average):
    assert average.error < 0.25
    assert average.agrees != bool(average.known), f"printed {average.row.value}, recomputed {average.mean:.2f}"


def test_enough_averages_can_be_recomputed_and_all_known_mistakes_are_among_them():
    assert len(COMPLETE) == 39
    assert sum(bool(average.known) for average in COMPLETE) == len(KNOWN) == 1


def test_one_choice_of_columns_gives_visionzips_averages_over_seven():
    assert sets_that_fit(every_column("visionzip", "LLaVA-NeXT-7B")) == [AVERAGED["visionzip", "LLaVA-NeXT-7B"]]


def test_columns_that_are_missing_follow_from_the_average():
    """At 128 tokens, MM-Vet is 32.6 (31.1 without compression), and LLaVA-Bench is missing."""
    (row,) = [a for a in averages("visionzip") if a.row.table == "Table 1" and len(a.parts) == 10]
    assert not row.complete
    assert row.parts["MM-Vet"] == pytest.approx(100 * 32.6 / 31.1)
    assert (sum(row.parts.values()) + row.missing) / 11 == pytest.approx(97.6)


def test_speed_ups_are_those_of_the_times():
    rows = {(r.method, r.metric): r for r in published("visionzip") if r.table == "efficiency"}
    for metric, speed_up in (("total time", "speed-up of total time"), ("prefill time", "speed-up of prefill")):
        printed = rows["visionzip", speed_up]
        ratio = rows["no_compression", metric].value / rows["visionzip", metric].value
        assert abs(ratio - printed.value) <= printed.half_unit


# --- against our methods ------------------------------------------------------------------------------------------


def tokens_over_all_layers(row):
    layer, stride = (tuple(map(int, row.settings[key].split(","))) for key in ("layer", "stride"))
    return sum(LLaVolta(layer=layer, stride=stride).tokens_by_layer(PAPER))


def test_llavoltas_budgets_are_what_its_layers_and_strides_give():
    rows = [r for r in published("llavolta") if {"layer", "stride"} <= r.settings.keys() and r.keep]
    assert len(rows) > 50
    for row in rows:
        assert float(row.keep) == tokens_over_all_layers(row) / 32, row
        if row.metric == "tokens over all layers" and row.table != "Table 2":  # means over stages there
            assert row.value == tokens_over_all_layers(row), row
    (qformer,) = [r for r in published("llavolta") if r.method == "qformer" and r.metric == "tokens over all layers"]
    assert qformer.value == sum(QFormer().tokens_by_layer(PAPER)) == 32 * float(qformer.keep)


def test_llavoltas_ratios_are_equation_3s_except_in_tables_2_and_7():
    ratios = [r for r in published("llavolta") if r.metric == "compression ratio" and "stride" in r.settings]
    off = {r.table for r in ratios if abs(100 * 576 * 32 / tokens_over_all_layers(r) - r.value) >= 1}
    assert off == {"Table 2", "Table 7"}
    assert {r.table for r in ratios} > {"Table 1", "Table 3", "Table 4", "Table 5"}


def test_sparsevlms_schedules_are_our_own():
    rows = [r for r in EVERY if (r.paper, r.metric) == ("sparsevlm", "kept tokens")]
    found = {}
    for row in rows:
        found.setdefault(row.settings["schedule"], {}).setdefault(int(row.keep), []).append(int(row.value))
    assert {v: {k: tuple(c) for k, c in b.items()} for v, b in found.items()} == SCHEDULES


@pytest.mark.parametrize(("model", "crops"), [("LLaVA-1.5-7B", 1), ("Mini-Gemini-7B", 1), ("LLaVA-NeXT-7B", 5)])
def test_visionzips_splits_are_our_own(model, crops):
    rows = [r for r in EVERY if (r.paper, r.model) == ("visionzip", model) and r.metric.endswith("tokens") and r.keep]
    assert len(rows) == 6
    for row in rows:
        split = VisionZip(keep=int(row.keep) // crops).split(576)
        assert row.value == crops * split[row.metric == "contextual tokens"]


# --- beside measured numbers --------------------------------------------------------------------------------------


def mine(benchmark="GQA", value=55.5, model="llava-hf/llava-1.5-7b-hf", method="visionzip", **budget):
    return MeasuredScore(model, method, benchmark, value, **(budget or {"tokens": 64}))


def test_a_measured_number_meets_every_published_one():
    """The published numbers are without training, tuned, and rerun by others."""
    found = against("visionzip", [mine()])
    pairs = [(c.published.setting, c.published.value, round(c.difference, 2)) for c in found]
    assert pairs == [("", 55.1, 0.4), ("projector tuned", 57.0, -1.5), ("run again", 55.53, -0.03)]


@pytest.mark.parametrize(
    ("paper", "measured", "value"),
    [
        ("visionzip", mine(method="no_compression", retention=1.0), 61.9),
        ("visionzip", mine("sqa", method="SparseVLM", tokens=192), 69.1),
        ("VisionZip", mine("MMB", model="llava-hf/llava-v1.6-vicuna-7b-hf", method="sparsevlm", tokens=640), None),
        ("visionzip", mine("seed-i", model="llava-v1.6-vicuna-7b-hf", method="no_compression", tokens=2880), 70.2),
        ("visionzip", mine("DocVQA", model="Qwen/Qwen2.5-VL-7B-Instruct", retention=0.7), 94.5),
        ("visionzip", mine("MSVD", model="LanguageBind/Video-LLaVA-7B-hf", tokens=136), 63.5),
        ("llavolta", mine("LLaVA-W", method="llavolta", tokens=360), 69.2),
        ("visionzip", MeasuredScore("LLaVA-1.5-7B", "fastv", "average of 11", 80, 64, metric="relative score"), 75.6),
        ("dfmr", mine("GQA", method="dfmr"), None),
    ],
)
def test_names_and_budgets_in_their_usual_spellings(paper, measured, value):
    (found,) = against(paper, [measured])
    assert (found.published and found.published.value) == value
    assert (found.difference is None) == (value is None) == bool(found.reason)


@pytest.mark.parametrize(
    ("budget", "matches"),
    [
        ({"tokens": 63}, True),  # 11 % of 576
        ({"retention": 1 / 9}, True),
        ({"retention": 0.11}, True),
        ({"tokens": 66}, False),
        ({"retention": 0.056}, False),
    ],
)
def test_budgets_are_the_same_within_two_percent(budget, matches):
    assert (against("visionzip", [mine(**budget)])[0].published is not None) == matches


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (mine(model="mini"), "visionzip has no score for this model; it has LLaVA-NeXT-7B, "),
        (mine(method="dfmr"), "no score for this method; it has visionzip, no_compression, fastv, sparsevlm"),
        (mine("ChartQA"), "no score for this benchmark; it has GQA"),
        (mine(tokens=32), "no score for this budget; it has 192, 128, 64"),
        (MeasuredScore("LLaVA-1.5-7B", "visionzip", "GQA", 1.0, 64, metric="F1"), "no F1 for this model"),
    ],
)
def test_what_has_no_published_number_says_why(measured, reason):
    (found,) = [c for c in against("visionzip", [measured, mine()]) if c.published is None]
    assert reason in found.reason
    assert found.measured is measured


def test_an_average_meets_only_one_over_as_many_benchmarks():
    (found,) = against(
        "visionzip", [MeasuredScore("LLaVA-1.5-7B", "visionzip", "average", 94, 64, metric="relative score")]
    )
    assert "average of 11" in found.reason


def test_an_unknown_paper_names_the_closest():
    with pytest.raises(UserError, match="vlmzip has no published numbers of 'visonzip'; did you mean 'visionzip'"):
        against("visonzip", [])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"tokens": None}, "give the tokens"),
        ({"retention": 11}, "retention must be in"),
        ({"retention": 0.0}, "retention must be in"),
    ],
)
def test_a_budget_must_be_one(budget, message):
    with pytest.raises(UserError, match=message):
        mine(**budget)


def test_the_table_as_text_and_as_markdown():
    found = against("visionzip", [mine("MME", 1700.25), mine("ChartQA", 12.5)])
    text = show(found).splitlines()
    assert " ".join(text[0].split()) == "model method setting tokens benchmark paper measured difference source"
    assert "  1690   1700.2    +10.2 " in text[1]
    assert text[1].endswith("(second-hand)")
    assert len({line.index("MME") for line in text[1:4]}) == 1
    assert text[-2] == "Without a published number:"
    assert text[-1].startswith("- llava-hf/llava-1.5-7b-hf, visionzip, 64 tokens, ChartQA = 12.5: visionzip has no")
    markdown = show(found, markdown=True).splitlines()
    assert markdown[1] == "| --- " * 9 + "|"
    assert markdown[2].startswith("| LLaVA-1.5-7B | visionzip |  | 64 | MME | 1690 | 1700.2 | +10.2 | Table 1")
    assert {line.count("|") for line in markdown[:5]} == {10}
    assert show([]) == ""
    assert "(measured by others; accuracy)" in show(
        against("visionzip", [mine("POPE")])
    )  # the note, where there is one
