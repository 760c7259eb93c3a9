"""With original positions, tokens stand in the order of their anchors: the causal mask sees the order of the row."""

import dataclasses

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

from tests.families import FAMILIES
from tests.families.qwen2_5_vl import window_order
from tests.references.kmeans import kmeans
from tests.references.visionzip import visionzip_in_place
from tests.runtime.ragged import Ragged
from tests.tiny import IMAGE_TOKEN, skip_without
from vlmzip import Chain, FastV, KMeans, Resampler, Site, VisionZip, attach, available, compress_inputs
from vlmzip.compressor import Calibratable, Compressor, Profile
from vlmzip.models import family_of
from vlmzip.runtime.prompt import shorten
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Signal

ROWS = ([1, "image", 5, 6, 7], [1, "image", 4, "image", 5], [1, 2, 3, 4], ["image", 8])
PROFILE = Profile(Grid(1, 6, 6), layers=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backwards(Compressor):
    """Keeps every second token, the last one first."""

    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)

    def assign(self, tokens):
        batch, count, _ = tokens.features.shape
        kept = torch.arange(count).expand(batch, count) % 2 == 0
        group = torch.where(kept, kept.flip(1).cumsum(1).flip(1) - 1, -1)
        return TokenMap(group, kept.float(), kept, kept.sum(1))


THREE_STAGES = Chain(compressors=(VisionZip(keep=12), KMeans(keep=5, site=Site.POST_PROJECTOR), FastV(keep=3, layer=2)))


def every_method():
    """Yield every method at each of its sites, some that leave tokens in another order, and chains."""
    for name, cls in available().items():
        if cls is Chain or issubclass(cls, Resampler):  # a resampler's tokens have no places in the image
            continue
        usual = cls().placed(PROFILE)
        fields = {cls.threshold: 100.0} if isinstance(usual, Calibratable) else {}
        fields |= {"keep": 7} if "keep" in cls.field_names() else {}
        for site in cls.sites:
            yield pytest.param(dataclasses.replace(usual, site=site, **fields), id=f"{name}-{site}")
    for method in (Backwards(), Backwards(site=Site.POST_PROJECTOR), Ragged()):
        yield pytest.param(method, id=f"{type(method).__name__}-{method.site}")
    for stages in (
        (VisionZip(keep=12), FastV(keep=0.5, layer=2)),
        THREE_STAGES.compressors,
        (Backwards(), Backwards(site=Site.POST_PROJECTOR)),
    ):
        yield pytest.param(Chain(compressors=stages), id="+".join(stage.name() for stage in stages))


def seen_by_the_llm(family, method, inputs):
    """Return the report of a forward, and the positions and embeddings that entered the LLM."""
    seen: dict = {}
    llm = family_of(family.model).llm
    handle = llm.register_forward_pre_hook(lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        with torch.no_grad(), attach(family.model, method) as compressed:
            compressed(**inputs)
    finally:
        handle.remove()
    return compressed.report, seen["position_ids"], seen["inputs_embeds"]


def ascends(positions):
    """Return whether positions, on one axis or on several, never go back."""
    axes = positions.reshape(-1, positions.shape[-1]).T.tolist()
    return axes == sorted(axes)


@pytest.mark.crossed(method=[Backwards(), Ragged(), THREE_STAGES])
@pytest.mark.parametrize("method", list(every_method()))
def test_positions_ascend_in_every_row(family, method):
    skip_without(family, method.site)
    if method.drops_patches and not family_of(family.model).encodes_parts:
        pytest.skip(f"the encoder of {family.name} takes whole images")
    if Signal.PROJECTOR in method.needs and family_of(family.model).projects_each_token is False:
        pytest.skip(f"the projector of {family.name} joins patches into tokens")
    method = dataclasses.replace(method, positions="original")
    report, positions, _ = seen_by_the_llm(family, method, family.batch(*ROWS, pad="left"))
    for source in report.source:
        assert ascends(source[source >= 0])  # CLS and the first patch have the same place
    if not any(stage.site is Site.IN_LLM for stage in method.stages()):
        for row, source in enumerate(report.source):
            assert ascends(positions[..., row, :][..., source >= 0])
    for image in report.images:
        anchors = image.token_map.anchor_index()[0]
        order = list(zip(image.layout.places[anchors].tolist(), anchors.tolist(), strict=True))
        assert order == sorted(set(order))
        assert image.token_map.lengths == [image.by_layer[-1]]


@pytest.mark.parametrize("method", [VisionZip(keep=8), KMeans(keep=8), Backwards()], ids=lambda method: method.name())
def test_the_report_describes_what_the_llm_got(family, method):
    """The map, applied to the features before it, gives the tokens in the order in which they entered the LLM."""
    method = dataclasses.replace(method, positions="original")
    inputs = family.batch(*ROWS, pad="right")
    report, _, entered = seen_by_the_llm(family, method, inputs)
    model_family = family_of(family.model)
    at = dict.fromkeys(range(len(ROWS)), 0)
    is_visual = [
        (source >= 0) & (ids[source] == IMAGE_TOKEN)
        for source, ids in zip(report.source, inputs["input_ids"], strict=True)
    ]
    for image in report.images:
        columns = is_visual[image.row].nonzero()[at[image.row] :][: image.after, 0]
        at[image.row] += image.after
        out = model_family.project(image.token_map.apply(image.features[None])[0], Site.PRE_PROJECTOR)
        scale = (entered[image.row, columns] / out).median()  # Gemma's embeddings are scaled
        torch.testing.assert_close(entered[image.row, columns], out * scale, atol=1e-4, rtol=1e-4)


def test_positions_that_are_given_ascend_too(family):
    inputs = family.batch(*ROWS)
    counted = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs["position_ids"] = counted.expand(*family_of(family.model).position_axes, -1, -1)
    compressed = compress_inputs(family.model, inputs, VisionZip(keep=8, positions="contiguous"))
    for row, source in enumerate(compressed.report.source):
        assert ascends(compressed["position_ids"][..., row, :][..., source >= 0])


def test_positions_ascend_over_several_turns(family):
    """`generate` fills a cache with two images, one in each turn; the second turn's prompt holds both."""
    method, cache = VisionZip(keep=8, positions="original"), DynamicCache()
    first, second = [1, "image", 5], [6, "image", 7]
    with attach(family.model, method) as compressed:
        inputs = family.batch(first)
        said = compressed.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
        new = family.batch(second, first_image=1)
        new["input_ids"] = torch.cat([said, new["input_ids"]], 1)
        new["attention_mask"] = torch.ones_like(new["input_ids"])
        for name in ("mm_token_type_ids", "token_type_ids"):
            new.pop(name, None)
        compressed.generate(**new, past_key_values=cache, max_new_tokens=3, do_sample=False)
        seen = compressed._conversations.recall(cache)
    assert ascends(seen.source[0])
    assert ascends(seen.positions[..., 0, :])


def test_contiguous_positions_keep_the_order_of_the_map(llava):
    """VisionZip on LLaVA, as the authors: dominant tokens, then contextual ones."""
    inputs = FAMILIES["llava"]().batch([1, "image", 5])
    report = compress_inputs(llava, inputs, VisionZip(dominant=6, contextual=3)).report
    anchors = report.images[0].token_map.anchor_index()[0]
    assert (anchors[:6].diff() > 0).all()
    assert (anchors[6:].diff() > 0).all()
    assert anchors[6] < anchors[5]


def test_separators_keep_their_places_among_the_placeholders():
    source = shorten(torch.ones(1, 6, dtype=torch.long), [(0, [1, 2, 4])], [[0, 2]], [True])
    assert source.tolist() == [[0, 1, 3, 4, 5]]


# --- Qwen2.5-VL against naive references -------------------------------------------------------------------------


def encoded(model, inputs):
    """What the merger puts out for each image, and the last block's attention and keys by merged token, in raster
    order: caught where the model computes them."""
    seen = []

    def catch(module, query, key, value, attention_mask, scaling, **kwargs):
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        seen.append((module, weights, key))
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("catching", catch)
    model.set_attn_implementation({"vision_config": "catching"})
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    model.set_attn_implementation({"vision_config": "sdpa"})
    last = [(weights, key) for module, weights, key in seen if module is model.model.visual.blocks[-1].attn]
    for own, (weights, key), (_, rows, cols) in zip(features, last, inputs["image_grid_thw"].tolist(), strict=True):
        raster = torch.tensor(window_order(rows // 2, cols // 2)).argsort()
        received = weights[0].mean(0).sum(0).unflatten(0, (-1, 4)).mean(1)
        yield own, received[raster], key[0].mean(0).unflatten(0, (-1, 4)).mean(1)[raster]


def visionzip_rule(features, received, keys):
    return visionzip_in_place(features, received[None], keys, dominant=5, contextual=3)


def kmeans_rule(features, received, keys):
    tokens = {}
    for members in kmeans(features - features.mean(0), 6, 10):
        mean = features[members].mean(0)
        distance = (features[members] - mean).square().sum(-1)
        # Two members are equally far from their mean but for rounding: the first of such is the anchor.
        tokens[members[int((distance <= (1 + 1e-4) * distance.min()).nonzero()[0])]] = mean
    return sorted(tokens), torch.stack([tokens[place] for place in sorted(tokens)])


@pytest.mark.parametrize(
    ("method", "rule"),
    [(VisionZip(dominant=5, contextual=3), visionzip_rule), (KMeans(keep=6), kmeans_rule)],
    ids=["visionzip", "kmeans"],
)
@pytest.mark.parametrize("row", ROWS[:2], ids=["one image", "two images"])
def test_qwen_equals_a_naive_reference(method, rule, row):
    """One row; embeddings of all tokens are written, then those of dropped ones are cut out with their positions."""
    family = FAMILIES["qwen2_5_vl"]()
    inputs = family.batch(row)
    ids = inputs["input_ids"]
    embeddings = family.model.get_input_embeddings()(ids)[0].clone()
    stays = (ids[0] != IMAGE_TOKEN).tolist()
    start = 0
    for features, received, keys in encoded(family.model, inputs):
        start = ids[0].tolist().index(IMAGE_TOKEN, start)
        places, tokens = rule(features, received, keys)
        for place, token in zip(places, tokens, strict=True):
            embeddings[start + place], stays[start + place] = token, True
        start += len(features)
    positions, _ = family.model.model.get_rope_index(ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"])
    left = torch.tensor(stays)
    with torch.no_grad(), attach(family.model, method) as compressed:
        expected = family.model(inputs_embeds=embeddings[None, left], position_ids=positions[:, :, left]).logits
        torch.testing.assert_close(compressed(**inputs).logits, expected, atol=1e-4, rtol=0)
