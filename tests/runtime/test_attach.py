"""`attach`: what it takes for a compressor, and how long the result lasts."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vlmzip
from tests.families import FAMILIES
from tests.tiny import SIDE, batch, prompt
from vlmzip import DFMR, Chain, FastV, QFormer, UserError, VisionZip
from vlmzip.compressor_file import write_compressor

QFORMER = QFormer(queries=4, depth=1, width=8, heads=2)


@pytest.fixture
def inputs():
    return batch(prompt(7, "image", 5, 6), images=1)


def hooks_on(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_a_block_ends_with_the_plain_model(llava, inputs):
    with vlmzip.attach(llava, FastV(layer=2, keep=9)) as compressed:
        compressed(**inputs)
        assert compressed.report.images[0].by_layer == (36, 36, 9, 9)
        assert hooks_on(llava) > 0
    assert hooks_on(llava) == 0
    with pytest.raises(UserError, match="this model was detached"):
        compressed(**inputs)
    with pytest.raises(UserError, match="this model was detached"), compressed:
        pass


def test_a_block_that_fails_ends_with_the_plain_model(llava):
    with pytest.raises(RuntimeError, match="in the middle"), vlmzip.attach(llava, FastV(layer=2, keep=9)):
        raise RuntimeError("in the middle")
    assert hooks_on(llava) == 0


def test_a_loaded_model_is_detached_likewise(llava, tmp_path):
    vlmzip.attach(llava, VisionZip(keep=8)).save_pretrained(tmp_path)
    with vlmzip.from_pretrained(tmp_path) as compressed:
        assert compressed.compressor == VisionZip(keep=8)
    with pytest.raises(UserError, match="this model was detached"):
        compressed(input_ids=torch.tensor([[5]]))
    assert vlmzip.from_pretrained(tmp_path, "visionzip(keep=3)").compressor == VisionZip(keep=3)


@pytest.mark.parametrize(
    ("text", "compressor"),
    [
        ("visionzip", VisionZip()),
        ("visionzip(keep=8)", VisionZip(keep=8)),
        ("dfmr(tau=0.3)+fastv(layer=3)", Chain(compressors=(DFMR(tau=0.3), FastV(layer=3)))),
        ("tests.runtime.ragged:Ragged", None),
    ],
)
def test_a_compressor_may_be_written_as_on_the_command_line(llava, inputs, text, compressor):
    with vlmzip.attach(llava, text) as compressed:
        assert compressed.compressor == (compressor or vlmzip.spec.read(text))
        compressed(**inputs)
    assert compressed.report.images[0].by_layer[-1] < 36


@pytest.mark.parametrize("text", ["visionsip", "visionzip(kep=3)", "fastv(layer=40)", "there/is/none"])
def test_a_text_that_names_no_compressor_is_refused(llava, text):
    with pytest.raises(UserError):
        vlmzip.attach(llava, text)


@pytest.mark.parametrize("file", ["", "compressor.json"])
def test_a_saved_compressor_brings_its_weights(llava, inputs, tmp_path, file):
    with pytest.warns(UserWarning, match="qformer is untrained"):
        trained = vlmzip.attach(copy.deepcopy(llava), QFORMER)
    trained.save_pretrained(tmp_path)
    again = vlmzip.attach(llava, str(tmp_path / file))
    assert again.compressor == QFORMER
    torch.testing.assert_close(again(**inputs).logits, trained(**inputs).logits)


@pytest.mark.parametrize("file", ["", "compressor.json"])
def test_a_path_is_an_object_or_a_text(llava, tmp_path, file):
    write_compressor(VisionZip(keep=8), tmp_path)
    for path in (tmp_path / file, str(tmp_path / file)):
        with vlmzip.attach(llava, path) as compressed:
            assert compressed.compressor == VisionZip(keep=8)
    with pytest.raises(UserError, match=r"there is no folder or compressor.json at 'visionzip'"):
        vlmzip.attach(llava, Path("visionzip"))


def test_every_entry_takes_a_spec(llava, inputs, tmp_path):
    write_compressor(VisionZip(keep=8), tmp_path)
    expected = vlmzip.compress_inputs(llava, inputs, VisionZip(keep=8))["input_ids"]
    for compressor in ("visionzip(keep=8)", tmp_path):
        assert torch.equal(vlmzip.compress_inputs(llava, inputs, compressor)["input_ids"], expected)
    vlmzip.attach(llava, DFMR()).save_pretrained(tmp_path)
    assert vlmzip.from_pretrained(tmp_path, tmp_path).compressor == DFMR()
    image = Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8))
    processor = SimpleNamespace(image_processor=FAMILIES["llava"].processor().image_processor)
    assert vlmzip.calibrate(llava, [image], "dfmr(max_factor=2)", "25%", processor=processor).factors == [2]
    for entry in (vlmzip.attach, lambda model, wrong: vlmzip.calibrate(model, [], wrong, "25%")):
        with pytest.raises(UserError, match="compressor must be a compressor, a spec or a path, got 8"):
            entry(llava, 8)


def test_weights_come_from_the_folder_that_is_given(llava, tmp_path):
    with pytest.warns(UserWarning, match="qformer is untrained"):
        trained = vlmzip.attach(copy.deepcopy(llava), QFORMER)
    trained.save_pretrained(tmp_path / "trained")
    again = vlmzip.attach(llava, QFORMER, weights=tmp_path / "trained")
    for name, value in trained.resampler.state_dict().items():
        torch.testing.assert_close(again.resampler.state_dict()[name], value)


def test_a_saved_compressor_without_its_weights_is_refused(llava, tmp_path):
    write_compressor(QFORMER, tmp_path)
    with pytest.raises(UserError, match=r"there is no resampler.safetensors in .*; without it"):
        vlmzip.attach(llava, str(tmp_path))
    vlmzip.attach(llava, VisionZip(keep=8), weights=tmp_path).detach()  # which has none
