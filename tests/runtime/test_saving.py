import json

import pytest

import vlmzip
from tests.runtime.ragged import Ragged
from vlmzip import Pool2d, RandomTokens, UserError, VisionZip, available
from vlmzip.compressor_file import FORMAT, read_compressor, write_compressor
from vlmzip.runtime.saving import saved_weights


@pytest.mark.parametrize(
    "method", [cls() for cls in available().values()] + [VisionZip(dominant=5, contextual=0, merge="mean")]
)
def test_round_trip(tmp_path, method):
    write_compressor(method, tmp_path)
    assert read_compressor(tmp_path) == method


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no compressor.json"),
        ("{", "cannot be read"),
        ({"format": 1, "fields": {}}, "cannot be read: it lacks method"),
        ({"formt": 1, "method": "visionzip", "fields": {}}, "an unknown key 'formt'; did you mean 'format'"),
        (
            {"format": 1, "method": "visionzip", "fields": {}, "keep": 3},
            "an unknown key 'keep'; choose one of fields, format",
        ),
        ({"format": 1, "method": ["visionzip"], "fields": {}}, "method must be a text"),
        ({"format": 1, "method": "visionzip", "fields": [["keep", 3]]}, "`fields` must be a JSON object"),
        ([1], "it must be a JSON object with format, vlmzip, method, fields"),
        ('{"format": 1, "method": "visionzip", "method": "pool2d", "fields": {}}', "'method' occurs twice"),
        ('{"format": 1, "method": "visionzip", "fields": {"keep": NaN}}', "no number NaN"),
        (r'{"format": 1, "method": "visionzip", "fields": {"keep": "\ud800"}}', "half a character"),
        ('{"format": 1, "method": "visionzip", "fields": {"keep": 1' + "0" * 5000 + "}}", "has 5,001 digits"),
        (
            {"format": 1, "method": "llavolta", "fields": {"layer": True}},
            "layer must be a whole .*, got True",
        ),
        (
            {"format": 1, "method": "sparsevlm", "fields": {"recycle": []}},
            r"must be a number from 0 to 1, got \[\]",
        ),
        ({"format": 1, "method": "chain", "fields": {"compressors": 3}}, "compressors must be a list of objects"),
        ({"format": 1, "method": "chain", "fields": {"compressors": [{"keep": 3}]}}, "compressors must be a list"),
        (
            {"format": FORMAT + 1, "vlmzip": "9.0", "method": "visionzip", "fields": {}},
            "written by vlmzip 9.0, newer than",
        ),
        ({"format": 1, "method": "visionsip", "fields": {}}, "did you mean 'visionzip'"),
        ({"format": 1, "method": "visionzip", "fields": {"kep": 3}}, "did you mean 'keep'"),
        ({"format": 1, "method": "visionzip", "fields": {"keep": -3}}, "keeps nothing"),
        ({"format": 1.5, "method": "visionzip", "fields": {}}, "format must be a whole number"),
        ('{"format": 1e999, "method": "visionzip", "fields": {}}', "the number 1e999 is too large"),
        ("[" * 100_000, "cannot be read: brackets nested too deeply"),
        (
            {"format": 1, "method": "visionzip", "fields": {"method": "pool2d"}},
            '`fields` must be a JSON object and must not contain a key "method"',
        ),
        ({"format": 1, "method": "fastv", "fields": {"layer": 1.5}}, "layer must be a whole number, got 1.5"),
        ({"format": 1, "method": "os:system", "fields": {}}, "names code that is not an installed method"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "compressor.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        vlmzip.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_method_from_elsewhere_is_named_but_not_imported(tmp_path):
    write_compressor(Ragged(), tmp_path)
    with pytest.raises(UserError, match=r"tests.runtime.ragged:Ragged.*to use it, give --method tests"):
        read_compressor(tmp_path)


def test_a_method_from_elsewhere_can_be_used_beside_what_was_saved(tmp_path, llava):
    """The commands attach so: with the method that was given, or another one."""
    write_compressor(Ragged(), tmp_path)
    for given in (Ragged(), VisionZip(keep=5)):
        compressed = vlmzip.attach(llava, given, weights=saved_weights(given, tmp_path))
        assert compressed.compressor == given
        compressed.detach()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_compressor(VisionZip(keep=8), tmp_path)
    monkeypatch.setattr(json, "dump", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_compressor(Pool2d(), tmp_path)
    monkeypatch.undo()
    assert read_compressor(tmp_path) == VisionZip(keep=8)
    assert [p.name for p in tmp_path.iterdir()] == ["compressor.json"]


def test_a_state_dict_of_the_facade_saves_the_models_names(tmp_path, llava):
    import torch
    from transformers import AutoModelForImageTextToText

    compressed = vlmzip.attach(llava, VisionZip(keep=8))
    compressed.save_pretrained(tmp_path, state_dict=compressed.state_dict())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in llava.state_dict().items())


def test_another_compressor_can_be_given(tmp_path, llava):
    vlmzip.attach(llava, VisionZip(keep=5)).save_pretrained(tmp_path)
    assert vlmzip.from_pretrained(tmp_path).compressor == VisionZip(keep=5)
    assert vlmzip.from_pretrained(tmp_path, RandomTokens(keep=3)).compressor == RandomTokens(keep=3)


def test_a_process_that_is_not_the_main_one_writes_no_compressor(tmp_path, llava):
    vlmzip.attach(llava, VisionZip(keep=5)).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "compressor.json").exists()


def test_pushing_is_refused_since_it_would_lose_the_compressor(tmp_path, llava):
    compressed = vlmzip.attach(llava, VisionZip(keep=5))
    for push in (
        lambda: compressed.push_to_hub("me/it"),
        lambda: compressed.save_pretrained(tmp_path, push_to_hub=True),
    ):
        with pytest.raises(UserError, match="upload the folder"):
            push()
    assert not list(tmp_path.iterdir())


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        vlmzip.from_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no config.json; give a folder"):
        vlmzip.from_pretrained(tmp_path, VisionZip())
    (tmp_path / "adapter_config.json").write_text("{}")
    for compressor in (None, VisionZip()):
        with pytest.raises(UserError, match="has LoRA weights without a model"):
            vlmzip.from_pretrained(tmp_path, compressor)
