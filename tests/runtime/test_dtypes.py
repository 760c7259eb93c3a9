"""Every method in models of other dtypes than float32."""

import pytest
import torch
from PIL import Image

import vlmzip
from vlmzip import catalogue

PROMPT = "USER: <image>\nwhat color is the ring ? ASSISTANT:"
#: mini's encoder takes whole images only.
NAMES = [name for name, cls in catalogue.available().items() if not cls.drops_patches]


HALVES = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)]


@pytest.fixture(scope="module", params=[torch.float64, *HALVES], ids=str)
def model_and_inputs(request):
    model, processor = vlmzip.mini.load(dtype=request.param)
    inputs = processor(images=Image.open("examples/flat.png"), text=PROMPT, return_tensors="pt")
    return model, dict(inputs.to(request.param))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_answers(model_and_inputs, name):
    model, inputs = model_and_inputs
    with vlmzip.attach(model, catalogue.make(catalogue.available()[name], {})) as compressed, torch.no_grad():
        logits = compressed(**inputs).logits
        assert compressed.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert logits.dtype == model.dtype
    assert logits.isfinite().all()
