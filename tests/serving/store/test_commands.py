"""`vlmzip encode` and `vlmzip ask --store` on mini: output, exit codes, one line for each mistake."""

import json
import re
import shutil
import sys

import pytest
from filelock import FileLock

from vlmzip.cli import encode
from vlmzip.cli.main import main
from vlmzip.errors import how_to_install
from vlmzip.locks import LOCK

QUESTION = "what color is the ring ?"


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    assert main(["encode", "examples", "--out", str(folder), "--keep", "36", "--batch", "1"]) == 0
    return folder


@pytest.fixture
def no_load(monkeypatch):
    """Let the test fail if the command loads a model."""
    monkeypatch.setattr(encode, "load", lambda *arguments, **settings: pytest.fail("the model was loaded"))


@pytest.fixture
def broken(tmp_path):
    """A folder with an image and a file that is none."""
    folder = tmp_path / "broken"
    folder.mkdir()
    shutil.copy("examples/flat.png", folder)
    (folder / "b.jpg").write_text("no image")
    return folder


def test_ask_answers_as_about_the_file_and_says_that_the_encoder_did_not_run(capsys, store):
    code, out, err = run(capsys, "ask", "--store", store, "flat.png", QUESTION)
    assert (code, err) == (0, "")
    assert out.startswith("orange\n")
    assert re.search(r"visual tokens +144 → 36 +4.0x", out)
    assert re.search(r"vision encoder ms +0\.0", out)
    assert out.endswith(f"from {store}: the vision encoder did not run\n")
    results = []
    for words in (
        ["--store", store, "flat.png", "first.png"],
        ["examples/flat.png", "examples/first.png", "--keep", 36],
    ):
        code, out, _ = run(capsys, "ask", *words, QUESTION, "--json")
        assert code == 0
        results.append(json.loads(out))
    ours, theirs = results
    for name in ("answer", "compressor", "plain"):
        assert ours[name] == theirs[name]
    assert [image["path"] for image in ours["images"]] == ["flat.png", "first.png"]
    assert ours["compressed"]["prefill_flops"] == theirs["compressed"]["prefill_flops"]


def test_a_method_inside_the_llm_can_follow(capsys, store):
    words = ["--store", store, "flat.png", QUESTION, "--json"]
    code, out, _ = run(capsys, "ask", *words, "--method", "fastv", "--keep", "9", "--layer", "3")
    assert code == 0
    assert json.loads(out)["images"][0]["by_layer"] == [36] * 3 + [9] * 5
    method = "visionzip(keep=36)+fastv(keep=9,layer=3)"
    _, expected, _ = run(capsys, "ask", "examples/flat.png", QUESTION, "--json", "--method", method)
    assert json.loads(out)["answer"] == json.loads(expected)["answer"]
    assert json.loads(out)["compressor"] == json.loads(expected)["compressor"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flat.pgn", QUESTION], "has no image 'flat.pgn'; did you mean 'flat.png'?"),
        (["../examples/flat.png", QUESTION], "has no image '../examples/flat.png'"),
        (["flat.png"], "give images of the store and a question"),
        (["flat.png", " "], "give images of the store and a question"),
        (["flat.png", "<image> ?"], "the question must not contain <image>"),
        (["flat.png", QUESTION, "--keep", "8"], "were compressed by visionzip(keep=36); leave out --keep, or add a"),
        (["flat.png", QUESTION, "--dominant", "8"], "were compressed by visionzip(keep=36); leave out --dominant,"),
        (
            ["flat.png", QUESTION, "--method", "kmeans"],
            "kmeans acts before the LLM, too; give a method",
        ),
        (["flat.png", QUESTION, "--baseline"], "--baseline needs the image itself"),
        (["flat.png", QUESTION, "--overlay", "a.png"], "--overlay needs the image itself"),
        (["flat.png", QUESTION, "--frames", "4"], "--frames needs the image itself"),
        (
            ["flat.png", QUESTION, "--dtype", "bfloat16"],
            "was made with --dtype float32, not bfloat16; give",
        ),
    ],
)
def test_mistakes_in_ask(capsys, store, words, message):
    code, out, err = run(capsys, "ask", "--store", store, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_encode_says_what_it_wrote(capsys, store, broken, tmp_path):
    code, out, _ = run(capsys, "encode", "examples", "--out", tmp_path / "store", "--keep", "16", "--json")
    assert code == 0
    written = json.loads(out)
    assert (written["stored"], written["encoded"], written["failed"]) == (3, 3, {})
    assert written["token_bytes"] == 3 * 16 * 192 * 4
    assert written["images_per_second"] > 0
    code, out, _ = run(capsys, "encode", "examples", "--out", store, "--keep", "36", "--batch", "1")
    assert (code, out.splitlines()[0]) == (0, "0 images encoded with visionzip(keep=36)")
    code, _, err = run(capsys, "encode", "examples", "--out", tmp_path / "all", "--keep", "144")
    assert (code, err) == (0, "note: visionzip keeps all of an image's 144 visual tokens: it changes nothing\n")
    code, out, err = run(capsys, "encode", broken, "--out", tmp_path / "other")
    assert code == 2
    assert out.startswith("1 image encoded with visionzip, ")
    note, line = err.splitlines()
    assert note == "note: 'b.jpg' is not in the store: it is not a PNG, JPEG, WEBP, GIF or BMP image"
    assert line == "vlmzip: 1 of 2 images could not be stored: b.jpg"


def test_changed_images_are_named_and_an_update_encodes_them(capsys, tmp_path):
    images = shutil.copytree("examples", tmp_path / "images", ignore=shutil.ignore_patterns("*.py", "*.ipynb"))
    words = ["encode", images, "--out", tmp_path / "store", "--keep", "36"]
    assert run(capsys, *words)[0] == 0
    shutil.copy(images / "first.png", images / "flat.png")
    (images / "cluttered.png").unlink()
    code, out, err = run(capsys, *words)
    assert (code, out.splitlines()[0]) == (0, "0 images encoded with visionzip(keep=36)")
    assert err == (
        "note: 1 image changed since stored: flat.png; 1 image gone since stored: cluttered.png. The store keeps the"
        " old tokens; --update brings it to the state of the folder\n"
    )
    code, out, err = run(capsys, *words, "--update")
    assert (code, err) == (0, "")
    assert out.startswith("1 image encoded with visionzip(keep=36), ")
    assert re.search(r"store has 2 images \(1 removed\): 54\.0 KiB of tokens for \d+\.\d KiB of image files\n", out)
    assert re.search(r"\n\d+\.\d KiB of its shards are old tokens, which are not used any more\n$", out)


def test_verify(capsys, store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "copy")
    assert run(capsys, "encode", "--verify", copy) == (0, f"{copy}: 3 images, none damaged\n", "")
    shard = copy / "shards" / "000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, out, err = run(capsys, "encode", "--verify", copy)
    assert (code, out) == (2, "")
    note, line = err.splitlines()
    name = re.fullmatch(
        r"note: '(.+)' is damaged: its checksum is wrong; encode it again with vlmzip encode … --update", note
    )[1]
    assert line == f"vlmzip: 1 of 3 images is damaged: {name}"
    code, out, _ = run(capsys, "encode", "--verify", copy, "--json")
    assert (code, [each["path"] for each in json.loads(out)["damaged"]]) == (2, [name])
    code, _, err = run(capsys, "ask", "--store", copy, name, QUESTION)
    assert (code, err.count("\n")) == (2, 1)
    assert "is damaged" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["examples"], "give a folder of images and a store: vlmzip encode FOLDER --out STORE"),
        (["--out", "store"], "give a folder of images and a store"),
        (["nothing", "--out", "store"], "there is no folder 'nothing'"),
        (["src", "--out", "{tmp}/store"], "there are no images in 'src'; give PNG, JPEG, WEBP, GIF or BMP files"),
        (["examples", "--out", "README.md"], "is a file; give a folder"),
        (["examples", "--out", "store", "--batch", "0"], "--batch 0: give at least 1"),
        (["examples", "--out", "store", "--workers", "0"], "--workers 0: give at least 1"),
        (["examples", "--out", "store", "--method", "cdpruner"], "cdpruner reads the question to choose tokens"),
        (["examples", "--out", "store", "--method", "fastv"], "fastv acts inside the LLM"),
        (["examples/flat.png", "--out", "store"], "'examples/flat.png' is a file; give a folder of images"),
        (["examples", "--out", "examples"], "--out 'examples' has the images in it"),
        (["examples", "--out", "."], "--out '.' has the images in it"),
        (["examples", "--verify", "store"], "--verify takes a store alone"),
        (["--verify", "examples"], "there is no store.json in 'examples'"),
        (["examples", "--out", "src"], "--out 'src' is no store, and it has 'vlmzip' in it; give a new folder"),
        (["examples", "--out", "README.md/store"], "'README.md/store' cannot be written: Not a directory"),
        (["{tmp}/unreadable", "--out", "{tmp}/store"], "no image in '{tmp}/unreadable' can be read (1 image found)"),
        (["examples", "--out", "{tmp}/store", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["examples", "--out", "{tmp}/store", "--model", "minni"], "there is no folder 'minni'"),
    ],
)
def test_mistakes_in_encode(capsys, tmp_path, no_load, words, message):
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "a.png").write_bytes(b"no image")
    code, out, err = run(capsys, "encode", *(word.format(tmp=tmp_path) for word in words))
    assert (code, out) == (2, "")
    assert message.format(tmp=tmp_path) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "16", "--batch", "1"], "was made with visionzip(keep=36), not with visionzip(keep=16); give"),
        (
            ["--method", "kmeans", "--batch", "1"],
            "visionzip(keep=36), not with kmeans; give --method 'visionzip(keep=36)' and no --keep,",
        ),
        (["--keep", "36"], "was made with --batch 1; give it, or another --out"),
        (["--keep", "36", "--batch", "1", "--shard", "9"], "was made with --shard 64; give it, or another --out"),
        (["--keep", "36", "--batch", "1", "--dtype", "bfloat16"], "was made with --dtype float32, not bfloat16; give"),
    ],
)
def test_other_settings_are_refused_before_the_model_is_loaded(capsys, store, no_load, options, message):
    code, out, err = run(capsys, "encode", "examples", "--out", store, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_store_that_another_run_writes_is_refused_before_the_model_is_loaded(capsys, store, no_load):
    with FileLock(store / LOCK):
        code, _, err = run(capsys, "encode", "examples", "--out", store, "--keep", "36", "--batch", "1")
    assert (code, err) == (2, f"vlmzip: another run is writing {str(store)!r}; wait for it, or give another --out\n")


def test_workers_without_ray_are_refused_before_the_model_is_loaded(capsys, tmp_path, no_load, monkeypatch):
    monkeypatch.delitem(sys.modules, "vlmzip.serving.store.ray_workers", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run(capsys, "encode", "examples", "--out", tmp_path / "store", "--workers", "2")
    assert (code, err) == (2, f"vlmzip: several workers need Ray Data: {how_to_install('ray')}\n")
    assert not (tmp_path / "store").exists()
