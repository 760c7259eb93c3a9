"""JSON and JSON Lines of other tools are read; invalid JSON is refused in one line."""

import bz2
import gzip
import json
import lzma
import pickle
import re

import pytest

from vlmzip.errors import UserError
from vlmzip.json_text import JsonError, parse, read_json, read_lines, write_line
from vlmzip.lab.tasks.folder import folder_task
from vlmzip.training.records import Records

#: Every character at which `str.splitlines` cuts and JSON does not, as text may hold it.
SEPARATORS = "\x85\u2028\u2029"


@pytest.fixture
def ask(tmp_path):
    """The questions that a file of these bytes holds, each with the line it stands in."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def read(content):
        (tmp_path / "q.jsonl").write_bytes(content)
        samples = folder_task(str(tmp_path / "q.jsonl"), "exact", None, None).samples
        return [(sample.id, sample.question) for sample in samples]

    return read


def line(question):
    return json.dumps({"image": "a.png", "question": question, "answers": ["it"]}, ensure_ascii=False).encode()


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_line_ends_at_its_newline_and_nowhere_else(ask, separator):
    assert ask(line(f"one{separator}two") + b"\n" + line("three")) == [("1", f"one{separator}two"), ("2", "three")]


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        (b"\xef\xbb\xbf%s\n%s\n", "12"),  # a byte order mark
        (b"%s\r\n%s\r\n", "12"),
        (b"\n%s\n \t\r\n%s\n\n", "24"),
        (b"%s\n%s", "12"),
        (b"  %s \n\t%s\t\n", "12"),
    ],
)
def test_what_editors_write_is_read(ask, content, numbers):
    assert ask(content % (line("a"), line("b"))) == [(numbers[0], "a"), (numbers[1], "b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{no", "Expecting property name enclosed in double quotes (character 2)"),
        (b'{"a": 1,}', "double quotes (character 9)"),
        (b'{"a":\n tru}', "Expecting value (line 2, character 2)"),
        (b"[" * 100_000, "brackets nested too deeply"),
        (b'{"a":' * 100_000, "brackets nested too deeply"),
        (rb'"\ud800"', "half a character in the text (a lone surrogate)"),
        (rb'{"\uDFFF": 1}', "half a character in the text (a lone surrogate)"),
        (b"\xed\xa0\x80", "byte 1 is not UTF-8; save the file as UTF-8"),
        ("{}".encode("utf-16"), "byte 1 is not UTF-8; save the file as UTF-8"),
        (b"1" * 5000, "a number has 5,000 digits"),
        (b"-1e999", "the number -1e999 is too large"),
        (b"NaN", "JSON has no number NaN"),
        (b"[-Infinity]", "JSON has no number -Infinity"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' occurs twice in an object"),
        (b"", "Expecting value (character 1)"),
        (b"1 2", "Extra data (character 3)"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(ask, tmp_path, text, message):
    with pytest.raises(JsonError, match=re.escape(message)):
        parse(text)
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError, match=r"a\.json' cannot be read: .*; move it$") as refused:
        read_json(tmp_path / "a.json", "move it")
    assert message in str(refused.value)
    if text and b"\n" not in text:
        with pytest.raises(UserError, match=r"q\.jsonl:2: "):
            ask(line("a") + b"\n" + text)


def test_whole_characters_written_as_two_halves_are_text():
    assert parse(r'["\ud83d\ude00", "\\ud800"]') == ["😀", r"\ud800"]


@pytest.mark.parametrize("read", [read_json, lambda path: list(read_lines(path))])
def test_files_that_cannot_be_read(tmp_path, read):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path, tmp_path / "none", loop):
        with pytest.raises(UserError, match=r"cannot be read: [A-Z]"):
            read(path)
    with pytest.raises(UserError, match="cannot be read: it is a device"):
        read(type(tmp_path)("/dev/zero"))


def test_lines_say_where_they_stand(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf1\n\n22\r\n3")
    assert [(one.number, one.begin, one.text, one.is_whole) for one in read_lines(path)] == [
        (1, 3, b"1\n", True),
        (3, 6, b"22\r\n", True),
        (4, 10, b"3", False),
    ]


@pytest.mark.parametrize("separator", SEPARATORS + "\n\r\x0b\x0c\x1c\x1d\x1e")
def test_what_is_written_is_one_line_for_every_reader(separator):
    content = {"é": [f"a{separator}b", 1.5, (float("nan"), -float("inf"))]}
    written = write_line(content)
    assert written.splitlines() == [written[:-1]]
    assert json.loads(written, parse_constant=pytest.fail) == {"é": [f"a{separator}b", 1.5, [None, None]]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PAR1" + bytes(range(256)), "it is a Parquet file, not JSON"),
        (b"ARROW1" + bytes(9), "it is an Arrow file, not JSON"),
        (gzip.compress(b"{}"), "it is a file compressed by gzip, not JSON"),
        (bz2.compress(b"{}"), "it is a file compressed by bzip2, not JSON"),
        (lzma.compress(b"{}"), "it is a file compressed by xz, not JSON"),
        (pickle.dumps({}), "it is a Python pickle, not JSON"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "it is a web page or XML, not JSON"),
        (b"{}\0\0\0", "it is a binary file, not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_called_what_they_are(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    for read in (read_json, lambda path: list(read_lines(path)), Records):
        with pytest.raises(UserError, match=said):
            read(tmp_path / "a.json")
