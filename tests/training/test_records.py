"""LLaVA's JSON, whole or in lines, with everything that can be wrong in it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmzip.errors import UserError
from vlmzip.training import records
from vlmzip.training.records import BadRecord, Record, Records, Turn, read_record


def said(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def record(*texts, **fields):
    return {"id": "7", "conversations": said(*(texts or ("<image>\nwhat ?", "this"))), "image": "a.png", **fields}


def write(path, content, lines):
    text = "\n".join(map(json.dumps, content)) + "\n" if lines else json.dumps(content, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("lines", [True, False])
def test_conversations_of_all_kinds(tmp_path, lines):
    content = [
        record("<image>\nwhat ?", "this", "and ?", "that"),
        record("what <image> and <image> ?", "two", image=["a.png", "b/c.png"]),
        {"conversations": said("hello", "hi")},
    ]
    found = Records(write(tmp_path / "data.json", content, lines))
    assert list(found) == [
        Record("7", (Turn("<image>\nwhat ?", "this"), Turn("and ?", "that")), ("a.png",)),
        Record("7", (Turn("what <image> and <image> ?", "two"),), ("a.png", "b/c.png")),
        Record("", (Turn("hello", "hi"),), ()),
    ]
    assert found.bad == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (record(image=["a.png", "b.png"]), "not as many <image> as pictures"),
        (record("<image> <image> ?", "two"), "not as many <image> as pictures"),
        ({"conversations": said("<image> ?", "none")}, "not as many <image> as pictures"),
        (record("<image> ?"), "does not end with an answer"),
        (record("<image> ?", ""), "an empty answer"),
        (record("?", "<image>"), "an answer with <image>"),
        (record(conversations=said("<image>?", "a")[::-1]), "do not take turns"),
        (record(conversations=[]), "no conversations"),
        (record(conversations=[1, 2]), "without text"),
        (record(image=5), "image is no path"),
        (record(image=[""]), "image is no path"),
        ([1], "not an object"),
    ],
)
def test_what_is_no_record_says_why(content, reason):
    with pytest.raises(BadRecord, match=reason):
        read_record(content)


@pytest.mark.parametrize("lines", [True, False])
def test_bad_records_are_counted_and_the_others_are_read(tmp_path, lines):
    texts = [json.dumps(record(id=n)) for n in range(4)]
    texts[1] = texts[1].replace('"id": 1', '"id": ')
    texts[2] = json.dumps(record(image=["a.png", "b.png"]))
    path = tmp_path / "data.json"
    path.write_text("\n".join(texts) if lines else f"[{', '.join(texts)}]")
    found = Records(path)
    assert [one.id for one in found] == ["0", "3"]
    assert found.bad == [(1, "no JSON"), (2, "not as many <image> as pictures")]
    assert list(found.numbers) == [0, 3]
    assert found.pictures(1) == 1
    assert found.size(1) == len(texts[3])


def test_a_line_cut_short_is_one_bad_record(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record()) + "\n" + json.dumps(record())[:30])
    assert len(Records(path)) == 1
    assert Records(path).bad == [(1, "no JSON")]


NASTY = st.text(alphabet='a"\\{}[],: \n\té🙂<', max_size=12)


@given(st.lists(st.tuples(NASTY, NASTY), min_size=1, max_size=6), st.integers(1, 40))
def test_where_chunks_end_makes_no_difference(tmp_path_factory, talk, chunk):
    content = [record("<image>" + question, answer + "!") for question, answer in talk]
    path = tmp_path_factory.mktemp("records") / "data.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    whole, records.CHUNK = records.CHUNK, chunk
    try:
        found = Records(path)
    finally:
        records.CHUNK = whole
    assert [one.turns[0] for one in found] == [Turn("<image>" + question, answer + "!") for question, answer in talk]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}, {"id": 2', "ends in the middle of a record"),
        ('[{"id": "1}]', "ends in the middle of a record"),
        ("[]", "no record to train on; 0 are bad"),
        ("", "no record to train on; 0 are bad"),
        ('[{"id": 1}]', r"1 are bad, the first \(record 0\): no conversations"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Records(tmp_path / "data.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        Records(tmp_path / "data.json")


def test_pictures_are_loaded_or_bad(tmp_path):
    Image.new("L", (4, 3), 7).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    loaded = read_record(record()).load_pictures(tmp_path)
    assert [(one.mode, one.size) for one in loaded] == [("RGB", (4, 3))]
    with pytest.raises(BadRecord, match="cannot be read"):
        read_record(record(image="b.png")).load_pictures(tmp_path)
    with pytest.raises(BadRecord, match="missing"):
        read_record(record(image="c.png")).load_pictures(tmp_path)
