"""`vlmzip methods` and `vlmzip.available`: the catalogue and its filters."""

import json
import re
from typing import get_args

import pytest

import vlmzip
from vlmzip import UserError, outline
from vlmzip.cli.main import main
from vlmzip.sites import Cost, Kind


def listed(capsys, *arguments):
    main(["methods", "--json", *arguments])
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize(
    ("arguments", "filters"),
    [
        ([], {}),
        (["--kind", "pool"], {"kind": "pool"}),
        (["--site", "in_llm"], {"site": "in_llm"}),
        (["--text-aware"], {"text_aware": True}),
        (["--no-text-aware", "--kind", "prune"], {"text_aware": False, "kind": "prune"}),
        (["--trained-weights"], {"trained_weights": True}),
        (["--no-trained-weights"], {"trained_weights": False}),
        (["--videos-only"], {"videos_only": True}),
        (["--no-videos-only", "--kind", "prune"], {"videos_only": False, "kind": "prune"}),
        (["--without", "cls_attention", "keys"], {"without": ["cls_attention", "keys"]}),
        (["--without", "cls_attention"], {"without": "cls_attention"}),
    ],
)
def test_the_command_and_the_library_filter_alike(capsys, arguments, filters):
    rows = listed(capsys, *arguments)
    assert list(rows) == list(vlmzip.available(**filters))
    assert rows


def test_filters_leave_what_they_name():
    assert {"fastv", "sparsevlm"} <= set(vlmzip.available(text_aware=True))
    assert "visionzip" not in vlmzip.available(without=["keys"])
    assert list(vlmzip.available(trained_weights=True)) == ["qformer"]
    assert "evs" in vlmzip.available(videos_only=True)
    assert "evs" not in vlmzip.available(videos_only=False)
    assert "visionzip" not in vlmzip.available(site="in_llm")


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"kind": "prun"}, "did you mean 'prune'"),
        ({"site": "in_lm"}, "did you mean 'in_llm'"),
        ({"without": ["key"]}, "did you mean 'keys'"),
        ({"without": "key"}, "got 'key'; did you mean 'keys'"),
    ],
)
def test_unknown_filters_are_refused_with_the_closest(filters, message):
    with pytest.raises(UserError, match=message):
        vlmzip.available(**filters)


@pytest.mark.parametrize("name", ["text_aware", "trained_weights", "videos_only"])
def test_a_filter_that_is_neither_true_nor_false_is_refused(name):
    with pytest.raises(UserError, match=f"{name} must be True, False or None, got 'yes'"):
        vlmzip.available(**{name: "yes"})


def test_a_filter_without_methods_says_so(capsys):
    assert main(["methods", "--kind", "none", "--text-aware"]) == 2
    assert "no method has all these properties; leave out one of the filters" in capsys.readouterr().err


def test_one_method_shows_its_published_scores_and_their_source(capsys):
    main(["methods", "visionzip"])
    out = capsys.readouterr().out
    assert "kind: prune and merge; cost: N·k; reads: features, cls_attention, keys" in out
    assert (
        "published on LLaVA-1.5-7B at 192 / 128 / 64 tokens: 98.5 / 97.6 / 94.0 % of the score\nsource: VisionZip"
        in out
    )


def test_every_method_has_a_known_kind_and_cost_and_a_source_for_its_scores():
    for method in outline.methods():
        facts = outline.Facts.of(method)
        assert facts.kind in get_args(Kind), facts.name
        assert facts.cost in get_args(Cost), facts.name
        assert bool(facts.published) == bool(facts.published_in), facts.name
        assert set(facts.published) <= {"192", "128", "64"}, facts.name


def test_published_scores_have_the_letter_of_their_source(capsys):
    main(["methods"])
    out = capsys.readouterr().out
    table, legend = out.split("Compare only values with the same letter:\n")
    sources = dict(line.strip().split(": ", 1) for line in legend.strip().splitlines())
    assert set(re.findall(r"/ \S+ / \S+ ([a-z]) ", table.replace("-", "0"))) == set(sources)
    for facts in map(outline.Facts.of, outline.methods()):
        if facts.published:
            (letter,) = (letter for letter, source in sources.items() if source == facts.published_in)
            assert f"{facts.scores} {letter} " in table
