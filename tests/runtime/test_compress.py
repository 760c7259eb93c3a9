"""The pure core: layouts and features in, fewer features out; against naive loops."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from vlmzip import (
    Compressor,
    Grid,
    KMeans,
    NoCompression,
    Pool2d,
    RandomTokens,
    Site,
    TokenMap,
    UserError,
    VisionZip,
    VisualTokens,
)
from vlmzip.models.layout import Encoded, Layout, Views
from vlmzip.runtime.compress import compress, encoded_again

GRID = Grid(1, 2, 2)
#: A base image and two tiles side by side; behind each row of the tiles stands a newline.
TILED = Layout((GRID,) * 3, torch.tensor([0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]))
#: The same, with a CLS in each view, and with the second row of the tiles in the padding.
PADDED = Layout((GRID,) * 3, torch.tensor([1, 2, 3, 4, 6, 7, 11, 12, -1]), prefix=1)


@dataclass(frozen=True, kw_only=True)
class Backwards(Compressor):
    """Keep the last tokens of each view, in reverse."""

    last: int = 2

    def assign(self, tokens):
        batch, count, _ = tokens.features.shape
        kept = TokenMap.keep((torch.arange(count) >= count - self.last).expand(batch, count))
        return kept.rearranged(torch.arange(self.last).flip(0).expand(batch, -1))


class Spread(Compressor):
    """Keep the first two tokens of each view, and add half of the last token to both of them."""

    def assign(self, tokens):
        batch, count, _ = tokens.features.shape
        kept = (torch.arange(count) < 2).expand(batch, count)
        added = torch.zeros(batch, 2, count)
        added[..., -1] = 0.5
        return dataclasses.replace(TokenMap.keep(kept), added=added)


def numbered(layout, hundred):
    """Return the features of each view: each token's number in the image plus 100 times `hundred`."""
    return [
        100.0 * hundred + torch.arange(start, end)[:, None]
        for start, end in zip(layout.starts, layout.starts[1:], strict=False)
    ]


def grouped(layouts, images):
    """Return, as an encoder groups views, the shape, the numbers and the contents of all views of equal shape."""
    groups, number = {}, 0
    for layout, image in zip(layouts, images, strict=True):
        for grid, view in zip(layout.views, image, strict=True):
            numbers, views = groups.setdefault((grid, layout.prefix, layout.passes_prefix), ([], []))
            numbers.append(number)
            views.append(view)
            number += 1
    return [(shape, numbers, views) for shape, (numbers, views) in groups.items()]


def encoded(*layouts, streams=0):
    """Each token's feature is its number in its image plus 100 times the image's; stream s adds 1000 (s + 1)."""
    groups = []
    for (grid, prefix, passed), numbers, views in grouped(layouts, [numbered(x, n) for n, x in enumerate(layouts)]):
        features = torch.stack(views)
        tokens = VisualTokens(features, grid, prefix, passes_prefix=passed)
        groups.append(Views(tokens, numbers, tuple(features + 1000 * (s + 1) for s in range(streams))))
    return Encoded(groups)


@pytest.mark.parametrize("layout", [TILED, PADDED], ids=["tiles", "padding"])
@pytest.mark.parametrize("ascending", [False, True])
def test_without_compression_every_placeholder_gets_its_token(layout, ascending):
    (kept,) = compress([layout], encoded(layout), NoCompression(), ascending=ascending)
    expected = [slot for slot in layout.slots.tolist() if slot >= 0]
    assert kept.features[:, 0].tolist() == expected
    plan = kept.plan
    features = [None if slot < 0 else int(kept.features[slot, 0]) for slot in plan.slots.tolist()]
    assert features == [None if slot < 0 else slot for slot in layout.slots.tolist()]
    assert plan.places == list(range(layout.placeholders))
    assert plan.left is not None
    plan.token_map.check()


@pytest.mark.parametrize("method", [Pool2d(factor=2), KMeans(keep="50%"), RandomTokens(keep=7), Backwards()])
@pytest.mark.parametrize("ascending", [False, True])
def test_the_map_gives_features_and_streams(method, ascending):
    """The one map of an image says of all its tokens what the maps of its views say, and streams follow it."""
    layouts = [TILED, PADDED, TILED]
    for kept in compress(layouts, encoded(*layouts, streams=2), method, ascending=ascending):
        kept.plan.token_map.check()
        before = torch.cat([*kept.seen, torch.zeros(kept.plan.layout.separators, 1)])
        torch.testing.assert_close(kept.plan.token_map.apply(before[None])[0], kept.features)
        for s, stream in enumerate(kept.streams):
            torch.testing.assert_close(kept.plan.token_map.apply(before[None] + 1000 * (s + 1))[0], stream)
        assert kept.plan.left is None
        assert (kept.plan.slots >= 0).all(), "separators go with the first token that goes"
        assert kept.plan.places == sorted(kept.plan.places) or not ascending


def test_padding_is_not_seen_unless_whole_views_are_wanted():
    (kept,) = compress([PADDED], encoded(PADDED), Backwards())
    #                                       base    tiles, whose second row is padding: both rows of tokens are short
    assert sorted(kept.features[:, 0].tolist()) == [3, 4, 6, 7, 11, 12]
    whole = WholeBackwards()
    (kept,) = compress([PADDED], encoded(PADDED), whole)
    assert sorted(kept.features[:, 0].tolist()) == [3, 4, 8, 9, 13, 14]
    assert kept.plan.layout is PADDED


@dataclass(frozen=True, kw_only=True)
class WholeBackwards(Backwards):
    """The same, on views as the encoder gives them."""

    whole_views = True


def test_one_view_keeps_the_order_of_the_map_and_several_that_of_the_placeholders():
    one = Layout.of_one_view(GRID)
    (kept,) = compress([one], encoded(one), Backwards())
    assert kept.features[:, 0].tolist() == [3, 2]
    (kept,) = compress([one], encoded(one), Backwards(), ascending=True)
    assert kept.features[:, 0].tolist() == [2, 3]
    (kept,) = compress([TILED], encoded(TILED), Backwards())
    assert kept.features[:, 0].tolist() == [2, 3, 6, 7, 10, 11]
    assert kept.plan.places == [2, 3, 9, 10, 11, 12]


def test_a_count_is_of_the_image_and_a_fraction_of_each_view():
    layouts = [TILED, Layout.of_one_view(GRID), PADDED]
    assert [len(kept.features) for kept in compress(layouts, encoded(*layouts), RandomTokens(keep=4))] == [4, 4, 4]
    assert [len(kept.features) for kept in compress(layouts, encoded(*layouts), RandomTokens(keep=0.5))] == [6, 2, 4]


def test_a_count_must_reach_for_one_token_of_each_view():
    with pytest.raises(UserError, match="keep=2 is too few for an image of 3 views: give at least 3"):
        compress([TILED], encoded(TILED), RandomTokens(keep=2))


@pytest.mark.parametrize("layout", [TILED, PADDED], ids=["tiles", "padding"])
def test_a_second_compressor_continues_where_nothing_is_gone(layout):
    """Behind the identity a second compressor sees the same views, and its map fits the placeholders left."""
    (once,) = compress([layout], encoded(layout), Pool2d(factor=2))
    (plain,) = compress([layout], encoded(layout), NoCompression())
    left = plain.plan.left
    (twice,) = compress(*encoded_again([plain.features], [plain.streams], [left]), Pool2d(factor=2))
    assert torch.equal(once.features, twice.features)
    assert [plain.plan.places[place] for place in twice.plan.places] == once.plan.places
    both = plain.plan.token_map.then(twice.plan.token_map.of_inputs(left.numbers))
    assert torch.equal(both.group, once.plan.token_map.group)
    assert torch.equal(both.weight, once.plan.token_map.weight)


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("layout", [TILED, PADDED], ids=["tiles", "padding"])
def test_the_map_of_an_image_has_the_weights_that_its_views_added(layout, ascending):
    views = encoded(layout)
    (kept,) = compress([layout], views, Spread(), ascending=ascending)
    tokens = torch.cat([*kept.seen, torch.zeros(kept.plan.layout.separators, 1)])
    out = kept.plan.token_map.apply(tokens[None])[0]
    assert torch.equal(out[kept.plan.slots.argsort()], kept.features)
    assert kept.plan.token_map.added.any()


def test_plans_need_no_features():
    bare = encoded(TILED)
    bare = Encoded([dataclasses.replace(g, tokens=g.tokens.replace(features=g.tokens.features[..., :0]))
                    for g in bare.groups])  # fmt: skip
    (planned,), (kept,) = (compress([TILED], views, Pool2d(factor=2)) for views in (bare, encoded(TILED)))
    assert torch.equal(planned.plan.token_map.group, kept.plan.token_map.group)
    assert planned.plan.places == kept.plan.places


def test_nothing_left_is_an_error():
    @dataclass(frozen=True, kw_only=True)
    class Nothing(Compressor):
        site: Site = Site.PRE_PROJECTOR

        def assign(self, tokens):
            return TokenMap.keep(torch.zeros(tokens.features.shape[:2], dtype=torch.bool))

    with pytest.raises(UserError, match="left no token of an image"):
        compress([TILED], encoded(TILED), Nothing())


@dataclass(frozen=True, kw_only=True)
class AsTheFeaturesSay(Compressor):
    """Keep the last tokens of each view: one for even hundreds in its features, two for odd ones."""

    def assign(self, tokens):
        count = tokens.features.shape[1]
        last = 1 + (tokens.features[:, :1, 0] // 100).long() % 2
        return TokenMap.keep(torch.arange(count) >= count - last)


@pytest.mark.parametrize("method", [AsTheFeaturesSay(), Backwards(), VisionZip(keep=6), NoCompression()])
@pytest.mark.parametrize("ascending", [False, True])
def test_an_image_in_a_batch_is_the_image_alone(method, ascending):
    """Images that are alike are planned together, wherever they stand in the batch."""
    layouts = [TILED, Layout.of_one_view(GRID), TILED, TILED, PADDED, TILED, TILED, PADDED, Layout.of_one_view(GRID)]
    hundreds = [0, 1, 2, 1, 3, 4, 6, 0, 2]  # of the tiled images those at 0, 2, 5 and 6 keep one token of each view
    generator = torch.Generator().manual_seed(0)
    images = [
        [(features, torch.rand(2, len(features), generator=generator)) for features in numbered(layout, hundred)]
        for layout, hundred in zip(layouts, hundreds, strict=True)
    ]
    together = compress(layouts, views_of(layouts, images), method, ascending=ascending)
    for layout, image, kept in zip(layouts, images, together, strict=True):
        (alone,) = compress([layout], views_of([layout], [image]), method, ascending=ascending)
        assert torch.equal(kept.features, alone.features)
        for seen, other in zip(kept.seen, alone.seen, strict=True):
            assert torch.equal(seen, other)
        for name in ("order", "slots"):
            assert torch.equal(getattr(kept.plan, name), getattr(alone.plan, name))
        assert (kept.plan.places, kept.plan.outputs) == (alone.plan.places, alone.plan.outputs)
        for name in ("group", "weight", "anchor", "length"):
            assert torch.equal(getattr(kept.plan.token_map, name), getattr(alone.plan.token_map, name))


def views_of(layouts, images):
    """The views of images, each with its features, scores and keys, batched by grid and prefix."""
    groups = []
    for (grid, prefix, passed), numbers, views in grouped(layouts, images):
        features = torch.stack([features for features, _ in views])
        scores = torch.stack([signals[0] for _, signals in views])
        keys = torch.stack([signals[1:].T for _, signals in views])
        tokens = VisualTokens(features, grid, prefix, passes_prefix=passed, cls_attention=scores, keys=keys)
        groups.append(Views(tokens, numbers))
    return Encoded(groups)


#: Two videos of two and three frames, with a CLS in each frame that the LLM sees.
VIDEOS = [Layout.of_frames(GRID, frames, 1, passes_prefix=True) for frames in (2, 3)]


@dataclass(frozen=True, kw_only=True)
class LastOfClip(Backwards):
    """Keep, in reverse, the last tokens of all frames; it sees whole videos."""

    sees_clip = True


@pytest.mark.parametrize("ascending", [False, True])
def test_the_frames_of_a_video_follow_each_other(ascending):
    short, long = compress(VIDEOS, encoded(*VIDEOS, streams=1), Backwards(), ascending=ascending)
    places = [3, 4, 8, 9, 13, 14] if ascending else [4, 3, 9, 8, 14, 13]
    assert short.features[:, 0].tolist() == places[:4]
    assert long.features[:, 0].tolist() == [100 + n for n in places]
    assert long.streams[0][:, 0].tolist() == [1100 + n for n in places]
    assert long.plan.places == places


@pytest.mark.parametrize("ascending", [False, True])
def test_a_method_that_sees_the_clip_gets_all_frames_as_one_view(ascending):
    """All CLS come first in the view, so the last three tokens lie in the last frame; their places are the prompt's."""
    image = Layout.of_one_view(Grid(1, 2, 3))
    kept = compress([*VIDEOS, image], encoded(*VIDEOS, image, streams=1), LastOfClip(last=5), ascending=ascending)
    # The last token of the frame before, then those of the last frame.
    for video, (frames, hundred) in zip(kept, ((2, 0), (3, 100)), strict=False):
        last = 5 * (frames - 1)
        own = range(last + 1, last + 5) if ascending else range(last + 4, last, -1)
        assert video.plan.layout.views == (Grid(frames, 2, 2),)
        assert video.features[:, 0].tolist() == [hundred + n for n in (last - 1, *own)]
        assert video.streams[0][:, 0].tolist() == [1000 + hundred + n for n in (last - 1, *own)]
        assert video.plan.places == [last - 1, *own]
    assert kept[2].plan.layout is image
