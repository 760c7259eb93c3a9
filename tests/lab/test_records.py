"""Files of records survive a kill, an editor and a full disk."""

import errno
import json
import os

import pytest

from vlmzip.errors import UserError
from vlmzip.lab.records import KEYS, Shard, read_records


def record(number):
    texts = dict.fromkeys(("task", "image", "question"), "?")
    content = {**texts, "answers": ["it"], "score": 0.5, "compressor": {}, "visual_tokens_by_layer": [36, 9]}
    assert {*content, "sample", "given"} == KEYS
    return content | {"sample": str(number), "given": f"é {number}"}


#: Values that a record cannot have.
WRONG = {
    **dict.fromkeys(("task", "sample", "image", "question", "given", "method", "device"), (None, 1, ["a"], True)),
    "answers": [None, "it", [], [1], [None], {"it": 1}],
    "score": [None, "1", 1e9, -0.1, 2, True, [1], 10**30],
    "compressor": [None, "visionzip", []],
    "visual_tokens_by_layer": [None, 36, [], [-1], [1.5], ["9"], [True], [[9]]],
    **dict.fromkeys(("visual_tokens", "text_tokens", "prefill_flops"), (None, -1, 1.5, "9", True)),
    "retention": [None, "1", -0.5, True],
    "beyond_positions": [None, 1, "true"],
    "groups": [None, [], {"type": 1}],
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deep" / "it.0.jsonl"
    with Shard(path) as shard:
        shard.append([record(0), record(1)])
        shard.append([record(2)])
    return path


def test_what_was_written_is_read(path):
    assert read_records([path]) == {str(n): record(n) for n in range(3)}


@pytest.mark.parametrize("torn", ['{"task": "mi', json.dumps(record(3)), "", "{"])
def test_a_torn_last_line_is_dropped_and_written_again(path, torn):
    with path.open("a") as file:
        file.write(torn)
    assert set(read_records([path])) == {"0", "1", "2"}
    with Shard(path) as shard:
        shard.append([record(3)])
    assert read_records([path]) == {str(n): record(n) for n in range(4)}


def test_a_torn_character_is_no_matter(path):
    with path.open("ab") as file:
        file.write(b'{"given": "\xc3')
    assert set(read_records([path])) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "cannot be read as JSON"),
        ("[1]", "it lacks answers, compressor"),
        ('{"sample": "7"}', "it lacks answers, compressor"),
        ("[" * 100_000, "brackets nested too deeply"),
        (json.dumps(record(1) | {"given": "\ud800"}), "half a character"),
        (json.dumps(record(1) | {"score": float("nan")}), "no number NaN"),
        (json.dumps(record(1))[:-1] + ', "score": 1.0}', "'score' occurs twice"),
        (b"\xff\x00", "cannot be read as JSON"),
        *[
            (json.dumps(record(1) | {name: value}), f"its {name} is .*, not ")
            for name, values in WRONG.items()
            for value in values
        ],
        (json.dumps(record(0)), "'0' has a record before this one"),
    ],
)
def test_a_corrupt_line_in_the_middle_is_named_and_everything_is_kept(path, line, reason):
    lines = path.read_bytes().split(b"\n")
    lines[1] = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"it.0.jsonl:2 is not a record of this run: .*{reason}.*delete the line"):
        read_records([path])
    assert path.read_bytes() == before


def test_a_sample_in_two_files_is_no_sample_twice(path):
    other = path.with_name("it.1.jsonl")
    with Shard(other) as shard:
        shard.append([record(9), record(2)])
    with pytest.raises(UserError, match=r"it\.1\.jsonl:2 is not a record"):
        read_records([path, other])


def test_numbers_beside_the_score_are_wanted_where_they_are_needed(path):
    with pytest.raises(UserError, match=r"it\.0\.jsonl:1 is not a record of this run: it lacks retention"):
        read_records([path], ["retention"])


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_keeps_what_was_written_and_says_so(path, monkeypatch, call):
    before, real = path.read_bytes(), getattr(os, call)

    def full(file, *rest):
        if call == "write" and len(rest[0]) > 10:
            return real(file, rest[0][:10])  # the disk accepts a part of it
        raise OSError(errno.ENOSPC, "No space left on device")

    with Shard(path) as shard:
        with monkeypatch.context() as patched:
            patched.setattr(f"vlmzip.lab.records.os.{call}", full)
            with pytest.raises(UserError, match=r"it\.0\.jsonl.*No space left on device; the records so far are kept"):
                shard.append([record(3)])
        assert path.read_bytes() == before
        shard.append([record(3)])  # the disk has space again
    assert set(read_records([path])) == {"0", "1", "2", "3"}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Shard(tmp_path / "file" / "it.jsonl")
