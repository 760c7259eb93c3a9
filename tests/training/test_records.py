"""Records in LLaVA's format, in JSON and JSON Lines, and everything that can be wrong in them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmzip.errors import UserError
from vlmzip.training import records
from vlmzip.training.records import BadRecord, Records, TrainingRecord, Turn, read_record


def said(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def record(*texts, **fields):
    return {"id": "7", "conversations": said(*(texts or ("<image>\nwhat ?", "this"))), "image": "a.png", **fields}


def film(*texts, **fields):
    return {"conversations": said(*texts), "video": ["1.png", "2.png"], **fields}


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
        TrainingRecord("7", (Turn("<image>\nwhat ?", "this"), Turn("and ?", "that")), ("a.png",)),
        TrainingRecord("7", (Turn("what <image> and <image> ?", "two"),), ("a.png", "b/c.png")),
        TrainingRecord("", (Turn("hello", "hi"),), ()),
    ]
    assert found.bad == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (record(image=["a.png", "b.png"]), "not as many <image> as images"),
        (record("<image> <image> ?", "two"), "not as many <image> as images"),
        ({"conversations": said("<image> ?", "none")}, "not as many <image> as images"),
        (record("<image> ?"), "does not end with an answer"),
        (record("<image> ?", ""), "an empty answer"),
        (record("?", "<image>"), "an answer with <image>"),
        (record(conversations=said("<image>?", "a")[::-1]), "do not take turns"),
        (record(conversations=[]), "no conversations"),
        (record(conversations=[1, 2]), "without text"),
        (record(image=5), "image is not a path"),
        (record(image=[""]), "image is not a path"),
        ([1], "not an object"),
        (record("?", "a", images=["a.png"]), "both image and images"),
        ({"conversations": said("?", "a"), "images": ["a.png"]}, "not as many <image> as images"),
        (record("?", "\ud83d"), "half a character"),
        (record("\ude00 <image>", "a"), "half a character"),
        (film("<video>\n?", "a", video=["a.MP4"]), "a video file in a list; give it as the video"),
        (film("<video>\n?", "a", video=None), "not as many <video> as videos"),
        (film("<video>\n?", "a", video=[]), "not as many <video> as videos"),
        (film("?", "a"), "not as many <video> as videos"),
        (film("<video> <video>", "a"), "not as many <video> as videos"),
        (film("<image>\n?", "a"), "not as many <image> as images"),
        (film("<video>?", "<video>"), "an answer with <video>"),
        (film("<video>?", "a", video={"1": "a.png"}), "video is not a path or a list of image paths"),
        (film("<video>?", "a", videos=[["1.png"]]), "only one video"),
    ],
)
def test_a_bad_record_has_a_reason(content, reason):
    with pytest.raises(BadRecord, match=reason):
        read_record(content)


def test_a_record_has_one_video_beside_its_images(tmp_path):
    content = [
        film("<video>\nwhat ?", "this", "and ?", "that"),
        film("<image> a", "b", "<image><video> <image>", "d", image=["a.png", "b.png", "c.png"], video="clip"),
        {"conversations": said("<image> ?", "a"), "images": ["a.png"], "video": None},
        film("<video> ?", "a", video="clip.mp4"),
    ]
    found = Records(write(tmp_path / "data.json", content, lines=True))
    turns = (Turn("<image> a", "b"), Turn("<image><video> <image>", "d"))
    assert list(found) == [
        TrainingRecord("", (Turn("<video>\nwhat ?", "this"), Turn("and ?", "that")), (), ("1.png", "2.png")),
        TrainingRecord("", turns, ("a.png", "b.png", "c.png"), "clip"),
        TrainingRecord("", (Turn("<image> ?", "a"),), ("a.png",)),
        TrainingRecord("", (Turn("<video> ?", "a"),), (), "clip.mp4"),
    ]
    assert [found.images(n) for n in range(4)] == [2, 3 + 8, 1, 8]
    assert found.have_videos
    assert found.have_video_files
    assert not Records(write(tmp_path / "frames.json", content[:3], lines=True)).have_video_files


def test_frames_take_the_place_of_a_video_in_models_without_videos():
    content = film("<image> a", "b", "<image><video> <image>", "d", image=["a.png", "b.png", "c.png"])
    both = read_record(content)
    assert both.images_before_video == 2
    assert both.with_frames_as_images(2).turns == (Turn("<image> a", "b"), Turn("<image><image><image> <image>", "d"))


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        ("none", "a folder of frames is missing"),
        ("empty", "a folder of frames is empty"),
        ("none.mp4", "a video is missing"),
        ("broken.mp4", "a video cannot be read"),
        (["none.png"], "an image is missing"),
    ],
)
def test_a_video_that_cannot_be_read_has_a_reason(tmp_path, video, reason):
    if str(video).endswith(".mp4"):
        pytest.importorskip("av")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(BadRecord, match=reason):
        read_record(film("<video> ?", "a", video=video)).load_video(tmp_path, lambda total, fps: range(total))


@pytest.mark.parametrize("lines", [True, False])
def test_bad_records_are_counted_and_the_others_are_read(tmp_path, lines):
    texts = [json.dumps(record(id=n)) for n in range(4)]
    texts[1] = texts[1].replace('"id": 1', '"id": ')
    texts[2] = json.dumps(record(image=["a.png", "b.png"]))
    path = tmp_path / "data.json"
    path.write_text("\n".join(texts) if lines else f"[{', '.join(texts)}]")
    found = Records(path)
    assert [one.id for one in found] == ["0", "3"]
    assert found.bad == [(1, "invalid JSON"), (2, "not as many <image> as images")]
    assert list(found.numbers) == [0, 3]
    assert found.images(1) == 1
    assert found.size(1) == len(texts[3])


def test_a_line_cut_short_is_one_bad_record(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record()) + "\n" + json.dumps(record())[:30])
    assert len(Records(path)) == 1
    assert Records(path).bad == [(1, "invalid JSON")]


@pytest.mark.parametrize("lines", [True, False])
def test_deeply_nested_brackets_are_one_bad_record(tmp_path, lines):
    deep = '{"conversations": ' + "[" * 100_000 + "]" * 100_000 + "}"
    texts = [deep, json.dumps(record())]
    path = tmp_path / "data.json"
    path.write_text("\n".join(texts) if lines else f"[{', '.join(texts)}]")
    found = Records(path)
    assert found.bad == [(0, "brackets nested too deeply" if lines else "invalid JSON")]
    assert list(found.numbers) == [1]


def test_a_value_that_is_not_an_object_is_a_bad_record(tmp_path):
    content = [record(id=0), None, 5, "text", True, record(id=5), [record()], 1.5]
    found = Records(write(tmp_path / "data.json", content, lines=False))
    assert [one.id for one in found] == ["0", "5"]
    assert found.bad == [(n, "not an object") for n in (1, 2, 3, 4, 6, 7)]
    assert list(found.numbers) == [0, 5]


TALK = said("<image> {x} [y", "a } ]", "?", "b")
WHOLE = [json.dumps({"id": n, "image": "a.png", "conversations": TALK}) for n in range(4)]
BREAKS = {
    "no }": lambda text: text[:-1],
    "no ]": lambda text: text[:-2] + "}",
    "one } more": lambda text: text + "}",
    "one ] more": lambda text: text + "]",
    "one } more inside": lambda text: text.replace('"?"}', '"?"}}'),
    "quotes in quotes": lambda text: text.replace("{x}", '"{x}"'),
    "a quote in quotes": lambda text: text.replace("{x}", '5" {x}'),
    "no quote": lambda text: text.replace('"id"', '"id'),
    "no {": lambda text: text[1:],
    "no value": lambda text: text.replace('"image": "a.png"', '"image": '),
    "thousands of digits": lambda text: text.replace('"id": ', '"id": ' + "1" * 5000),
    "half a word": lambda text: "nul",
}


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("number", [0, 1, 3])
def test_invalid_json_in_a_list_loses_no_other_record(tmp_path, monkeypatch, number, broken, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    texts = list(WHOLE)
    texts[number] = BREAKS[broken](texts[number])
    (tmp_path / "data.json").write_text(f"[\n{', '.join(texts)}\n]\n")
    found = Records(tmp_path / "data.json")
    assert found.bad == [(number, "invalid JSON")]
    assert list(found.numbers) == [n for n in range(4) if n != number]
    assert [int(one.id) for one in found] == list(found.numbers)


def test_adjacent_broken_records_are_counted_separately(tmp_path):
    texts = [WHOLE[0][:-1], WHOLE[1] + "}", WHOLE[2].replace("{x}", '"x'), WHOLE[3]]
    (tmp_path / "data.json").write_text(f"[{', '.join(texts)}]")
    found = Records(tmp_path / "data.json")
    assert [number for number, _ in found.bad] == [0, 1, 2]
    assert list(found.numbers) == [3]


def test_an_unclosed_record_is_not_held_in_memory(tmp_path, monkeypatch):
    """A record with an open bracket and brace could reach to the end of a file of any size."""
    monkeypatch.setattr(records, "CHUNK", 1000)
    monkeypatch.setattr(records, "LONGEST", 4000)
    texts = [WHOLE[0], WHOLE[1][:-2], *WHOLE[2:] * 100]
    (tmp_path / "data.json").write_text(f"[{', '.join(texts)}]")
    longest = 0
    decode = records._decoded

    def measured(text, at):
        nonlocal longest
        longest = max(longest, len(text))
        return decode(text, at)

    monkeypatch.setattr(records, "_decoded", measured)
    found = Records(tmp_path / "data.json")
    assert found.bad == [(1, "invalid JSON")]
    assert len(found) == 201
    assert longest < 10_000


@pytest.mark.parametrize("broken", [0, None])
def test_a_list_cut_anywhere_is_refused(tmp_path, broken):
    texts = [json.dumps({"id": n, "conversations": said("?", "a")}) for n in range(3)]
    if broken is not None:
        texts[broken] = texts[broken][:-1]
    text = f"[{', '.join(texts)}]"
    for end in range(len(text) - 1 if broken is None else text.index("2") - 9, 1, -1):
        (tmp_path / "data.json").write_text(text[:end] + "\n" * (end % 2))
        with pytest.raises(UserError, match="ends in the middle of a record"):
            Records(tmp_path / "data.json")


def test_a_trailing_comma_is_not_a_record(tmp_path):
    (tmp_path / "data.json").write_text(f"[{WHOLE[0]}, ]")
    assert Records(tmp_path / "data.json").bad == []


NASTY = st.text(alphabet='a"\\{}[],: \n\té🙂<', max_size=12)


@given(st.lists(st.tuples(NASTY, NASTY), min_size=1, max_size=6), st.integers(1, 40))
def test_records_do_not_depend_on_where_chunks_end(tmp_path_factory, talk, chunk):
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
        ("[]", "no record to train on: it is empty"),
        ("", "no record to train on: it is empty"),
        ('["a","b"]', r"2 are bad, the first \(record 0\): not an object"),
        ('[{"id": 1}, {"id": 2', r"begins at byte 12: was it cut short\?"),
        ('[{"id": 1}]', r"1 are bad, the first \(record 0\): no conversations"),
    ],
)
def test_files_without_records_are_refused(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Records(tmp_path / "data.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        Records(tmp_path / "data.json")


def test_images_are_loaded_or_bad(tmp_path):
    Image.new("L", (4, 3), 7).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    loaded = read_record(record()).load_images(tmp_path)
    assert [(one.mode, one.size) for one in loaded] == [("RGB", (4, 3))]
    with pytest.raises(BadRecord, match="cannot be read"):
        read_record(record(image="b.png")).load_images(tmp_path)
    with pytest.raises(BadRecord, match="missing"):
        read_record(record(image="c.png")).load_images(tmp_path)


def test_a_system_turn_is_named():
    said = [{"from": "system", "value": "be kind"}, {"from": "human", "value": "w9"}, {"from": "gpt", "value": "w10"}]
    with pytest.raises(BadRecord, match="a system turn"):
        read_record({"conversations": said})
