"""Images with tiles, and videos: logits and answers are those of the façade."""

import pytest
import torch

import vlmzip
from tests.serving.vllm.asking import assert_near_logits, generate

pytest.importorskip("vllm")

from tests.serving.vllm import tiny

#: Width and height. The last is so large that LLaVA-OneVision shrinks its tokens.
SIZES = ((100, 60), (60, 120), (128, 128), (64, 64), (90, 40))
LARGE = (380, 370)
TEXT = "\nwhat color is the ring ? ASSISTANT:"
METHODS = (
    "no_compression", "visionzip(keep=20)", "visionzip(keep_per_view=9)", "divprune(keep=20)", "pool2d(factor=2)",
    "kmeans(keep=20)", "hiprune(keep=20)",
)  # fmt: skip
#: Log-probabilities of both sides differ by less. The weights are random, so a token may win by very little.
CLOSE = 2e-4


@pytest.fixture(scope="module")
def llava_next(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_next")
    model, processor = tiny.llava_next(folder)
    return model, processor, start("no_compression", model=folder)


@pytest.fixture(scope="module")
def onevision(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onevision")
    model, processor = tiny.llava_onevision(folder)
    limits = {"image": 4, "video": 2}
    return model, processor, start("no_compression", model=folder, max_model_len=2048, limit_mm_per_prompt=limits)


def of_vllm(engine, prompt, data, method):
    """Return the length of the prompt, the first tokens of the answer, and the logits of all words at the first."""
    from vllm import SamplingParams

    request = {"prompt": prompt, "multi_modal_data": data, "mm_processor_kwargs": {"vlmzip": method}}
    params = SamplingParams(temperature=0, max_tokens=4, min_tokens=4, logprobs=-1)
    (output,) = engine.generate([request], params, use_tqdm=False)
    (answer,) = output.outputs
    first = answer.logprobs[0]
    logits = torch.tensor([first[word].logprob for word in range(len(first))])
    return len(output.prompt_token_ids), list(answer.token_ids), logits


def of_facade(model, processor, prompt, data, method):
    names = {"image": "images", "video": "videos"}
    inputs = processor(text=prompt, **{names[name]: value for name, value in data.items()}, return_tensors="pt")
    with vlmzip.attach(model, method) as small, torch.inference_mode():
        length = int(vlmzip.compress_inputs(model, inputs, method)["input_ids"].shape[1])
        tokens = small.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        logits = small(**inputs).logits[0, -1]
    return length, tokens[0, inputs["input_ids"].shape[1] :].tolist(), logits


def check(case, prompt, data, method):
    model, processor, engine = case
    length, tokens, logits = of_vllm(engine, prompt, data, method)
    expected_length, expected_tokens, expected_logits = of_facade(model, processor, prompt, data, method)
    assert length == expected_length
    assert_near_logits(logits, expected_logits)
    best, expected_best = (values.log_softmax(-1).max() for values in (logits, expected_logits))
    torch.testing.assert_close(best, expected_best, atol=CLOSE, rtol=0)
    assert tokens == expected_tokens


@pytest.mark.parametrize("method", METHODS)
def test_llava_next(llava_next, method):
    for seed, size in enumerate(SIZES):
        check(llava_next, f"USER: <image>{TEXT}", {"image": tiny.image(seed, *size)}, method)


@pytest.mark.parametrize("method", METHODS)
def test_llava_onevision(onevision, method):
    for seed, size in enumerate((SIZES[0], SIZES[3], LARGE)):
        check(onevision, f"USER: <image>{TEXT}", {"image": tiny.image(seed, *size)}, method)


@pytest.mark.parametrize("method", [*METHODS, "evs(keep=50%)", "vidcom2(keep=25%)"])
def test_videos_of_llava_onevision(onevision, method):
    for seed, frames in enumerate((3, 5)):
        check(onevision, f"USER: {tiny.VIDEO}{TEXT}", {"video": tiny.noise(seed, frames, 60, 80, 3)}, method)


def test_images_with_several_numbers_of_tiles_go_through_the_encoder_together(llava_next):
    _, _, engine = llava_next
    requests = [
        {
            "prompt": f"USER: <image>{TEXT}",
            "multi_modal_data": {"image": tiny.image(seed, *size)},
            "mm_processor_kwargs": {"vlmzip": "visionzip(keep=20)"},
        }
        for seed, size in enumerate(SIZES * 3, start=100)
    ]
    together = [output.outputs[0].token_ids for output in generate(engine, requests)]
    engine.reset_prefix_cache()
    assert together == [generate(engine, [request])[0].outputs[0].token_ids for request in requests]


def test_videos_of_unequal_length_and_an_image_beside_a_video(onevision):
    _, _, engine = onevision
    method = {"mm_processor_kwargs": {"vlmzip": "visionzip(keep=20)"}}
    videos = [
        {
            "prompt": f"USER: {tiny.VIDEO}{TEXT}",
            "multi_modal_data": {"video": tiny.noise(50 + n, n, 60, 80, 3)},
            **method,
        }
        for n in (3, 5, 4)
    ]
    both = {"image": tiny.image(7, 100, 60), "video": tiny.noise(60, 3, 60, 80, 3)}
    requests = [*videos, {"prompt": f"USER: <image>{tiny.VIDEO}{TEXT}", "multi_modal_data": both, **method}]
    together = [output.outputs[0].token_ids for output in generate(engine, requests)]
    engine.reset_prefix_cache()
    assert together == [generate(engine, [request])[0].outputs[0].token_ids for request in requests]
    check(onevision, f"USER: <image>{tiny.VIDEO}{TEXT}", both, "visionzip(keep=20)")


def test_an_encoder_call_has_a_bounded_number_of_views(llava_next):
    from vlmzip.serving.vllm import llava_next as plugin
    from vlmzip.serving.vllm.model import MOST_VIEWS, CompressingModel

    model, _, _ = llava_next
    family = plugin.family_of(model.config)
    images = 40
    inputs = {
        "pixel_values": torch.zeros(images, 5, 3, tiny.SIDE, tiny.SIDE),
        "image_sizes": torch.tensor([[128, 128], [64, 128]] * (images // 2)),  # 5 and 3 views
    }
    parts = list(CompressingModel._parts(None, family, inputs))
    views = [sum(len(layout.views) for layout in family.layouts(part)) for part in parts]
    assert sum(views) == images * 4
    assert max(views) <= MOST_VIEWS
    assert len(parts) == 3
