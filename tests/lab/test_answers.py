"""The store of answers: batches do not depend on who asks when, and nothing is asked twice."""

import json

import pytest

from tests.lab.test_tasks import question, write
from vlmzip.errors import UserError
from vlmzip.lab.answers import AnswerStore
from vlmzip.lab.answers import question as of_question
from vlmzip.lab.tasks.catalogue import read_task
from vlmzip.processes import Processes

BATCH = 3


@pytest.fixture
def task(tmp_path):
    lines = [question("a.png", question=f"w{number}") for number in range(8)]
    return read_task(write(tmp_path / "asked", *lines) + ":exact", None, None)


def make_series(task, folder, rank=0, count=1, check=lambda sample, record: ""):
    processes = Processes()
    processes.rank, processes.count = rank, count
    store = AnswerStore(folder, "study.json", processes)
    return store.series(task, "pool2d", (), check)


def answering(task, asked, fails_at=None):
    def answer(places):
        if places.start == fails_at:
            raise KeyboardInterrupt
        asked.append(list(places))
        own = {"given": "it", "score": 1.0, "compressor": {}, "visual_tokens_by_layer": [36]}
        return [{**of_question(task, task.samples[place]), **own} for place in places]

    return answer


def test_a_run_that_was_stopped_asks_whole_batches_again_and_nothing_twice(task, tmp_path):
    asked, series = [], make_series(task, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        series.fill(task.samples, BATCH, answering(task, asked, fails_at=3))
    (path,) = (tmp_path / "out").rglob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])  # cut short, as by a kill
    assert series.fill(task.samples, BATCH, answering(task, asked)) == 6
    assert asked == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [6, 7]]
    assert series.open_questions(task.samples, BATCH) == 0
    assert series.fill(task.samples, BATCH, answering(task, asked)) == 0
    assert list(series.read(task.samples)) == [sample.id for sample in task.samples]


def test_processes_ask_the_batches_that_one_process_asks(task, tmp_path):
    asked = {}
    for rank in range(2):
        make_series(task, tmp_path / "out", rank, 2).fill(
            task.samples, BATCH, answering(task, asked.setdefault(rank, []))
        )
    assert asked == {0: [[0, 1, 2], [6, 7]], 1: [[3, 4, 5]]}
    assert make_series(task, tmp_path / "out").open_questions(task.samples, BATCH) == 0


def test_what_is_wrong_with_a_record_is_said(task, tmp_path):
    make_series(task, tmp_path / "out").fill(task.samples, BATCH, answering(task, []))
    series = make_series(
        task, tmp_path / "out", check=lambda sample, record: "its colour is odd" * (sample.question == "w4")
    )
    with pytest.raises(UserError, match=f"sample '{task.samples[4].id}': its colour is odd; delete the line and run"):
        series.read(task.samples)


def test_a_store_is_one_models(tmp_path):
    store = AnswerStore(tmp_path, "suite.json", Processes(), content="results")
    assert store.open({"weights": "a"}, "results of another model") == {}
    store.note({"weights": "a", "more": 1})
    assert store.open({"weights": "a"}, "results of another model")["more"] == 1
    with pytest.raises(UserError, match="holds results of another model: weights is 'a' there and 'b' here; give ano"):
        store.open({"weights": "b"}, "results of another model")
    (tmp_path / "suite.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"suite\.json' was not written by vlmzip; give another --out"):
        store.open({"weights": "a"}, "")
    (tmp_path / "suite.json").unlink()
    (tmp_path / "results").mkdir()
    with pytest.raises(UserError, match=r"has results but no suite\.json, so their model is unknown"):
        store.open({"weights": "a"}, "")
