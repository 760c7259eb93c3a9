"""Refusals name the methods that work, and the page about families."""

import pytest
import torch
import transformers
from packaging.version import Version

import vlmzip
from tests.families import FAMILIES
from vlmzip import FastV, NoCompression, UserError, VisionZip, compress_inputs
from vlmzip.lab.conformance.families import FAMILIES as TINY
from vlmzip.lab.conformance.families import Tiny
from vlmzip.lab.conformance.prompts import Prompts
from vlmzip.lab.conformance.tiny import folders, model_class, tiny_model
from vlmzip.models import family_of
from vlmzip.runtime.other_methods import fit_every_model
from vlmzip.visual_tokens import Grid

NAMED = "; these methods work, among others: dfmr, divprune, kmeans, pool2d, random_tokens; see docs/add_a_family.md"

pytestmark = pytest.mark.filterwarnings("ignore")


def made(name):
    if name not in folders():
        pytest.skip("this version of transformers has no such model")
    tiny = TINY.get(name, Tiny())
    model = tiny_model(model_class(name), tiny.changes)
    return model, Prompts(model, tiny)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("fuyu", "visionzip"),  # it has no encoder
        ("fuyu", "downsample"),
        ("idefics2", "visionzip"),  # its projector is cross-attention
        ("gemma3", "fastv"),  # sliding windows
        ("chameleon", "fastv"),  # the model writes images into the prompt
    ],
)
def test_refusals_name_the_methods_that_work(name, spec):
    model, prompts = made(name)
    inputs = prompts.batch([1, "image", 105, 106])
    with pytest.raises(UserError) as error, vlmzip.attach(model, spec) as compressed:
        compressed(**inputs)
    assert str(error.value).endswith(NAMED)
    assert str(error.value).count("these methods work") == 1
    for method in fit_every_model():
        with vlmzip.attach(model, method) as compressed:
            assert compressed(**inputs).logits.isfinite().all()


def test_other_mistakes_name_no_methods():
    with pytest.raises(UserError) as error:
        vlmzip.attach(FAMILIES["llava"]().model, FastV(layer=40))
    assert "these methods work" not in str(error.value)


@torch.no_grad()
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="Fuyu had another name for its pixels")
def test_visual_tokens_may_be_in_another_field_of_the_output():
    """Fuyu has no encoder: a linear layer makes a visual token of each patch. A token ends each row of a prompt."""
    model, prompts = made("fuyu")
    inputs = prompts.batch([1, 105, "image", 106, "image", 107], [1, "image", 108])
    small = compress_inputs(model, inputs, NoCompression())
    assert torch.equal(model(**small).logits, model(**inputs).logits)
    assert [image.views[0].grid for image in small.report.images] == [Grid(1, 6, 6)] * 3


@pytest.mark.parametrize("name", ["blip_2", "instructblip"])
def test_models_that_run_their_llm_alone_are_refused_for_that_reason(name):
    if name not in folders():
        pytest.skip("this version of transformers has no such model")
    model = tiny_model(model_class(name), TINY[name].changes)
    with pytest.raises(UserError, match="it has no KV cache among the arguments of forward, because its own generate"):
        family_of(model)
    with pytest.raises(UserError, match=r"see docs/add_a_family\.md"):
        vlmzip.attach(model, VisionZip())
