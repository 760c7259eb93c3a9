"""Queries and keys of decoder layers of many kinds, against the attention that the models themselves compute."""

import copy

import accelerate
import pytest
import torch
from transformers import AutoConfig, AutoModel, DynamicCache

from vlmzip import UserError
from vlmzip.models import confirm
from vlmzip.models.llm_attention import DIRECT, is_direct, queries_and_keys, queries_in, recorded
from vlmzip.models.recording import attention_rows

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, vocab_size=50, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
PARTLY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
#: A model type and further settings for each kind of attention of which we compute only some queries.
KNOWN = {
    "llama": {}, "mistral": {"sliding_window": None}, "gemma": {}, "qwen2": {}, "qwen3": {}, "qwen2_vl_text": AXES,
    "qwen2_5_vl_text": AXES, "qwen3_vl_text": AXES,
}  # fmt: skip
#: Kinds that the model itself computes.
LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    first_k_dense_replace=2,
)  # fmt: skip
OTHERS = {
    "phi3, fused": {},
    "phi3, partly rotated": PARTLY,
    "glm4, neighbours rotated": PARTLY,
    "cohere2, not rotated": {"layer_types": ["full_attention"] * 2},
    "cohere2, neighbours rotated": {"layer_types": ["sliding_attention"] * 2},
    "hunyuan_v1_dense, norm after the rotation": {},
    "granite, another scale": {"attention_multiplier": 0.7},
    "deepseek_v2, latent": LATENT,
    "olmo2, no norm before the attention": {},
}
IMPLEMENTATIONS = ["eager", "sdpa"]


def build(kind, settings, implementation="eager"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition(",")[0], **{**SIZES, **settings})
    model = AutoModel.from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.4)
    return model


def last_layer_of(model, **arguments):
    """The last layer, its input and its arguments, in a forward of the model without a filled cache."""
    seen = {}

    def keep(_module, args, kwargs):
        seen.update(hidden=args[0], arguments=kwargs)

    handle = model.layers[1].register_forward_pre_hook(keep, with_kwargs=True)
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    out = model(ids, attention_mask=mask, **arguments)
    handle.remove()
    return model.layers[1], seen["hidden"], seen["arguments"], out


ROWS = torch.tensor([[4, 8], [5, 7]])
ALLOWED = (torch.arange(9) <= ROWS[..., None]) & (torch.arange(9) >= torch.tensor([2, 0])[:, None, None])


def checked(layer, hidden, arguments):
    record = recorded(layer, hidden, arguments)
    confirm.check_llm_attention(layer, record, arguments["attention_mask"])
    return queries_in(record, ROWS)


def truth(kind, settings):
    *_, out = last_layer_of(build(kind, settings), output_attentions=True)
    return torch.stack([attention.mean(0)[rows] for attention, rows in zip(out.attentions[1], ROWS, strict=True)])


@pytest.mark.parametrize("kind", KNOWN)
@torch.no_grad()
def test_known_kinds_are_those_of_the_model(kind):
    layer, hidden, arguments, _ = last_layer_of(build(kind, KNOWN[kind]))
    assert is_direct(layer)
    direct = queries_and_keys(layer, hidden, arguments, ROWS)
    for value, expected in zip(direct, checked(layer, hidden, arguments), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    got = attention_rows(direct.query, direct.key, ALLOWED, direct.scale)
    torch.testing.assert_close(got, truth(kind, KNOWN[kind]), atol=1e-5, rtol=1e-5)


def test_all_known_kinds_are_tested():
    assert {type(build(*kind).layers[0].self_attn).__name__ for kind in KNOWN.items()} == set(DIRECT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_other_kinds_are_those_of_the_model(kind, implementation):
    layer, hidden, arguments, _ = last_layer_of(build(kind, OTHERS[kind], implementation))
    assert not is_direct(layer)
    query, key, scale = checked(layer, hidden, arguments)
    got = attention_rows(query, key, ALLOWED, scale)
    torch.testing.assert_close(got, truth(kind, OTHERS[kind]), atol=1e-5, rtol=1e-5)
    assert got.max() > 0.25, "else constants would be compared"


@torch.no_grad()
def test_the_layer_and_its_cache_stay_as_they_are():
    model = build("glm4", PARTLY, "sdpa")
    layer, hidden, arguments, _ = last_layer_of(model)
    calls = []
    layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    name = next(name for name in ("cache", "past_key_values") if name in arguments)
    arguments[name] = DynamicCache(config=model.config)
    before = copy.copy(layer.__dict__), copy.copy(layer.self_attn.__dict__)
    checked(layer, hidden, arguments)
    assert arguments[name].get_seq_length() == 0
    assert model.config._attn_implementation == "sdpa"
    assert (layer.__dict__, layer.self_attn.__dict__) == before
    assert layer.self_attn is layer._modules["self_attn"]
    assert not calls


@torch.no_grad()
def test_offloaded_weights_are_loaded():
    model = build("glm4", PARTLY)
    layer, hidden, arguments, _ = last_layer_of(model)
    expected = checked(layer, hidden, arguments)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(layer.parameters()).is_meta
    for value, other in zip(checked(layer, hidden, arguments), expected, strict=True):
        torch.testing.assert_close(value, other)


@torch.no_grad()
def test_half_precision_passes_the_check():
    layer, hidden, arguments, _ = last_layer_of(build("glm4", PARTLY, "sdpa").bfloat16())
    assert checked(layer, hidden, arguments).key.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", {"attn_logit_softcapping": 1.0, "layer_types": ["full_attention"] * 2}),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2, "num_local_experts": 2, "num_experts_per_tok": 2}),
    ],
)
@torch.no_grad()
def test_further_terms_are_refused(kind, settings):
    """A cap of the scores, and sinks that take a share of the attention."""
    layer, hidden, arguments, _ = last_layer_of(build(kind, settings))
    with pytest.raises(UserError, match="more than a softmax of queries and keys: choose a method that does not look"):
        checked(layer, hidden, arguments)


@torch.no_grad()
def test_another_mask_is_refused():
    """Layers may choose fewer tokens than the mask allows."""
    layer, hidden, arguments, _ = last_layer_of(build("glm4", PARTLY))
    record = recorded(layer, hidden, arguments)
    record.mask = record.mask.clone()
    record.mask[..., 3:6] = torch.finfo(record.mask.dtype).min
    with pytest.raises(UserError, match="more than a softmax of queries and keys"):
        confirm.check_llm_attention(layer, record, arguments["attention_mask"])


@torch.no_grad()
def test_layers_without_attention_are_refused():
    model = build("lfm2", {"layer_types": ["full_attention", "conv"], "block_multiple_of": 8})
    layer, hidden, arguments, _ = last_layer_of(model)
    with pytest.raises(UserError, match="Lfm2DecoderLayer is of a kind whose queries and keys are not known"):
        recorded(layer, hidden, arguments)
