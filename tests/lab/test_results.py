"""Compare sums over records with sums by hand."""

import csv

import pytest

from vlmzip import NoCompression, Pool2d
from vlmzip.lab.configurations import Configuration
from vlmzip.lab.report import reasons
from vlmzip.lab.results import difference, pareto, results, table
from vlmzip.lab.tasks.metrics import METRICS
from vlmzip.lab.tasks.task import Sample, Task

CONDITIONS = ("model", "dtype", "device", "vlmzip", "torch", "transformers", "commit")
ANSWERS = ("yes", "yes", "no", "no")
PLAIN, SMALL = ("yes", "yes", "no", "yes"), ("yes", "no", "no", "Yes")


class Kept:
    """A study with given records."""

    def __init__(self, by_method, failure=""):
        self.by_method, self.failure = by_method, lambda one: failure

    def records(self, task, one):
        return self.by_method[one.method]


def records(given, tokens, flops):
    return [
        {
            "image": "ab"[n // 2], "given": text, "answers": [right], "groups": {"type": "xy"[n % 2]},
            "score": METRICS["yesno"].score(text, [right]), "visual_tokens_by_layer": tokens,
            "retention": sum(tokens) / 80, "prefill_flops": flops, **dict.fromkeys(CONDITIONS, "it"),
        }
        for n, (text, right) in enumerate(zip(given, ANSWERS, strict=True))
    ]  # fmt: skip


@pytest.fixture
def task():
    samples = [Sample(str(n), "ab"[n // 2], "?", (ANSWERS[n],), lambda: None, "") for n in range(4)]
    return Task("it", "four questions", METRICS["yesno"], samples, 5)


@pytest.fixture
def found(task):
    configurations = [
        Configuration("it", "no_compression", "100%", NoCompression()),
        Configuration("it", "pool2d", "25%", Pool2d(), "nearly", "some images"),
        Configuration("it", "fastv", "25%", None, "too few layers"),
        Configuration("it", "fastv", "11%", None, "too few layers"),
    ]
    kept = {"no_compression": records(PLAIN, [40, 40], 1000), "pool2d": records(SMALL, [20, 10], 300)}
    return list(results(Kept(kept), task, configurations, 0))


def test_the_difference_of_two_results_is_paired(found):
    plain, compressed = found[:2]
    assert difference(compressed.records, plain.records, 0) == compressed.against_plain
    turned = difference(plain.records, compressed.records, 0)
    assert (turned.value, turned.low, turned.high) == (0.25, 0, 0.5)


def test_scores_differences_and_shares(found):
    plain, compressed = found[:2]
    assert (plain.score.value, compressed.score.value) == (0.75, 0.5)
    assert (plain.against_plain.value, compressed.against_plain.value) == (0, -0.25)
    # One of two images lost half; a draw of two images has it zero, one or two times.
    assert (compressed.against_plain.low, compressed.against_plain.high) == (-0.5, 0)
    assert plain.shares["F1"].value == pytest.approx(4 / 5)
    assert compressed.shares["F1"].value == pytest.approx(2 / 4)
    assert (compressed.reached, compressed.flops, compressed.tokens) == (30 / 80, 0.3, "20×1 → 10×1")
    assert list(compressed.changed) == [1, 3]
    assert compressed.groups == {("type", "x"): (1.0, 2), ("type", "y"): (0.0, 2)}


def test_cells(found):
    cells, short_cells = table(found, short=False).texts, table(found).texts
    assert cells(found[1]) == [
        "pool2d", "25%", "37.5%", "20×1 → 10×1", "30.0%", "50.0 [50.0, 50.0]", "-25.0 [-50.0, +0.0]", "2",
        "50.0 [0.0, 66.7]",
    ]  # fmt: skip
    assert short_cells(found[1])[:6] == ["pool2d", "25%", "37.5%", "30.0%", "50.0 ± 0.0", "-25.0 ± 25.0"]
    assert cells(found[0])[6] == short_cells(found[0])[5] == "—"
    assert set(cells(found[2])[2:]) == set(short_cells(found[2])[2:]) == {"—"}


def test_reasons_are_told_once(found):
    assert reasons(found) == [
        "pool2d at 25%: nearly",
        "pool2d at 25%: threshold set from some images",
        "fastv at 25%, 11%: too few layers",
    ]


def test_a_configuration_without_all_records_has_no_score(task):
    configurations = [
        Configuration("it", "no_compression", "100%", NoCompression()),
        Configuration("it", "pool2d", "25%", Pool2d()),
    ]
    kept = {"no_compression": records(PLAIN, [40, 40], 1000), "pool2d": records(SMALL, [20, 10], 300)[:3]}
    compressed = list(results(Kept(kept, "it broke"), task, configurations, 0))[1]
    assert (compressed.score, compressed.note) == (None, "it broke (3 of 4 questions were answered)")
    assert table([compressed]).as_json()[0]["note"] == compressed.note


def test_a_table_has_a_column_for_everything_that_any_row_has(found, tmp_path):
    table([found[3], *found[:3]]).write_csv(tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        last, *rows = csv.DictReader(file)
    assert [row["method"] for row in (*rows, last)] == ["no_compression", "pool2d", "fastv", "fastv"]
    assert (rows[1]["difference"], rows[1]["difference_low"], rows[1]["F1"]) == ("-25.0000", "-50.0000", "50.0000")
    assert (rows[1]["type y"], rows[1]["calibrated_on"], rows[1]["model"]) == ("0.0000", "some images", "it")
    assert (rows[2]["score"], rows[2]["note"]) == ("", "too few layers")


def test_the_pareto_front():
    points = [(100, 80), (50, 80), (50, 70), (25, 60), (30, 60), (10, 65), (60, 80), (75, 85)]
    assert [points[place] for place in pareto(points)] == [(10, 65), (50, 80), (75, 85)]
