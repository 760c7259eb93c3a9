"""Methods that count tokens by content: the processor runs the vision encoder, and answers are those of the façade."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaConfig

from tests.serving.vllm.asking import generate, of_facade, of_vllm, questions, request

pytest.importorskip("vllm")

from tests.serving.vllm import tiny
from tests.serving.vllm.test_tiles import SIZES, TEXT, check
from vlmzip.serving.vllm import encoder

DFMR = "dfmr(tau=0.5)"


@pytest.fixture(scope="module")
def by_content(start):
    return start(DFMR, max_num_batched_tokens=48, max_num_seqs=4)  # fewer than the tokens of a detailed image


@pytest.mark.parametrize("compressor", [DFMR, "adaptive_visionzip(tau=0.5)"])
def test_answers_are_those_of_the_facade(by_content, compressor):
    asked = questions(200)
    assert of_vllm(by_content, asked, compressor) == of_facade(compressor, asked)


def test_counts_depend_on_the_image(by_content):
    lengths = {len(output.prompt_token_ids) for output in generate(by_content, list(map(request, questions(40))))}
    assert len(lengths) > 1


@pytest.mark.parametrize("compressor", ["prumerge(keep=20)", "visionzip(keep=36)", "no_compression"])
def test_other_methods_work_beside_them(by_content, compressor):
    asked = questions(20)
    assert of_vllm(by_content, asked, compressor) == of_facade(compressor, asked)


def test_a_process_loads_the_encoder_once(by_content, monkeypatch):
    loads, load = [], encoder.Encoder.__init__
    monkeypatch.setattr(encoder, "_encoders", {})
    monkeypatch.setattr(encoder.Encoder, "__init__", lambda self, config: loads.append(1) or load(self, config))
    template = "{% for message in messages %}USER: {{ message['content'] }} ASSISTANT:{% endfor %}"
    for question in questions(2):
        content = [{"type": "image_pil", "image_pil": question.image}, {"type": "text", "text": question.question}]
        messages = [{"role": "user", "content": content}]
        by_content.reset_mm_cache()
        by_content.chat(messages, chat_template=template, use_tqdm=False)
    assert len(loads) == 1


@pytest.mark.parametrize(("compressor", "runs"), [(DFMR, False), ("prumerge(keep=20)", True)])
def test_the_last_layer_runs_only_for_methods_that_read_it(by_content, compressor, runs):
    by_content.reset_mm_cache()
    (question,) = questions(1)
    family = encoder.encoder_of(by_content.llm_engine.model_config).families["image"]
    calls = []
    hook = family.tower.attentions[-1].layer.register_forward_hook(lambda *_: calls.append(1))
    generate(by_content, [request(question, compressor)])
    hook.remove()
    assert bool(calls) is runs


def test_each_config_of_a_checkpoint_has_an_encoder(monkeypatch):
    """--hf-overrides can choose another layer of the encoder."""
    monkeypatch.setattr(encoder, "_encoders", {})
    monkeypatch.setattr(encoder, "Encoder", lambda config: config.hf_config.vision_feature_layer)
    configs = [LlavaConfig(vision_feature_layer=layer) for layer in (-2, -3, -2)]
    models = [SimpleNamespace(model="m", revision=None, dtype=torch.float32, hf_config=config) for config in configs]
    assert [encoder.encoder_of(model) for model in models] == [-2, -3, -2]
    assert len(encoder._encoders) == 2


def test_tiles_and_videos(start, tmp_path):
    model, processor = tiny.llava_onevision(tmp_path)
    limits = {"image": 2, "video": 2}
    case = model, processor, start(DFMR, model=tmp_path, max_model_len=2048, limit_mm_per_prompt=limits)
    for seed, size in enumerate(SIZES[:3]):
        check(case, f"USER: <image>{TEXT}", {"image": tiny.image(seed, *size)}, "dfmr(tau=1.0)")
    clips = [tiny.noise(seed, frames, 60, 80, 3) for seed, frames in enumerate((3, 5))]
    for clip in clips:
        check(case, f"USER: {tiny.VIDEO}{TEXT}", {"video": clip}, "dfmr(tau=1.0)")
    requests = [
        {"prompt": f"USER: {tiny.VIDEO * len(videos)}{TEXT}", "multi_modal_data": {"video": videos}}
        for videos in (clips, clips[:1], clips[1:])
    ]
    both, first, second = (len(output.prompt_token_ids) for output in generate(case[2], requests))
    text = len(processor.tokenizer(f"USER: {TEXT}")["input_ids"])
    assert both - text == first - text + second - text
