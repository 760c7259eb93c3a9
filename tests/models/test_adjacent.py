"""Images and videos that follow one another without a token between them."""

import pytest
import torch

import vlmzip
from tests.models.test_video import WITH_VIDEO
from tests.tiny import IMAGE_TOKEN

ROWS = (
    [5, "video", "video", 6, 7],
    [5, "image", "image", "video", "video", 4, 5],
    ["image", "video", 4, "image", "image", 9],
    [4, 5, 6],
)
SPECS = ("no_compression", "visionzip(keep_per_view=3)", "kmeans(keep_per_view=2,positions=contiguous)")
#: Qwen's models count positions by runs of placeholders, which hold several images here.
COUNTS_RUNS = [name for name, family in WITH_VIDEO.items() if family.position_axes]


def alone(family, row):
    before = [part for parts in ROWS[:row] for part in parts]
    return family.batch(ROWS[row], first_image=before.count("image"), first_video=before.count("video"))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", WITH_VIDEO)
@torch.no_grad()
def test_a_batch_equals_its_rows_alone_with_and_without_a_cache(name, spec):
    family = WITH_VIDEO[name]()
    inputs, arguments = family.batch(*ROWS), dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with vlmzip.attach(family.model, spec) as small:
        together = small(**inputs).logits
        assert len(small.report.images) == 10
        for row in range(len(ROWS)):
            logits = small(**alone(family, row)).logits
            torch.testing.assert_close(together[row, -1], logits[0, -1], atol=1e-4, rtol=1e-4)
        cached = small.generate(**inputs, **arguments)
        assert torch.equal(cached, small.generate(**inputs, **arguments, use_cache=False))


@pytest.mark.parametrize("name", COUNTS_RUNS)
def test_positions_of_images(name):
    """A text token takes one position. An image takes as many as its longer side, and the next token follows them."""
    family = WITH_VIDEO[name]()
    inputs = family.batch([5, "image", "image", 6, 7], [4, "image", "image", "image", 5])
    positions = vlmzip.compress_inputs(family.model, inputs, "no_compression")["position_ids"]
    image = 0
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        expected, following, column = [], 0, 0
        ids = ids[inputs["attention_mask"][row].argmax() :]
        while column < len(ids):
            rows, cols = family.grid(image) if ids[column] == IMAGE_TOKEN else (1, 1)
            expected += [(following, following + r, following + c) for r in range(rows) for c in range(cols)]
            following, column = following + max(rows, cols), column + rows * cols
            image += ids[column - 1] == IMAGE_TOKEN
        assert positions[:, row, -len(ids) :].T.tolist() == [list(axes) for axes in expected]


@pytest.mark.parametrize("name", COUNTS_RUNS)
def test_positions_of_videos_are_those_with_a_token_between_them_less_one(name):
    family = WITH_VIDEO[name]()

    def positions(*row):
        return vlmzip.compress_inputs(family.model, family.batch([*row]), "no_compression")["position_ids"][:, 0]

    apart, together = positions(5, "video", 7, "video", 6), positions(5, "video", "video", 6)
    first = 1 + len(family.video_ids(0))
    assert torch.equal(together[:, :first], apart[:, :first])
    assert torch.equal(together[:, first:], apart[:, first + 1 :] - 1)
