"""Qwen2.5-VL and Qwen3-VL in vLLM answer as the façade does: images, videos, chunks, caches, budgets of requests."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import vlmzip
from tests.serving.vllm import qwen
from tests.serving.vllm.asking import assert_near_logits
from tests.serving.vllm.qwen import Asked, image, of_facade, of_vllm, video
from vlmzip import UserError, spec
from vlmzip.methods import KMeans

pytest.importorskip("vllm")

from vlmzip.serving.vllm import encoder
from vlmzip.serving.vllm import processor as processor_module

#: Log-probabilities of the tokens of an answer differ by less.
NEAR = 1e-4
#: The clips have frames after each two were joined.
ASKED = [
    Asked("w5w6", image(1), "w7w8"),
    Asked("w5w6", video(1), "w7w8"),
    Asked("w5", video(1), "w7", video(2, frames=3, rows=4, cols=3, fps=4.0), "w8"),
    Asked(image(1), image(2, 4, 4), "w7w8"),
    Asked("w5w6", image(2), video(3), "w9", image(3), "w7w8"),
    Asked("w4w5"),
]
METHODS = [
    "visionzip(keep=10)", "pool2d", "divprune(keep=11)", "random_tokens(keep=9)", "kmeans(keep=8)", "hiprune(keep=20)",
    "evs(keep=40%)", "vidcom2(keep=50%)", "visionzip(keep=20)+divprune(keep=7,site=post_projector)",
]  # fmt: skip

#: Grids that DFMR can pool, with and without detail.
BY_CONTENT = [
    Asked("w5w6", image(4, 6, 6), "w7w8"),
    Asked("w5", Image.new("RGB", (48, 48), "teal"), "w7"),
    Asked(
        "w5", video(4, frames=3, rows=4, cols=6), "w7", image(5, 6, 4), "w8", video(5, frames=2, rows=6, cols=4), "w9"
    ),
    *ASKED,
]
DFMR = "dfmr(tau=0.5)"
CONTIGUOUS = "visionzip(keep=12,positions=contiguous)"
#: All engines. One that ends would end what it shares with the others in this process.
STARTED = []


@pytest.fixture(scope="module", params=list(qwen.MAKERS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)
    qwen.save(name, folder)
    return folder


@pytest.fixture(scope="module")
def start_qwen(start, folder):
    def start_qwen(compressor=None, **settings):
        usual = {"max_num_batched_tokens": 1024, "block_size": 32, "num_gpu_blocks_override": 256}
        usual |= {"limit_mm_per_prompt": {"image": 3, "video": 2}}
        STARTED.append(start(compressor, model=folder, **usual | settings))
        return STARTED[-1]

    return start_qwen


@pytest.fixture(scope="module")
def engine(start_qwen):
    """An engine in which a request chooses its compressor."""
    return start_qwen("no_compression")


@pytest.fixture(scope="module")
def small(start_qwen):
    """An engine that takes a prompt in several chunks, with contiguous positions if a request chooses nothing."""
    return start_qwen(CONTIGUOUS, max_num_batched_tokens=24, max_num_seqs=4)


@pytest.fixture(scope="module")
def by_content(start_qwen):
    """An engine that takes a prompt in several chunks, whose processor can run the vision encoder."""
    return start_qwen("prumerge", max_num_batched_tokens=24, max_num_seqs=4)


def assert_same(some, others):
    """Assert that prompts and answers are equal, and that logits of all words are near at each token of an answer."""
    assert [each[:2] for each in some] == [each[:2] for each in others]
    for (_, tokens, some_logits), (_, _, other_logits) in zip(some, others, strict=True):
        assert_near_logits(some_logits, other_logits)
        some_values, other_values = chosen(tokens, some_logits), chosen(tokens, other_logits)
        torch.testing.assert_close(some_values, other_values, atol=NEAR, rtol=0)


def chosen(tokens, logits):
    """Return the log-probabilities of the tokens of an answer."""
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])


def assert_budgets_of_requests(name, engine, prompts, budgets):
    """Assert that requests with three budgets in turn get the façade's answers. The first is that of the engine."""
    expected = [of_facade(name, prompts, budget) for budget in budgets]
    chosen = [number % 3 for number in range(2 * len(prompts))]
    asked = [prompts[number // 2] for number in range(len(chosen))]
    compressors = [None if number == 0 else budgets[number] for number in chosen]
    assert_same(
        of_vllm(engine, asked, compressors), [expected[which][number // 2] for number, which in enumerate(chosen)]
    )


def model_of(engine):
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner.model


@pytest.mark.parametrize("compressor", METHODS)
def test_answers_are_those_of_the_facade(name, engine, compressor):
    assert_same(of_vllm(engine, ASKED, compressor), of_facade(name, ASKED, compressor))


def test_without_a_compressor_all_is_that_of_vllm(name, engine, start_qwen):
    stock = start_qwen()
    assert type(stock.renderer.mm_processor).__module__.startswith("vllm.")
    answers = of_vllm(stock, ASKED)
    assert_same(answers, of_facade(name, ASKED, "no_compression"))
    assert_same(of_vllm(engine, ASKED), answers)


def test_prompts_in_chunks_with_budgets_of_requests(name, small):
    assert_budgets_of_requests(name, small, ASKED, [CONTIGUOUS, "divprune(keep=11)", "evs(keep=40%)"])


@pytest.mark.parametrize("compressor", ["prumerge", DFMR, "adaptive_visionzip(tau=0.5)", "prumerge(keep=9)"])
def test_answers_are_those_of_the_facade_where_the_image_decides_the_count(name, by_content, compressor):
    expected = of_facade(name, BY_CONTENT, compressor)
    for _ in range(2):  # the second time with the tokens of the processor's cache
        assert_same(of_vllm(by_content, BY_CONTENT, compressor), expected)
        by_content.reset_prefix_cache()
        by_content.llm_engine.reset_encoder_cache()


def test_detail_decides_the_count(name, by_content):
    detailed, plain = (count for count, *_ in of_vllm(by_content, BY_CONTENT[:2], DFMR))
    assert detailed > plain + 20


def test_the_processor_encodes_one_image_at_a_time(by_content):
    family = encoder.encoder_of(by_content.llm_engine.model_config).families["image"]
    calls = []
    handle = family.vision_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    of_vllm(by_content, [Asked("w5", image(50), "w6", image(51, 6, 6), "w7", video(52), "w8")], DFMR)
    handle.remove()
    assert len(calls) == 3


def test_images_that_the_processor_encoded_stand_beside_others(name, by_content):
    assert_budgets_of_requests(name, by_content, BY_CONTENT, ["prumerge", DFMR, "divprune(keep=11)"])


def test_contiguous_positions_and_pixels_that_vllm_normalises_in_its_processor(name, start_qwen):
    compressor = "adaptive_visionzip(tau=0.5,positions=contiguous)"
    engine = start_qwen(compressor, mm_device_do_normalize=False)
    assert_same(of_vllm(engine, BY_CONTENT), of_facade(name, BY_CONTENT, compressor))


def test_the_processor_loads_nothing_of_the_llm_but_a_norm(name, by_content):
    of_vllm(by_content, BY_CONTENT[:1])
    for family in (each for loaded in encoder._encoders.values() for each in loaded.families.values()):
        loaded = {key for key, value in family.model.named_parameters() if value.device.type != "meta"}
        assert {key for key in loaded if "visual." not in key} == {"model.language_model.norm.weight"}


def test_prefixes_are_cached_apart_for_each_setting(name, engine):
    asked = Asked("w5" * 40, video(7, frames=6), "w6" * 40, image(7), "w8")
    settings = ["divprune(keep=10)", "visionzip(keep=10)"]
    expected = [of_facade(name, [asked], setting)[0] for setting in settings]
    assert (expected[0][2][0] - expected[1][2][0]).abs().max() > 10 * NEAR, "the settings must give other answers"
    for _ in range(2):
        assert_same(of_vllm(engine, [asked] * 2, settings), expected)
    (output,) = engine.generate([asked.for_vllm(settings[0])], use_tqdm=False)
    assert output.num_cached_tokens > 64  # the prompt from the middle of the video on at most


def test_a_prompt_continues_one_in_the_cache(name, engine):
    setting = "visionzip(keep=10)"
    first = Asked("w5" * 20, video(8, frames=6), "w6" * 20)
    longer = Asked("w5" * 20, video(8, frames=6), "w6" * 21, image(8), "w9")
    of_vllm(engine, [first], setting)
    assert_same(of_vllm(engine, [longer], setting), of_facade(name, [longer], setting))


def test_videos_of_a_batch_are_encoded_together(name, engine):
    asked = [Asked("w5w6", video(20 + number), "w7") for number in range(4)]
    model, calls = model_of(engine), []
    handle = model.visual.register_forward_pre_hook(lambda *_: calls.append(1))
    answers = of_vllm(engine, asked, "evs(keep=40%)")
    assert len(calls) == 1
    most, model._most_tokens = model._most_tokens, 100  # two videos have 96 tokens
    engine.reset_mm_cache()
    engine.reset_prefix_cache()
    engine.llm_engine.reset_encoder_cache()
    again = of_vllm(engine, asked, "evs(keep=40%)")
    model._most_tokens = most
    handle.remove()
    assert len(calls) == 3
    assert_same(again, answers)


BAD = [
    (Asked("w5", image(1), "w6<|image_pad|>"), None, "a placeholder without an image"),
    (Asked("w5", image(1), "w6<|video_pad|>"), "divprune(keep=9)", "a placeholder without an image"),
    (Asked("w5w6", image(1), "w7"), "pixelprune", "acts at site 'pixels'"),
    (Asked("w5w6", image(1), "w7"), "downsample(keep=25%)", "max_pixels"),
    (Asked("w5w6", image(1), "w7"), "fastv(keep=9)", "acts at site 'in_llm'"),
    (Asked("w5w6", image(1), "w7"), "adaptive_visionzip", "needs the vision encoder in the processor"),
    (Asked("w5w6", image(1), "w7"), "zoo_prune(keep=9)", "does not map each token by itself"),
    (Asked("w5w6", image(1), "w7"), "divprune(keep=-1)", "keep"),
]


@pytest.mark.parametrize(("asked", "compressor", "reason"), BAD)
def test_a_bad_request_fails_alone(name, engine, asked, compressor, reason):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=reason):
        of_vllm(engine, [asked], compressor)
    assert_same(of_vllm(engine, ASKED[:1], "divprune(keep=11)"), of_facade(name, ASKED[:1], "divprune(keep=11)"))


def test_a_setting_is_tried_on_each_size_of_images(name, engine):
    """The first stage keeps all tokens of a small image, so its grid remains."""
    from vllm.exceptions import VLLMValidationError

    setting = "divprune(keep=20,site=pre_projector)+pool2d(site=post_projector)"
    sizes = [Asked("w5", image(30, rows, rows), "w7") for rows in (3, 8)]
    with pytest.raises(VLLMValidationError, match="needs tokens that lie on a grid"):
        of_vllm(engine, sizes[:1], setting)
    processor = engine.renderer.mm_processor
    (family, *_), compressor = processor.families, spec.read(setting)
    small, large = (
        {
            "pixel_values": SimpleNamespace(data=torch.zeros(4 * rows * rows, 1)),
            "image_grid_thw": SimpleNamespace(data=torch.tensor([1, 2 * rows, 2 * rows])),
        }
        for rows in (3, 8)
    )
    processor.count(family, compressor, small)
    with pytest.raises(UserError, match="needs tokens that lie on a grid"):
        processor.count(family, compressor, large)
    assert_same(of_vllm(engine, sizes, "divprune(keep=11)"), of_facade(name, sizes, "divprune(keep=11)"))


def test_an_error_of_a_method_in_the_engine_ends_no_request(monkeypatch, name, engine):
    asked = [Asked("w5", image(40 + number), "w7") for number in range(2)] + [Asked("w5", video(40), "w7")]
    lengths = [count for count, *_ in of_facade(name, asked, "kmeans(keep=7)")]
    monkeypatch.setattr(KMeans, "assign", lambda *_: [].pop())
    monkeypatch.setattr(processor_module, "try_out", lambda *_: None)
    assert [count for count, *_ in of_vllm(engine, asked, "kmeans(keep=7)")] == lengths
    monkeypatch.undo()
    assert_same(of_vllm(engine, ASKED[:1], "divprune(keep=11)"), of_facade(name, ASKED[:1], "divprune(keep=11)"))


def test_images_need_text_between_and_after_them(engine):
    from vllm.exceptions import VLLMValidationError

    prompts = ("<|image_pad|><|image_pad|>w5", "w5<|image_pad|>w6<|image_pad|>")
    for prompt in prompts:
        request = {"prompt": prompt, "multi_modal_data": {"image": [image(1), image(2)]}}
        with pytest.raises(VLLMValidationError, match="needs a token of text"):
            engine.generate([request], use_tqdm=False)


def test_positions_of_a_long_video_are_exact_in_bfloat16(monkeypatch, start, tmp_path):
    """bfloat16 has whole numbers up to 256, and the frames of this video are 203 positions apart."""
    qwen.save("qwen2_5_vl", tmp_path)
    setting, asked = "random_tokens(keep=9)", Asked("w5w6", video(1, fps=4 / 203), "w7")
    engine = start(setting, model=tmp_path, dtype="bfloat16", block_size=32, limit_mm_per_prompt={"video": 1})
    STARTED.append(engine)
    model, seen = model_of(engine), []
    recompute = model.recompute_mrope_positions
    monkeypatch.setattr(
        model, "recompute_mrope_positions", lambda *args, **kw: seen.append(recompute(*args, **kw)) or seen[-1]
    )
    ((length, _, _),) = of_vllm(engine, [asked])
    facade, processor = qwen.model_and_processor("qwen2_5_vl")
    expected = vlmzip.compress_inputs(facade, asked.for_facade(processor), setting)
    ids, positions = expected["input_ids"][0], expected["position_ids"][-3:, 0]
    assert length == len(ids)
    is_visual = ids == qwen.VIDEO
    assert positions[:, is_visual].max() > 512
    assert torch.equal(seen[0][1].cpu()[:, is_visual], positions[:, is_visual])


def test_a_rate_for_stock_pruning_is_refused(start_qwen):
    with pytest.raises(Exception, match="leave out video_pruning_rate"):
        start_qwen("visionzip(keep=10)", video_pruning_rate=0.5)
