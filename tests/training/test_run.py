"""From a configuration to a run: transformers' settings, the parts that learn, and random draws."""

import pytest

from tests.families import FAMILIES, tiny_llava
from tests.training.runs import write_config
from vlmzip import FastV, NoCompression, Pool2d, attach
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.methods import Chain, RandomTokens
from vlmzip.models import family_of
from vlmzip.training.config import Lora, read_config
from vlmzip.training.run import CHECKPOINTING, _choose_what_learns, _subset, _with_lora, arguments, train
from vlmzip.training.trainer import evaluating

pytest.importorskip("accelerate")


@pytest.fixture
def config(tmp_path):
    return lambda **settings: read_config(write_config(tmp_path, **settings), [])


def test_settings_reach_the_trainer(config):
    asked = config(
        weight_decay=0.05, warmup=0.3, precision="bf16", seed=7, gradient_checkpointing=True, workers=2,
        learning_rate=0.5, batch=6, batch_per_process=2, log_every=3, save_every=9,
    )  # fmt: skip
    found = arguments(asked, steps=11)
    assert (found.max_steps, found.warmup_steps, found.lr_scheduler_type) == (11, 0.3, "cosine")
    assert (found.weight_decay, found.learning_rate, found.bf16, found.seed) == (0.05, 0.5, True, 7)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (2, 3)
    assert getattr(found, CHECKPOINTING)
    assert (found.dataloader_num_workers, found.logging_steps, found.save_steps) == (2, 3, 9)
    plain = arguments(config(), steps=6)
    assert not plain.bf16
    assert not getattr(plain, CHECKPOINTING)
    assert not plain.logging_nan_inf_filter


def test_other_settings_go_to_the_trainer(config):
    assert arguments(config(trainer={"max_grad_norm": 0.3}), 1).max_grad_norm == 0.3


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it
def test_loras_settings_reach_peft():
    found = _with_lora(tiny_llava(), Lora(r=4, alpha=9, dropout=0.25)).peft_config["default"]
    assert (found.r, found.lora_alpha, found.lora_dropout) == (4, 9, 0.25)


def test_the_records_of_a_fraction_are_drawn_by_the_seed(config):
    first, second = (_subset(100, config(fraction="10%", seed=seed)) for seed in (0, 1))
    assert len(first) == len(second) == 10
    assert first != second
    assert first == sorted(first)


@pytest.mark.parametrize("learn", [("projector",), ("llm",), ("vision",), ("vision", "projector")])
def test_the_chosen_parts_learn(fresh, learn):
    """In Qwen, the projector is a part of the encoder, but is still chosen separately."""
    model = fresh.model
    model_family, compressed = family_of(model), attach(model, NoCompression())
    _choose_what_learns(compressed, model_family, learn, None)
    inside = set(model_family.projector.parameters())
    parts = {"projector": inside, "llm": set(model_family.llm.parameters())}
    parts["vision"] = set(model_family.vision_encoder.parameters()) - inside
    for part, weights in parts.items():
        assert {one.requires_grad for one in weights} == {part in learn}, part


@pytest.mark.skipif("video_llava" not in FAMILIES, reason="not in this version of transformers")
@pytest.mark.parametrize("learn", [("projector",), ("vision",)])
def test_an_encoder_for_videos_learns_with_the_one_for_images(learn):
    compressed = attach(FAMILIES["video_llava"].build(), NoCompression())
    _choose_what_learns(compressed, family_of(compressed.inner), learn, None)
    for tower in (compressed.inner.model.video_tower, compressed.inner.model.image_tower):
        assert {weights.requires_grad for weights in tower.parameters()} == {"vision" in learn}


def test_random_tokens_differ_at_every_step_and_forward():
    def seeds(compressor: Compressor) -> list[int]:
        return [stage.seed for stage in compressor.stages() if isinstance(stage, RandomTokens)]

    for compressor in (RandomTokens(keep=3), Chain(compressors=(RandomTokens(keep=9), FastV(keep=3)))):
        drawn = [seeds(compressor.at_step(step, salt)) for step, salt in ((0, 0), (1, 0), (0, 1))]
        assert len({str(one) for one in drawn}) == 3
        assert seeds(compressor.at_step(1, 0)) == drawn[1]
    assert Pool2d(factor=2).at_step(1, 1) == Pool2d(factor=2)


def test_an_evaluation_restores_the_training_state():
    compressed = attach(tiny_llava(), Pool2d(factor=2)).train()
    with evaluating(compressed, NoCompression()):
        assert not compressed.training
        assert compressed.compressor == NoCompression()
    assert compressed.training
    assert compressed.compressor == Pool2d(factor=2)


def test_an_evaluation_needs_a_score(config):
    with pytest.raises(UserError, match="evaluation: train needs a score"):
        train(config(evaluation={"every": 1, "task": "mini"}), None, None, None)
