"""Everything that an answer depends on changes its fingerprint, by name; what it does not depend on changes nothing."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import vlmzip
from tests.tiny import FAMILIES, tiny_llava, tiny_processor
from vlmzip import VisionZip
from vlmzip.evaluation import fingerprint
from vlmzip.evaluation.answering import Asker
from vlmzip.models import adapter_for


def changed(change):
    """The names of what is another when `change` has been at work on a model and its processor."""
    model, processor = tiny_llava(), tiny_processor("llava")
    before = fingerprint.of_model(model, processor)
    change(model, processor)
    now = fingerprint.of_model(model, processor)
    return {name for name in now if now[name] != before[name]}


def last_value(model, _):
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[-1, -1] += 1


CHANGES = {
    "weights": last_value,
    "configuration": lambda model, _: setattr(model.config.text_config, "rms_norm_eps", 0.5),
    "generation settings": lambda model, _: setattr(model.generation_config, "repetition_penalty", 1.3),
    "attention": lambda model, _: model.set_attn_implementation("eager"),
    "tokenizer": lambda _, processor: processor.tokenizer.add_tokens(["more"]),
    "chat template": lambda _, processor: setattr(processor, "chat_template", "{{ messages }}"),
    "image processor": lambda _, processor: setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
    "processor": lambda _, processor: setattr(processor, "num_additional_image_tokens", 7),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_part_has_its_name(name):
    assert changed(CHANGES[name]) == {name}


def test_dtype_and_weights_in_it():
    assert changed(lambda model, _: model.to(torch.bfloat16)) == {"dtype", "weights"}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # PaliGemma's processor and NumPy's newest
@pytest.mark.parametrize("family", FAMILIES)
def test_being_asked_changes_nothing(family):
    model, processor = FAMILIES[family]().model, tiny_processor(family)
    asker = Asker(adapter_for(model), processor)
    before = fingerprint.of_model(model, processor)
    with VisionZip(keep=4).on(model) as small:
        image = Image.new("RGB", (48, 48), "red")
        asker.answer(small, [image, image], ["w4", "w5 w6 w7"], 3)
        assert fingerprint.of_model(model, processor) == before
    assert fingerprint.of_model(model, processor) == before


def test_a_model_loaded_from_another_place_is_the_same(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    found = []
    for name in "ab":
        tiny_llava().save_pretrained(tmp_path / name)
        tiny_processor("llava").save_pretrained(tmp_path / name)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        found.append(fingerprint.of_model(loaded, AutoProcessor.from_pretrained(tmp_path / name)))
    assert found[0] == found[1]


def test_code_that_answers_come_from_is_there():
    root = Path(vlmzip.__file__).parent
    assert [name for name in fingerprint.CODE if not (root / name).exists()] == []


def test_code_of_the_package_that_has_changed(monkeypatch, tmp_path):
    (tmp_path / "methods").mkdir()
    monkeypatch.setattr(fingerprint, "CODE", ("methods",))
    monkeypatch.setattr(vlmzip, "__file__", str(tmp_path / "__init__.py"))
    before = fingerprint.of_code()
    (tmp_path / "__init__.py").write_text("1")
    assert fingerprint.of_code() == before
    (tmp_path / "methods" / "new.py").write_text("1")
    assert fingerprint.of_code() != before


def test_a_method_of_this_package_has_no_code_of_its_own():
    assert fingerprint.of_method_code(VisionZip()) == ""


@pytest.mark.filterwarnings("ignore:qformer is untrained")
def test_weights_of_a_method():
    model = tiny_llava()
    with vlmzip.QFormer(queries=4, depth=1, heads=2).on(model) as small:
        before = fingerprint.of_method(small)
        assert fingerprint.of_method(small) == before
        with torch.no_grad():
            next(small.resampler.parameters()).view(-1)[-1] += 1
        assert fingerprint.of_method(small)["method weights"] != before["method weights"]
    with VisionZip(keep=4).on(model) as small:
        assert fingerprint.of_method(small) == {"method code": "", "method weights": ""}


def test_images_are_told_by_their_pixels(tmp_path):
    one, other = Image.new("RGB", (4, 6), "red"), Image.new("RGB", (6, 4), "red")
    assert fingerprint.of_image(one) == fingerprint.of_image(one.copy()) != fingerprint.of_image(other)
    names = [str(tmp_path / "a.png")]
    one.save(names[0])
    before = fingerprint.of_images(names)
    other.save(names[0])
    assert fingerprint.of_images(names) != before
    assert fingerprint.of_images([one, other]) != fingerprint.of_images([other, one])
