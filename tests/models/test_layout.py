"""Layouts: token numbers pushed through a model's own packing, and what of each view the LLM sees."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

from vlmzip import Grid
from vlmzip.models.layout import Layout, layout_of

VIEW = Grid(1, 6, 6)


@pytest.fixture(scope="module")
def llava_next():
    """The smallest thing that packs: 6 x 6 tokens a view, and images of one to four tiles."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=100, pad_token_id=0
    )
    pinpoints = [[48, 96], [96, 48], [96, 96], [48, 144]]
    return LlavaNextModel(
        LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=99, image_grid_pinpoints=pinpoints)
    ).eval()


@pytest.mark.parametrize("size", [(48, 96), (96, 48), (96, 96), (40, 100), (100, 37), (60, 31), (30, 110), (7, 90)])
@torch.no_grad()
def test_features_gathered_by_a_layout_are_the_models_own(llava_next, size):
    def pack(features, newline):
        packed, _ = llava_next.pack_image_features([features], [list(size)], "default", image_newline=newline)
        return packed[0]

    views = image_size_to_num_patches(list(size), llava_next.config.image_grid_pinpoints, 48)
    features = torch.randn(views, VIEW.size, 8)
    layout = layout_of((VIEW,) * views, lambda numbers: pack(numbers, torch.tensor([-1.0])), prefix=1)
    flat = torch.cat([torch.cat([torch.full((1, 8), torch.nan), view]) for view in features])
    gathered = torch.where((layout.slots < 0)[:, None], llava_next.image_newline, flat[layout.slots.clamp(min=0)])
    assert torch.equal(gathered, pack(features, llava_next.image_newline))


def test_one_view_has_a_placeholder_for_each_token_that_passes():
    assert Layout.of_one_view(Grid(1, 2, 2), prefix=1).slots.tolist() == [1, 2, 3, 4]
    assert Layout.of_one_view(Grid(1, 2, 2), prefix=1, passes_prefix=True).slots.tolist() == [0, 1, 2, 3, 4]


def tiled():
    """A base of 2 x 2 and two tiles side by side, each with CLS; the last row of the tiles is padding.

    Tokens: 0 CLS, 1 2 / 3 4; 5 CLS, 6 7 / 8 9; 10 CLS, 11 12 / 13 14.
    """
    return Layout((Grid(1, 2, 2),) * 3, torch.tensor([1, 2, 3, 4, 6, 7, 11, 12, -1]), prefix=1)


def test_tokens_and_separators_have_places():
    layout = tiled()
    assert (layout.placeholders, layout.tokens, layout.separators, layout.size) == (9, 15, 1, 12)
    #                                 CLS         CLS   ...   padding CLS         padding, newline
    assert layout.places.tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 4, 4, 6, 6, 7, 6, 6, 8]
    assert layout.numbers.tolist() == [1, 2, 3, 4, 6, 7, 11, 12, 15]
    assert not layout.is_seen_whole
    assert not layout.passes_prefix


def test_what_the_llm_does_not_see_can_be_cut_off():
    seen, windows = tiled().unpadded()
    assert seen.views == (Grid(1, 2, 2), Grid(1, 1, 2), Grid(1, 1, 2))
    assert seen.slots.tolist() == [1, 2, 3, 4, 6, 7, 9, 10, -1]
    assert seen.is_seen_whole
    assert [(window.rows, window.cols) for window in windows] == [((0, 2), (0, 2)), ((0, 1), (0, 2)), ((0, 1), (0, 2))]
    assert windows[1].tokens(Grid(1, 2, 2), prefix=1).tolist() == [0, 1, 2]
    assert seen.as_seen.slots.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1]
    assert seen.as_seen.prefix == 0
    assert seen.placeholders_of(2).tolist() == [6, 7]


def test_views_that_are_padding_as_a_whole_are_left_out():
    seen, windows = Layout((Grid(1, 1, 2),) * 3, torch.tensor([0, 1, 4, 5])).unpadded()
    assert seen.views == (Grid(1, 1, 2),) * 2
    assert seen.slots.tolist() == [0, 1, 2, 3]
    assert windows[1] is None


def test_views_of_which_the_llm_sees_no_rectangle_are_an_error():
    with pytest.raises(ValueError, match="do not form a rectangle"):
        Layout((Grid(1, 2, 2),), torch.tensor([0, 1, 2])).unpadded()


def test_views_of_different_size_are_not_packed():
    with pytest.raises(ValueError, match="equal size"):
        layout_of((Grid(1, 2, 2), Grid(1, 1, 2)), lambda numbers: numbers[:, 0])


def test_images_of_equal_grid_share_a_layout():
    wide, tall = Grid(1, 2, 3), Grid(1, 3, 2)
    first, second, third = Layout.of_single_views([wide, tall, wide])
    assert first is third
    assert first.views == (wide,)
    assert second.views == (tall,)
