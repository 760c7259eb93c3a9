"""Stored answers of analyses: each question is asked once, in whole batches, and records are never mixed."""

import json
from dataclasses import replace
from functools import partial

import pytest

from tests.lab.analyses.numbered import numbered_subject
from vlmzip.errors import UserError
from vlmzip.lab.analysis_answers import resumable_records


class Asked:
    """A model that answers with the place, remembers its questions, and can be made to fail."""

    def __init__(self, breaks_at=None):
        self.batches, self.breaks_at = [], breaks_at

    def __call__(self, places):
        if self.breaks_at in places:
            raise RuntimeError("boom")
        self.batches.append(list(places))
        return [{"given": f"w{place}", "visual_tokens_by_layer": [36] * 4} for place in places]


@pytest.fixture
def subject(tmp_path):
    return numbered_subject(tmp_path)


def test_it_resumes_where_it_was_stopped(subject):
    study, task, first, then = subject.study(), subject.task, Asked(breaks_at=4), Asked()
    settings = {"compressor": {"method": "no_compression"}}
    with pytest.raises(RuntimeError):
        resumable_records(study, task, "it", settings, task.samples, first)
    records = resumable_records(study, task, "it", settings, task.samples, then)
    assert (first.batches, then.batches) == ([[0, 1, 2]], [[3, 4, 5], [6]])
    assert [record["given"] for record in records] == [f"w{place}" for place in range(7)]
    assert [record["sample"] for record in records] == [sample.id for sample in task.samples]
    # A batch with a missing sample is asked again completely, but only the missing record is written.
    (path,) = subject.folder.glob("records/*/it-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4] + lines[5:]))
    again = Asked()
    assert resumable_records(study, task, "it", settings, task.samples, again) == records
    assert again.batches == [[3, 4, 5]]


def test_settings_and_names_have_records_of_their_own(subject):
    study, task, asked = subject.study(), subject.task, Asked()
    for name, images in (("it", 1), ("it", 2), ("other", 1)):
        settings = {"compressor": {}, "images": images}
        (record,) = resumable_records(study, task, name, settings, task.samples[:1], asked)
        assert record["images"] == images
    assert len(asked.batches) == 3


def test_records_of_other_questions_are_refused(subject):
    study, task = subject.study(), subject.task
    resumable_records(study, task, "it", {"compressor": {}}, task.samples, Asked())
    changed = [replace(task.samples[0], question="w40"), *task.samples[1:]]
    with pytest.raises(UserError, match="another question"):
        resumable_records(study, task, "it", {"compressor": {}}, changed, Asked())


def test_records_with_other_things_beside_them_are_refused(subject):
    study, task = subject.study(), subject.task
    beside = [[n] for n in range(7)]
    for _ in range(2):
        resumable_records(study, task, "it", {"compressor": {}}, task.samples, Asked(), beside)
    with pytest.raises(UserError, match="sample '7' from a prompt with other questions or images"):
        resumable_records(study, task, "it", {"compressor": {}}, task.samples, Asked(), [*beside[:-1], [8]])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("visual_tokens_by_layer", [36] * 3, "are 3 numbers, and the model has 4 layers"),
        ("score", 1, "its score is 1, and exact gives 0.0"),
        ("given", "w99", "w99 is wrong"),
        ("pixels", "0", "an earlier version of the image .* sample '1'"),
    ],
)
def test_records_that_were_edited_are_refused(subject, name, value, said):
    study, task = subject.study(), subject.task
    ask = partial(resumable_records, study, task, "it", {"compressor": {}}, task.samples)
    check = lambda record: "w99 is wrong" if record["given"] == "w99" else ""  # noqa: E731
    ask(Asked(), check=check)
    (path,) = subject.folder.glob("records/*/it-*.jsonl")
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps(json.loads(first) | {name: value}) + "\n" + "".join(rest))
    with pytest.raises(UserError, match=said):
        ask(Asked(), check=check)


def test_scores_are_the_tasks(subject):
    study, task = subject.study(), subject.task
    sample = replace(task.samples[0], answers=("w0",))
    (record,) = resumable_records(study, task, "it", {"compressor": {}}, [sample], Asked())
    assert (record["score"], record["answers"], record["image"]) == (1, ["w0"], sample.image)
