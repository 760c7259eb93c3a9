"""ToMe's matching and its counts against naive loops. tests/models/test_merging.py runs it inside encoders."""

from itertools import pairwise

import pytest
import torch

from tests.references.tome import in_rounds
from vlmzip import Chain, FastV, Grid, KMeans, Pool2d, QFormer, Site, ToMe, UserError, VisionZip, VisualTokens


def keys_of(tokens, batch=3, dim=12, copies=0.0, seed=0):
    """Return keys, a share of which are copies of another token's key."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, tokens, dim, generator=generator) + 0.5
    source = torch.randint(tokens, (batch, tokens), generator=generator)
    is_copy = torch.rand(batch, tokens, generator=generator) < copies
    source = torch.where(is_copy, source, torch.arange(tokens))
    return keys.gather(1, source[..., None].expand_as(keys))


def lists(group):
    """Return the members of each group of one row."""
    return [sorted((group == number).nonzero()[:, 0].tolist()) for number in range(int(group.max()) + 1)]


@pytest.mark.parametrize("alone", [0, 1, 4, 5])
@pytest.mark.parametrize("copies", [0.0, 0.6])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 25])
def test_the_matching_equals_the_naive_loop_at_every_budget(size, copies, alone):
    keys = keys_of(alone + size, copies=copies, seed=size)
    sizes = torch.randint(1, 4, keys.shape[:2], generator=torch.Generator().manual_seed(1)).float()
    for count in range(1, size + 1):
        group = ToMe().join(keys, sizes, alone, count)
        for row, weights, found in zip(keys.tolist(), sizes.tolist(), group, strict=True):
            assert lists(found) == [sorted(g) for g in in_rounds(row, weights, alone, count)]


@pytest.mark.parametrize("keep", [64, 128, 192])
def test_the_published_counts(keep):
    grid = Grid(1, 24, 24)
    assert ToMe(keep=keep).token_count(grid) == keep
    keys = keys_of(576, batch=1, dim=4)
    token_map = ToMe(keep=keep, site=Site.PRE_PROJECTOR)(VisualTokens(keys, grid, keys=keys))
    token_map.check()
    assert token_map.lengths == [keep]
    if keep == 192:  # the loops take seconds
        expected = sorted(map(sorted, in_rounds(keys[0].tolist(), [1] * 576, 0, keep)))
        assert sorted(lists(token_map.group[0])) == expected


def test_of_equal_tokens_the_first_join_the_first():
    keys = torch.randn(1, 1, 40).expand(2, 9, 40)
    # CLS is at place 0, so the first set is 2, 4, 6, 8: its first two join place 1, the first of the second set.
    for row in ToMe().join(keys, torch.ones(2, 9), 1, 6):
        assert lists(row) == [[0], [6], [8], [1, 2, 4], [3], [5], [7]]


def test_behind_the_encoder_tokens_are_means_in_raster_order():
    keys, features = keys_of(16, dim=8), torch.randn(3, 17, 5)
    tokens = VisualTokens(features, Grid(1, 4, 4), 1, keys=torch.cat([torch.randn(3, 1, 8), keys], 1))
    token_map = ToMe(keep=5, site=Site.PRE_PROJECTOR)(tokens)
    token_map.check()
    assert (token_map.anchor_index().diff() > 0).all()
    out = token_map.apply(features)
    for row in range(3):
        groups = [sorted(1 + n for n in g) for g in in_rounds(keys[row].tolist(), [1] * 16, 0, 5)]
        groups.sort(key=lambda g: g[(len(g) - 1) // 2])
        expected = torch.stack([features[row, g].mean(0) for g in groups])
        torch.testing.assert_close(out[row], expected)


class TestCountsByLayer:
    def test_64_of_576_merge_23_in_each_layer_and_the_last_takes_the_rest(self):
        assert ToMe().counts_by_layer(576, 64, 23) == [576 - 23 * n for n in range(1, 23)] + [64]

    @pytest.mark.parametrize("size", [2, 9, 36, 144, 577])
    @pytest.mark.parametrize("layers", [1, 2, 5, 23])
    def test_a_layer_merges_as_many_as_the_others_and_at_most_half(self, size, layers):
        for left in range(1, size):
            counts = [size, *ToMe().counts_by_layer(size, left, layers)]
            assert len(counts) == layers + 1
            assert counts[-1] == left
            merged = [before - after for before, after in pairwise(counts)]
            half = [before // 2 for before in counts[:-1]]
            within = all(r <= h for r, h in zip(merged, half, strict=True))
            if not within:  # half of every layer is not enough: only the last layer merges more
                assert merged[:-1] == half[:-1]
                assert merged[-1] > half[-1]
                continue
            most = merged[0]
            assert merged == [min(most, h, n - left) for h, n in zip(half, counts, strict=False)]
            # One less in each layer would not be enough.
            now = size
            for _ in range(layers):
                now -= min(most - 1, now // 2)
            assert now > left


@pytest.mark.parametrize(
    "stages",
    [(ToMe(), VisionZip()), (KMeans(), ToMe()), (ToMe(), QFormer()), (ToMe(), ToMe(keep=4))],
)
def test_chains_that_would_need_signals_of_an_encoder_that_merged_are_refused(stages):
    with pytest.raises(UserError, match=r"choose methods with site=post_projector or|must come first|different site"):
        Chain(compressors=stages)


def test_a_chain_goes_on_behind_the_projector_and_inside_the_llm():
    chain = Chain(compressors=(FastV(layer=2), Pool2d(site=Site.POST_PROJECTOR), ToMe(keep=12)))
    assert [stage.name() for stage in chain.stages()] == ["tome", "pool2d", "fastv"]
    assert Chain(compressors=(ToMe(keep=12), FastV(keep=4, layer=2))).token_count(Grid(1, 6, 6)) == 12


def test_it_acts_inside_the_encoder_unless_told_otherwise():
    assert ToMe().site is Site.ENCODER
