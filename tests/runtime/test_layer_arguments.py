"""The arguments of decoder layers after tokens were dropped, in the forms that LLMs of transformers give them."""

import copy

import pytest
import torch
from transformers import Qwen3_5TextConfig

from tests.families import FAMILIES
from vlmzip import UserError, attach
from vlmzip.runtime.in_llm.cut import LayerCut

HERE = torch.tensor([[0, 2, 5], [-1, 1, 3]])
"""The remaining columns of two rows of six tokens; -1 is padding."""
KEPT = HERE.clamp(min=0)
TABLE = torch.arange(2 * 6 * 4).view(2, 6, 4).float()
IDS = torch.arange(12).view(2, 6)


class Layer(torch.nn.Module):
    def forward(self, hidden_states, position_embeddings, **arguments): ...


class LayerWithNumbers(torch.nn.Module):
    def forward(self, hidden_states, position_ids, **arguments): ...


def shortened(layer=Layer, **arguments):
    arguments = {"attention_mask": None, "position_embeddings": (TABLE, -TABLE), **arguments}
    cut = LayerCut([], HERE, HERE, HERE, [], padded=False)
    cut.shorten(layer, arguments, length=6, past=0, flash=False)
    return arguments


def chosen(values):
    return torch.stack([row[index] for row, index in zip(values, KEPT, strict=True)])


@pytest.mark.parametrize("axes", [(), (3,), (4,)])
def test_position_ids_may_have_axes(axes):
    ids = IDS + 100 * torch.arange(3 if not axes else axes[0]).view(-1, 1, 1) if axes else IDS
    short = shortened(position_ids=ids)["position_ids"]
    expected = torch.stack([chosen(each) for each in ids]) if axes else chosen(ids)
    assert torch.equal(short, expected)


def test_one_row_of_positions_is_for_all_rows():
    short = shortened(position_ids=IDS[:1], position_embeddings=(TABLE[:1], -TABLE[:1]))
    assert torch.equal(short["position_ids"], KEPT)
    assert torch.equal(short["position_embeddings"][1], -TABLE[0][KEPT])


def test_position_ids_may_be_absent():
    short = shortened()
    assert "position_ids" not in short
    assert torch.equal(short["position_embeddings"][0], chosen(TABLE))


def test_tables_may_be_absent_or_one_tensor():
    assert shortened(position_ids=IDS, position_embeddings=None)["position_embeddings"] is None
    assert torch.equal(shortened(position_embeddings=TABLE)["position_embeddings"], chosen(TABLE))


@pytest.mark.parametrize(
    ("layer", "missing"),
    [(Layer, "position_embeddings"), (LayerWithNumbers, "position_ids"), (torch.nn.Identity, "position_embeddings")],
)
def test_layers_need_the_positions_that_they_take(layer, missing):
    cut = LayerCut([], HERE, HERE, HERE, [], padded=False)
    with pytest.raises(UserError, match=f"a decoder layer was called without {missing}"):
        cut.shorten(layer, {"attention_mask": None}, length=6, past=0, flash=False)


def test_values_for_each_token_are_shortened_and_others_stay():
    other = torch.zeros(2, 5)
    short = shortened(kinds=IDS, other=other, streams=None)
    assert torch.equal(short["kinds"], chosen(IDS))
    assert short["other"] is other


def test_unknown_values_for_each_token_are_refused():
    with pytest.raises(UserError, match="layers of this LLM get prev_topk_indices for each token in a form that"):
        shortened(prev_topk_indices=torch.zeros(2, 6, 6))


@pytest.fixture
def model(request):
    return copy.deepcopy(FAMILIES["llava"]().model)


@pytest.mark.parametrize("method", ["fastv(keep=4)", "random_tokens(keep=4, site=in_llm, layer=2)"])
def test_layers_that_carry_a_state_are_refused(model, method):
    """Dropping a token changes what such a layer carries to later tokens. Masking it would not."""
    model.config.text_config.layer_types = Qwen3_5TextConfig(num_hidden_layers=4).layer_types
    with pytest.raises(UserError, match=r"layers of kind 'linear_attention', .* choose a site before the LLM"):
        attach(model, method)


def test_llms_without_embeddings_are_refused(model):
    """Chameleon's decoder takes token ids and pixels."""
    inputs = FAMILIES["llava"]().batch([1, "image", 4])
    with attach(model, "fastv(keep=4)") as compressed:
        model.model.language_model.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, {**kwargs, "inputs_embeds": None}), with_kwargs=True, prepend=True
        )
        with pytest.raises(UserError, match="puts images into the prompt"):
            compressed(**inputs)


def test_several_states_for_each_token_are_refused(model):
    inputs = FAMILIES["llava"]().batch([1, "image", 4])
    layer = model.model.language_model.layers[1]
    with attach(model, "random_tokens(keep=4, site=in_llm, layer=2)") as compressed:
        layer.register_forward_hook(lambda _module, _args, output: output[:, :, None].expand(-1, -1, 4, -1))
        with pytest.raises(UserError, match="pass several hidden states for each token"):
            compressed(**inputs)
