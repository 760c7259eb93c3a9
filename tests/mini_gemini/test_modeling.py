"""Mini-Gemini computes what its paper and checkpoints define, also for HD models."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, ConvNextConfig, GemmaConfig, LlamaConfig

from tests.mini_gemini import published
from tests.references import mini_gemini as reference
from tests.tiny import IMAGE_TOKEN, LLM, SIDE, noise
from vlmzip.mini_gemini import MiniGeminiConfig, MiniGeminiForConditionalGeneration
from vlmzip.mini_gemini.weights import convnext_weights, module_weights

TOKENS = 36
LLMS = {"llama": LlamaConfig, "gemma": GemmaConfig}


def config(grid, llm="llama"):
    return MiniGeminiConfig(
        vision_config=published.clip().config,
        text_config=LLMS[llm](**LLM, bos_token_id=1, eos_token_id=2, head_dim=8),
        aux_config=ConvNextConfig(hidden_sizes=published.WIDTHS, depths=published.DEPTHS),
        image_token_index=IMAGE_TOKEN,
        image_grid=grid,
    )


def model_of(grid, llm="llama"):
    """A model with the weights of the tiny published checkpoints."""
    torch.manual_seed(0)
    model = MiniGeminiForConditionalGeneration(config(grid, llm)).eval()
    inner = model.model
    inner.vision_tower.load_state_dict(published.clip().state_dict())
    inner.vision_tower_aux.load_state_dict(convnext_weights(published.trunk()))
    for name in ("multi_modal_projector", "patch_miner"):
        getattr(inner, name).load_state_dict(module_weights(published.modules(LLM["hidden_size"]), name))
    return model


def pixels(images, grid):
    views = [noise(7 * image + view, 3, SIDE, SIDE) for image in range(images) for view in range(1 + grid**2)]
    low = torch.stack(views).unflatten(0, (images, -1))
    side = grid * published.AUX_SIDE
    high = torch.stack([noise(50 + image, 3, side, side) for image in range(images)])
    return {"pixel_values": low if grid > 1 else low[:, 0], "pixel_values_aux": high}


@pytest.mark.parametrize("grid", [1, 2])
def test_the_tokens_are_those_of_the_reference(grid):
    inputs, model = pixels(2, grid), model_of(grid)
    with torch.no_grad():
        tokens = model.get_image_features(**inputs).pooler_output
    clip, weights = published.clip(), published.modules(LLM["hidden_size"])
    for image, aux in enumerate(inputs["pixel_values_aux"]):
        views = inputs["pixel_values"][image].reshape(-1, 3, SIDE, SIDE)
        patches = published.patches(clip, views)
        expected = reference.tokens_of_image(weights, published.trunk(), patches, aux, grid)
        assert tokens[image].shape == (TOKENS * (5 if grid == 2 else 1), LLM["hidden_size"])
        torch.testing.assert_close(tokens[image], expected, rtol=1e-5, atol=2e-5)
        assert expected.std() > 0.1


@pytest.mark.parametrize("change", ["query_projector", "key_projector", "value_projector"])
def test_every_part_of_the_mining_counts(change):
    inputs, model = pixels(1, 1), model_of(1)
    with torch.no_grad():
        before = model.get_image_features(**inputs).pooler_output[0]
        for parameter in getattr(model.model.patch_miner, change).parameters():
            parameter.mul_(0.5)
        after = model.get_image_features(**inputs).pooler_output[0]
    assert (before - after).abs().amax(-1).min() > 1e-4


def test_the_size_of_the_published_encoder():
    model = MiniGeminiConfig()
    assert model.aux_config.hidden_sizes == [192, 384, 768, 1536]
    assert sum(model.aux_config.hidden_sizes) == 2880
    assert (model.views, MiniGeminiConfig(image_grid=2).views) == (1, 5)


def test_gemma_multiplies_image_features_as_its_own_embeddings():
    inputs = pixels(1, 1)
    with torch.no_grad():
        llama, gemma = (model_of(1, llm).get_image_features(**inputs).pooler_output[0] for llm in LLMS)
    torch.testing.assert_close(gemma, llama * LLM["hidden_size"] ** 0.5)


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("grid", [1, 2])
def test_answers_saved_and_loaded(grid, llm, tmp_path):
    model, inputs = model_of(grid, llm), pixels(2, grid)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * (TOKENS * model.config.views), 6]] * 2)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(**prompt).logits, model(**prompt).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    answer = model.generate(**prompt, **greedy)
    assert torch.equal(loaded.generate(**prompt, **greedy), answer)
    beams = model.generate(**prompt, **greedy, num_beams=2)
    assert beams.shape[0] == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_can_be_set(attention):
    model = model_of(1)
    model.set_attn_implementation(attention)
    assert model.config.vision_config._attn_implementation == attention


def test_the_loss_reaches_every_part_that_learns():
    model, inputs = model_of(2), pixels(1, 2)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * (TOKENS * 5), 6, 7]])
    model(input_ids=ids, labels=ids.masked_fill(ids == IMAGE_TOKEN, -100), **inputs).loss.backward()
    assert model.model.vision_tower.get_input_embeddings().weight.grad is not None
    for part in ("vision_tower_aux", "patch_miner", "multi_modal_projector"):
        assert [name for name, p in getattr(model.model, part).named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values_aux": None}, "pixel_values_aux is missing"),
        ({"pixel_values_aux": torch.zeros(2, 3, 96, 96)}, "has 1 views, and pixel_values_aux 2 images of 1"),
        ({"pixel_values_aux": torch.zeros(1, 3, 80, 80)}, "20 x 20 features of a view of 6 x 6 patches"),
        ({"mm_encoder_outputs": {}}, "either pixel_values or mm_encoder_outputs"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * TOKENS]])
    with pytest.raises(ValueError, match=message):
        model_of(1)(**{"input_ids": ids, **pixels(1, 1), **change})
