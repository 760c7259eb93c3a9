"""The tokens of a request before it is sent: from shapes alone, and as the model then sees them."""

import pytest
import torch
from PIL import Image

import vlmzip
from tests.serving.server.running import QUESTION, asking, image_url
from vlmzip.runtime.fitting import fitted
from vlmzip.runtime.loading import load_without_weights
from vlmzip.serving.server.counting import count_tokens

#: Methods whose count follows from shapes, and methods that decide by content.
BY_SHAPE = [
    "no_compression", "visionzip(keep=5)", "visionzip(keep_per_view=2)", "downsample(factor=2)",
    "fastv(keep=4,layer=1)", "sparsevlm", "pyramiddrop", "visionzip(keep=8)+fastv(layer=2,keep=4)",
]  # fmt: skip
BY_CONTENT = ["dfmr", "prumerge", "dfmr+fastv(layer=2)"]


def test_counts_are_those_of_the_model(family):
    inputs = family.batch([1, "image", 5, 6, "image", 7], [1, 5, 8, "image", 6])
    checked = set()
    for method in BY_SHAPE + BY_CONTENT:
        try:
            with torch.no_grad(), vlmzip.attach(family.model, method) as compressed:
                compressed(**inputs)
                report = compressed.report
        except vlmzip.UserError:  # the method does not fit the family
            continue
        count = count_tokens(compressed._family, inputs, compressed.compressor)
        for image, known in zip(report.images, count.images, strict=True):
            assert known.before == image.before, method
            assert known.least <= image.after <= known.most, method
            assert known.last_layer == image.by_layer[-1] or (known.last_layer is None and method in BY_CONTENT), method
        if method in BY_SHAPE:
            assert count.visual.least == count.visual.most == report.after
        checked.add(method in BY_SHAPE)
    assert checked == {True, False}


@pytest.mark.parametrize("method", [None, "fastv", "dfmr"])
def test_the_endpoint_says_what_the_answer_will_use(http, method):
    body = asking(QUESTION, image_url(), image_url("first"), vlmzip={"method": method, "keep": None})
    tokens = http.post("/v1/tokens", json=body).json()
    used = http.post("/v1/chat/completions", json=body).json()["usage"]
    if tokens["exact"]:
        assert tokens["visual_tokens"] == used["vlmzip"]["visual_tokens"]
        assert tokens["prompt_tokens"]["after"] == used["prompt_tokens"]
    else:
        after = tokens["visual_tokens"]["after"]
        assert after["least"] <= used["vlmzip"]["visual_tokens"]["after"] <= after["most"]
    assert tokens["exact"] == (method != "dfmr")
    assert len(tokens["images"]) == 2
    assert http.post("/v1/tokens", json={**body, "vlmzip": {"keep": -1}}).status_code == 400


def test_no_weights_are_needed(mini):
    shapes = load_without_weights("mini")
    assert next(shapes.model.parameters()).device.type == "meta"
    inputs = mini.processor(text="<image> a", images=[Image.new("RGB", (50, 30))], return_tensors="pt")
    method = fitted("visionzip(keep=7)+fastv(layer=2,keep=3)", mini.family)
    assert count_tokens(shapes.family, inputs, method) == count_tokens(mini.family, inputs, method)
