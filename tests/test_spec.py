"""Compressors as people write them in one line."""

import pytest

from vlmzip import Chain, FastV, LLaVolta, Pool2d, RandomTokens, Site, UserError, VisionZip, spec
from vlmzip.compressor_file import write_compressor


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("visionzip", VisionZip()),
        ("visionzip()", VisionZip()),
        (" visionzip( keep = 64 , merge=mean ) ", VisionZip(keep=64, merge="mean")),
        ("visionzip(dominant=54,contextual=10)", VisionZip(dominant=54, contextual=10)),
        ("llavolta(stride=2,4,layer=1,3)", LLaVolta(stride=(2, 4), layer=(1, 3))),
        (" pool2d ( factor=2 ) + fastv\t(layer=8)\n", Chain(compressors=(Pool2d(factor=2), FastV(layer=8)))),
        ("pool2d(factor=2)+fastv(layer=8)", Chain(compressors=(Pool2d(factor=2), FastV(layer=8)))),
        ("vlmzip.methods.fastv:FastV(keep=25%)", FastV(keep="25%")),
        ("random_tokens(site=in_llm,layer=3)", RandomTokens(site=Site.IN_LLM, layer=3)),
    ],
)
def test_reading(text, expected):
    assert spec.read(text) == expected


@pytest.mark.parametrize("text", ["{}(", "a{}(", "{}", "visionzip{}(keep=4){}x", "visionzip(keep=4,{}", "+{}"])
def test_a_long_text_is_refused_at_once(text):
    """A server reads the specs of requests. With an expression that backtracks, this test does not end."""
    with pytest.raises(UserError) as refused:
        spec.read_named(text.format(*[" " * 20_000] * 2), ["visionzip"])
    assert len(str(refused.value)) < 500


def test_a_saved_compressor_by_folder_or_file(tmp_path):
    write_compressor(VisionZip(keep=7), tmp_path)
    assert spec.read(str(tmp_path)) == spec.read(str(tmp_path / "compressor.json")) == VisionZip(keep=7)


def test_several():
    found = spec.read_several("visionzip(keep=64,merge=mean), fastv ,,llavolta(stride=2,4,layer=1,3)+pool2d,fastv")
    assert [text for text, _ in found] == [
        "visionzip(keep=64,merge=mean)", "fastv", "llavolta(stride=2,4,layer=1,3)+pool2d"
    ]  # fmt: skip
    assert found[1][1] == FastV()


@pytest.mark.parametrize(
    "compressor",
    [
        VisionZip(),
        VisionZip(keep=0.25, merge="mean", positions="original"),
        FastV(keep="30%", layer=3),
        LLaVolta(layer=-1),
        LLaVolta(stride=(2, 4), layer=(1, 3)),
        Chain(compressors=(Pool2d(factor=2), FastV(layer=8))),
        Chain(compressors=(Pool2d(positions="original"), FastV())),
    ],
)
def test_writing_is_read_again(compressor):
    assert spec.read(spec.write(compressor)) == compressor


def test_a_label_has_what_stages_differ_in_even_at_its_default():
    chain = Chain(compressors=(Pool2d(factor=2), LLaVolta(stride=4)))
    assert spec.write(LLaVolta(), label=True) == "llavolta(layer=2,stride=8)"
    assert spec.write(chain, label=True) == "pool2d(factor=2)+llavolta(layer=2,stride=4)"
    assert spec.write(chain) == "pool2d(factor=2)+llavolta(stride=4)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("visionzap", "unknown method 'visionzap'; did you mean 'visionzip'"),
        ("visionzip(kep=64)", "has no field 'kep'"),
        ("visionzip(64)", "a setting in .* must be field=value, got '64'"),
        ("visionzip(keep=1,keep=2)", "sets keep twice"),
        ("visionzip(keep=64", "cannot be read as a method"),
        ("visionzip+", "cannot be read as a method"),
        ("fastv(layer=2)+fastv(layer=2)", "two compressors at layer 2"),
        ("no/such/folder", "there is no folder or compressor.json at"),
        ("pyproject.toml.json", "there is no folder or compressor.json at"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        spec.read(text)


def test_a_folder_does_not_hide_a_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "visionzip").mkdir()
    assert spec.read("visionzip") == VisionZip()
    with pytest.raises(UserError, match="cannot be read as a method"):
        spec.read("")


@pytest.mark.parametrize(
    "text", ["fastv(layer=2.5)", "random_tokens(layer=x)", "llavolta(site=post_projector,layer=5)"]
)
def test_layers_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="layer"):
        spec.read(text)
