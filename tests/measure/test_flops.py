import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_llava
from vlmzip.measure.flops import kv_cache_bytes, prefill_flops
from vlmzip.models import adapter_for


@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_flops_are_those_that_torch_counts(tokens):
    # Torch counts matrix products that it sees; eager attention is made of nothing else.
    model = tiny_llava("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), logits_to_keep=1)
    # Some versions make the rotary table by a matrix product of positions and frequencies: no work of the layers.
    by_module = counter.get_flop_counts()
    rotary = sum(
        sum(counts.values()) for name, counts in by_module.items() if name.endswith("language_model.rotary_emb")
    )
    assert prefill_flops(adapter_for(model), tokens) == counter.get_total_flops() - rotary


def test_kv_bytes_are_those_of_the_cache(llava):
    with torch.no_grad():
        cache = llava(input_ids=torch.ones(1, 9, dtype=torch.long)).past_key_values
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_cache_bytes(adapter_for(llava), 9) == size
