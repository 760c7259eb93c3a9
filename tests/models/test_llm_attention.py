"""Queries and keys of decoder layers of several kinds, against the attention that the model itself computes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Phi3Config, Phi3Model, Qwen3Config, Qwen3Model
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Model

from vlmzip import UserError
from vlmzip.models.llm_attention import queries_and_keys
from vlmzip.models.recording import attention_rows

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50, pad_token_id=0, attn_implementation="eager",
)  # fmt: skip
KINDS = {
    "separate": lambda: LlamaModel(LlamaConfig(**SIZES)),
    "separate, normed": lambda: Qwen3Model(Qwen3Config(**SIZES, head_dim=8)),
    "fused": lambda: Phi3Model(Phi3Config(**SIZES)),
    "fused, partly rotated": lambda: Phi3Model(
        Phi3Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    ),
}


def seen_by_a_layer(model, ids):
    seen = {}
    handle = model.layers[1].register_forward_pre_hook(
        lambda _module, args, kwargs: seen.update(kwargs, hidden_states=args[0]), with_kwargs=True
    )
    out = model(ids, output_attentions=True)
    handle.remove()
    return seen, out.attentions[1].mean(1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_are_those_of_the_model(kind):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.4)
    ids = torch.randint(3, 50, (2, 9))
    seen, expected = seen_by_a_layer(model, ids)
    rows = torch.tensor([[2, 8], [5, 7]])
    query, key = queries_and_keys(model.layers[1], seen["hidden_states"], seen["position_embeddings"], rows)
    allowed = torch.arange(9) <= rows[..., None]
    got = attention_rows(query, key, allowed, model.layers[1].self_attn.scaling)
    torch.testing.assert_close(got, torch.stack([expected[n, row] for n, row in enumerate(rows)]), atol=1e-5, rtol=1e-5)
    assert got.max() > 0.3, "else constants would be compared"


def test_unknown_kinds_are_refused():
    model = DeepseekV2Model(
        DeepseekV2Config(**{**SIZES, "num_key_value_heads": 4}, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8,
                         qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=2)
    )  # fmt: skip
    hidden = torch.zeros(1, 3, 32)
    with pytest.raises(UserError, match="attention of DeepseekV2Attention is of a kind whose queries and keys are not"):
        queries_and_keys(model.layers[0], hidden, (hidden[..., :8], hidden[..., :8]), torch.tensor([[2]]))
