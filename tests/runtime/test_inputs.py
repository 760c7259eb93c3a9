import pytest
import torch

from tests.tiny import IMAGE_TOKEN, PAD, batch, prompt
from vlmzip import Pool2d, RandomTokens, UserError, VisionZip, compress_inputs
from vlmzip.runtime.prompt import find_placeholders, shorten

MIXED = (prompt(1, "image", 5, 6, 7), prompt(1, "image", 4, "image", 5), prompt(1, 2, 3, 4))


@pytest.mark.parametrize("pad", ["left", "right"])
def test_text_stays_and_placeholders_shrink(llava, pad):
    inputs = batch(*MIXED, images=3, pad=pad)
    compressed = compress_inputs(llava, inputs, VisionZip(keep=8))
    rows = [
        row[mask.bool()].tolist()
        for row, mask in zip(compressed["input_ids"], compressed["attention_mask"], strict=True)
    ]
    i = IMAGE_TOKEN
    assert rows == [[1, *[i] * 8, 5, 6, 7], [1, *[i] * 8, 4, *[i] * 8, 5], [1, 2, 3, 4]]
    first = compressed["attention_mask"][2]
    assert first.tolist() == ([0] * 15 + [1] * 4 if pad == "left" else [1] * 4 + [0] * 15)
    assert (compressed["input_ids"][compressed["attention_mask"] == 0] == PAD).all()
    assert "pixel_values" not in compressed
    assert [p.row for p in compressed.report.images] == [0, 1, 1]
    assert (compressed.report.before, compressed.report.after) == (108, 24)


def test_every_per_token_input_is_shortened_alike(llava):
    inputs = batch(*MIXED, images=3)
    labels = torch.where(inputs["input_ids"] > 3, inputs["input_ids"], -100).masked_fill(
        inputs["input_ids"] == IMAGE_TOKEN, -100
    )
    inputs |= {"labels": labels, "token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}
    compressed = compress_inputs(llava, inputs, VisionZip(keep=8))
    assert [row[row != -100].tolist() for row in compressed["labels"]] == [[5, 6, 7], [4, 5], [4]]
    assert torch.equal(compressed["token_type_ids"].bool(), compressed["input_ids"] == IMAGE_TOKEN)


@pytest.mark.parametrize("ids", [[1, "image", 5, 100], [1, -3, "image", 5], [1, 2, 3, 100]])
def test_tokens_without_an_embedding_are_refused(llava, ids):
    images = ids.count("image")
    inputs = batch(prompt(*ids), images=images)
    if not images:
        inputs.pop("pixel_values", None)
    with pytest.raises(UserError, match=r"has the token (100|-3), but the model knows tokens 0 to 99: use the model's"):
        compress_inputs(llava, inputs, VisionZip(keep=8))


def test_original_positions_are_those_of_the_anchors(llava):
    inputs = batch(prompt(1, 2, "image", 5), images=1)
    compressed = compress_inputs(llava, inputs, RandomTokens(keep=4, positions="original"))
    kept = compressed.report.images[0].token_map.anchor_index()[0] - 1  # without CLS
    assert compressed["position_ids"][0].tolist() == [0, 1, *(kept + 2).tolist(), 38]


def test_cls_takes_the_position_of_the_first_placeholder(llava):
    compressed = compress_inputs(
        llava, batch(prompt(1, 2, "image", 5), images=1), VisionZip(keep=6, positions="original")
    )
    assert compressed["position_ids"][0, 2] == 2


def test_source_says_where_every_position_came_from(llava):
    inputs = batch(*MIXED, images=3)
    compressed = compress_inputs(llava, inputs, Pool2d(factor=3))
    source = compressed.report.source
    here = source >= 0
    assert torch.equal(inputs["input_ids"].gather(1, source.clamp(min=0))[here], compressed["input_ids"][here])
    assert torch.equal(here, compressed["attention_mask"].bool())


def test_generation_arguments_pass_through_and_the_inputs_stay_untouched(llava):
    inputs = batch(prompt("image", 5), images=1)
    before = {name: value.clone() for name, value in inputs.items()}
    compressed = compress_inputs(llava, {**inputs, "max_new_tokens": 7}, VisionZip(keep=8))
    assert compressed["max_new_tokens"] == 7
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_text_alone_is_left_alone(llava):
    inputs = batch([1, 2, 3])
    assert dict(compress_inputs(llava, inputs, VisionZip(keep=8))) == inputs


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        ([prompt(1, "image")], 2, "36 image placeholders, but its 2 image"),
        ([prompt(1, "image", "image")], 1, "72 image placeholders"),
        ([[1, 2, 3]], 1, "0 image placeholders"),
        ([prompt(1, "image")], 0, "but pixel_values is missing"),
        ([[1, *[IMAGE_TOKEN] * 40], [1, *[IMAGE_TOKEN] * 32]], 2, "row 0 of the prompt ends in the middle"),
        ([[1, IMAGE_TOKEN, 4]], 1, "1 image placeholders"),
    ],
)
def test_placeholders_and_images_must_match(llava, rows, images, message):
    with pytest.raises(UserError, match=message):
        compress_inputs(llava, batch(*rows, images=images), VisionZip(keep=8))


def test_images_without_a_prompt_are_refused(llava):
    with pytest.raises(UserError, match="give input_ids"):
        compress_inputs(llava, {"pixel_values": torch.zeros(1, 3, 48, 48)}, VisionZip(keep=8))


def test_images_side_by_side_are_told_apart():
    ids = torch.tensor([[9, 9, 9, 9, 9], [1, 9, 9, 9, 2]])
    assert find_placeholders(ids, 9, [2, 3, 3]) == [(0, [0, 1]), (0, [2, 3, 4]), (1, [1, 2, 3])]


def test_tokens_between_placeholders_of_one_image_stay():
    """Families that write row separators among the placeholders keep them."""
    source = shorten(torch.ones(1, 6, dtype=torch.long), [(0, [1, 2, 4])], [[2]], [False])
    assert source.tolist() == [[0, 4, 3, 5]]


def test_tokens_between_placeholders_keep_their_place_if_no_token_is_dropped():
    source = shorten(torch.ones(1, 7, dtype=torch.long), [(0, [1, 2, 4, 5])], [[0, 1, 2, 3]], [False])
    assert source.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
