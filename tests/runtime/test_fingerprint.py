"""Everything that an answer depends on changes its fingerprint, by name; what it does not depend on changes nothing."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import vlmzip
from tests.families import FAMILIES, tiny_llava
from vlmzip import VisionZip, spec
from vlmzip.models import family_of
from vlmzip.runtime import fingerprint
from vlmzip.runtime.answering import Answerer


def changed(change, *more):
    """The names of what is another when `change` has been at work on a model and its processor."""
    model, processor = tiny_llava(), FAMILIES["llava"].processor()
    before = fingerprint.of_model(model, processor)
    change(model, processor, *more)
    now = fingerprint.of_model(model, processor)
    return {name for name in now if now[name] != before[name]}


def last_value(model):
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[-1, -1] += 1


CHANGES = {
    "weights": lambda model, *_: last_value(model),
    "configuration": lambda model, *_: setattr(model.config.text_config, "rms_norm_eps", 0.5),
    "generation settings": lambda model, *_: setattr(model.generation_config, "repetition_penalty", 1.3),
    "attention": lambda model, *_: model.set_attn_implementation("eager"),
    "dtype": lambda model, _, patch: patch.setattr(type(model), "dtype", torch.float16),
    "device": lambda model, _, patch: patch.setattr(type(model), "device", torch.device("cuda")),
    "tokenizer": lambda _, processor, __: processor.tokenizer.add_tokens(["more"]),
    "chat template": lambda _, processor, __: setattr(processor, "chat_template", "{{ messages }}"),
    "image processor": lambda _, processor, __: setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
    "processor": lambda _, processor, __: setattr(processor, "num_additional_image_tokens", 7),
    "code of vlmzip": lambda _, __, patch: patch.setattr(fingerprint, "CODE", fingerprint.CODE[1:]),
    "torch": lambda _, __, patch: patch.setattr(torch, "__version__", "9.9"),
    "transformers": lambda _, __, patch: patch.setattr(transformers, "__version__", "9.9"),
}


def test_every_part_is_tried():
    assert CHANGES.keys() == fingerprint.of_model(tiny_llava(), FAMILIES["llava"].processor()).keys()


@pytest.mark.parametrize("name", CHANGES)
def test_each_part_has_its_name(name, monkeypatch):
    assert changed(CHANGES[name], monkeypatch) == {name}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("tokenizer", lambda processor: processor.tokenizer),
        ("image processor", lambda processor: processor.image_processor),
        ("processor", lambda processor: processor),
    ],
)
def test_the_class_counts_also_where_its_settings_say_the_same(name, part):
    """transformers writes one name for an image processor on Pillow and the one on torchvision."""

    def change(_, processor):
        found = part(processor)
        known = found.to_dict() if hasattr(found, "to_dict") else {}
        found.__class__ = type("Other", (type(found),), {"to_dict": lambda _: dict(known)})

    assert changed(change) == {name}


def test_dtype_and_weights_in_it():
    assert changed(lambda model, *_: model.to(torch.bfloat16)) == {"dtype", "weights"}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # PaliGemma's processor and NumPy's newest
def test_being_asked_changes_nothing(fresh):
    model, processor = fresh.model, fresh.processor()
    answerer = Answerer(family_of(model), processor)
    before = fingerprint.of_model(model, processor)
    with vlmzip.attach(model, VisionZip(keep=6)) as compressed:
        image = Image.new("RGB", (48, 48), "red")
        answerer.answer(compressed, [image, image], ["w4", "w5 w6 w7"], 3)
        assert fingerprint.of_model(model, processor) == before
    assert fingerprint.of_model(model, processor) == before


def test_a_model_loaded_from_another_place_is_the_same(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    found = []
    for name in "ab":
        tiny_llava().save_pretrained(tmp_path / name)
        FAMILIES["llava"].processor().save_pretrained(tmp_path / name)
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


OWN = """
import numpy
import vlmzip
from own_helper_of_this_test import work

class Mine(vlmzip.VisionZip):
    def assign(self, tokens):
        from own_package_of_this_test import late
        return work(super().assign(tokens))
"""
OWN_FILES = {
    "own_method_of_this_test.py": OWN,
    "own_helper_of_this_test.py": "import own_second_of_this_test as second\ndef work(found): return found\n",
    "own_second_of_this_test.py": "import own_method_of_this_test\n",
    "own_package_of_this_test/__init__.py": "",
    "own_package_of_this_test/late.py": "from . import other\nfrom .inner.last import VALUE\n",
    "own_package_of_this_test/other.py": "",
    "own_package_of_this_test/inner/last.py": "VALUE = 1\n",
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A method in a file of one's own, which imports others: some at once, one as late as it works."""
    for name, text in {**OWN_FILES, "unused.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield spec.read("own_method_of_this_test:Mine")
    for name in [name for name in sys.modules if name.partition(".")[0].endswith("_of_this_test")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", OWN_FILES)
def test_files_that_a_method_of_ones_own_imports_count(own, tmp_path, name):
    before = fingerprint.of_method_code(own)
    (tmp_path / name).write_text(OWN_FILES[name] + "# other code\n")
    assert fingerprint.of_method_code(own) != before


def test_what_a_method_of_ones_own_does_not_import_does_not_count(own, tmp_path):
    before = fingerprint.of_method_code(own)
    (tmp_path / "unused.py").write_text("1")
    assert fingerprint.of_method_code(own) == before
    importlib.import_module("own_package_of_this_test.late")  # as the first answer does
    assert fingerprint.of_method_code(own) == before


def test_a_helper_that_cannot_be_read_as_python_counts(own, tmp_path):
    path = tmp_path / "own_second_of_this_test.py"
    path.write_text("def")
    before = fingerprint.of_method_code(own)
    path.write_text("def 1")
    assert fingerprint.of_method_code(own) != before


@pytest.mark.filterwarnings("ignore:qformer is untrained")
def test_weights_of_a_method():
    model = tiny_llava()
    with vlmzip.attach(model, vlmzip.QFormer(queries=4, depth=1, heads=2)) as compressed:
        before = fingerprint.of_method(compressed)
        assert fingerprint.of_method(compressed) == before
        with torch.no_grad():
            next(compressed.resampler.parameters()).view(-1)[-1] += 1
        assert fingerprint.of_method(compressed)["method weights"] != before["method weights"]
    with vlmzip.attach(model, VisionZip(keep=4)) as compressed:
        assert fingerprint.of_method(compressed) == {"method code": "", "method weights": ""}


def test_images_are_told_by_their_pixels(tmp_path):
    one, other = Image.new("RGB", (4, 6), "red"), Image.new("RGB", (6, 4), "red")
    assert fingerprint.of_image(one) == fingerprint.of_image(one.copy()) != fingerprint.of_image(other)
    names = [str(tmp_path / "a.png")]
    one.save(names[0])
    before = fingerprint.of_images(names)
    other.save(names[0])
    assert fingerprint.of_images(names) != before
    assert fingerprint.of_images([one, other]) != fingerprint.of_images([other, one])
