"""Queries and keys of vision encoders with attention of several kinds, against those that the models compare."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.exaone4_5.modeling_exaone4_5 import Exaone4_5_VisionConfig, Exaone4_5_VisionModel
from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrVisionConfig, GlmOcrVisionModel
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLVisionConfig, MiniMaxM3VLVisionModel

from vlmzip.models.recording import record
from vlmzip.models.towers import tower_of

PATCHES = dict(hidden_size=32, intermediate_size=64, num_heads=4, depth=2, patch_size=4, out_hidden_size=32)
ENCODERS = {
    "fused, normed by head": lambda: GlmOcrVisionModel(GlmOcrVisionConfig(**PATCHES)),
    "fused, heads share keys": lambda: Exaone4_5_VisionModel(Exaone4_5_VisionConfig(**PATCHES, num_key_value_heads=2)),
    "partly rotated": lambda: MiniMaxM3VLVisionModel(
        MiniMaxM3VLVisionConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2,
                                patch_size=4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_queries_and_keys_are_those_that_the_model_compares(kind):
    torch.manual_seed(0)
    encoder = ENCODERS[kind]().eval()
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
    seen = []

    def catch(_module, query, key, value, *_mask, **_arguments):
        shared = query.shape[1] // key.shape[1]
        seen.append([states.transpose(1, 2).flatten(2) for states in (query, key.repeat_interleave(shared, 1))])
        return query.transpose(1, 2), None

    AttentionInterface.register("catching_towers", catch)
    encoder.set_attn_implementation("catching_towers")
    tower = tower_of(encoder)
    patches = torch.randn(16, 3 * encoder.config.temporal_patch_size * 4 * 4)
    with record(*tower.modules([1])) as recording:
        encoder(patches, grid_thw=torch.tensor([[1, 4, 4]]))
    query, key = tower.queries_and_keys(recording, 1)
    torch.testing.assert_close(query, seen[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(key, seen[1][1], atol=1e-5, rtol=1e-5)
