import pytest
import torch

from tests.references.visionzip import visionzip as naive
from vlmzip import FastV, Grid, UserError, VisionZip, VisualTokens, catalogue


def tokens_of(batch=3, rows=6, cols=6, dim=20, key_dim=8, prefix=1, seed=0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    count = rows * cols + prefix
    attention = torch.rand(batch, count, generator=generator)
    return VisualTokens(
        torch.randn(batch, count, dim, generator=generator),
        Grid(1, rows, cols),
        prefix=prefix,
        cls_attention=attention / attention.sum(1, keepdim=True),
        keys=torch.randn(batch, count, key_dim, generator=generator),
    )


@pytest.mark.parametrize("merge", ["reference", "mean"])
@pytest.mark.parametrize(
    ("rows", "cols", "dominant", "contextual"),
    [
        (24, 24, 54, 10),
        (6, 6, 5, 3),
        (6, 6, 1, 4),
        (6, 6, 8, 0),
        (5, 7, 20, 12),
        (4, 4, 8, 7),
        (3, 9, 2, 1),
        (6, 6, 17, 18),
    ],
)
def test_equals_the_naive_loop(rows, cols, dominant, contextual, merge):
    tokens = tokens_of(rows=rows, cols=cols, seed=rows * cols)
    method = VisionZip(dominant=dominant, contextual=contextual, merge=merge)
    token_map = method(tokens)
    token_map.check()
    out = token_map.apply(tokens.features)
    for row in range(3):
        expected = naive(
            tokens.features[row], tokens.cls_attention[row][None], tokens.keys[row], dominant, contextual, merge
        )
        torch.testing.assert_close(out[row], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("keep", "split"), [(64, (54, 10)), (128, (108, 20)), (192, (162, 30)), (None, (54, 10)), (17, (14, 3))]
)
def test_the_papers_splits(keep, split):
    assert VisionZip(keep=keep).split(576) == split


def test_reference_merge_has_about_twice_the_norm():
    tokens = tokens_of()
    by_code = VisionZip(keep=8, merge="reference")(tokens).apply(tokens.features)[:, 7:]
    by_paper = VisionZip(keep=8, merge="mean")(tokens).apply(tokens.features)[:, 7:]
    assert by_code.norm() > 1.4 * by_paper.norm()


def test_cls_comes_first_and_dominants_in_raster_order():
    tokens = tokens_of()
    anchors = VisionZip(dominant=6, contextual=3)(tokens).anchor_index()
    assert (anchors[:, 0] == 0).all()
    assert (anchors[:, :6].diff(dim=1) > 0).all()


def test_without_cls_the_count_is_kept():
    tokens = tokens_of(prefix=0)
    assert VisionZip(keep=10)(tokens).lengths == [10, 10, 10]


@pytest.mark.parametrize(("dominant", "contextual"), [(5, 3), (1, 4), (9, 0), (17, 18)])
def test_without_cls_it_equals_the_naive_loop(dominant, contextual):
    tokens = tokens_of(prefix=0)
    out = VisionZip(dominant=dominant, contextual=contextual)(tokens).apply(tokens.features)
    for row in range(3):
        received, keys = tokens.cls_attention[row][None], tokens.keys[row]
        expected = naive(tokens.features[row], received, keys, dominant, contextual, "reference", cls=0)
        torch.testing.assert_close(out[row], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("keep", [16, 36])
def test_equals_the_naive_loop_on_mini(mini_tokens, keep):
    out = VisionZip(keep=keep)(mini_tokens).apply(mini_tokens.features)
    for row, features in enumerate(mini_tokens.features):
        attention, keys = mini_tokens.cls_attention[row][None], mini_tokens.keys[row]
        expected = naive(features, attention, keys, *VisionZip(keep=keep).split(144), "reference")
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)


def test_no_dominant_tokens_leaves_cls_out():
    tokens = tokens_of()
    token_map = VisionZip(dominant=0, contextual=4)(tokens)
    assert token_map.lengths == [4, 4, 4]
    assert (token_map.group[:, 0] == -1).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"keep": 8, "dominant": 4, "contextual": 1},
        {"dominant": 4},
        {"contextual": 3},
        {"dominant": -1, "contextual": 4},
        {"dominant": 0, "contextual": 0},
        {"dominant": "2.5", "contextual": 1},
        {"merge": "median"},
        {"positions": "nowhere"},
        {"site": "in_llm"},
        {"keep": "abc"},
    ],
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(UserError):
        catalogue.make(VisionZip, fields)


@pytest.mark.parametrize("method", [VisionZip(dominant=9, contextual=0), FastV(keep=8)], ids=lambda m: m.name())
def test_of_equally_attended_tokens_the_first_stay(method):
    attention = torch.arange(37).div(12, rounding_mode="floor").float().expand(2, -1)
    tokens = tokens_of(2).replace(cls_attention=attention, text_attention=attention[:, None])
    kept = (method(tokens).group[0] >= 0).nonzero()[:, 0].tolist()
    best = [*range(24, 31), 36]
    assert kept == ([0, *best] if method.name() == "visionzip" else best)


def test_memory_has_no_square_of_the_tokens():
    """The largest tensor must be about targets x rest. At 9,216 tokens, a square matrix of floats would be 340 MB."""
    tokens = tokens_of(batch=1, rows=96, cols=96, dim=4, key_dim=4)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Watch():
        VisionZip(dominant=54, contextual=10)(tokens)
    assert max(sizes) <= 10 * 9216
