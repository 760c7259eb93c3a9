"""Videos on tiny models: frames are views, beside images, in batches, with a cache and over several turns."""

import inspect

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache

import vlmzip
from tests.families import FAMILIES
from tests.models.test_named_families import masked_logits
from tests.references.visionzip import visionzip
from tests.tiny import VIDEO_TOKEN, wrong_copies
from vlmzip import DFMR, AdaptiveVisionZip, Grid, Site, UserError, VisionZip
from vlmzip.models import family_of

#: Quick runs have `test_no_compression_is_the_plain_model` of all of them, and the other tests of qwen3_vl.
WITH_VIDEO = {name: cls for name, cls in FAMILIES.items() if cls.clips}
#: Quick runs have the first two.
SPECS = (
    "visionzip(keep_per_view=3)",
    "evs(keep=50%)+fastv(layer=2,keep=50%)",
    "no_compression",
    "random_tokens(keep_per_view=3)",
    "kmeans(keep_per_view=2,positions=contiguous)",
    "pool2d(factor=2)",
    "dfmr(tau=0.7)",
    "evs(keep=50%)",
    "vidcom2(keep=50%)+dart(layer=2,keep=50%)",
    "pyramiddrop(layer=1,3)",
    "fastv(layer=2,keep=50%)",
    "fastv(layer=2,keep_per_view=2)",
    "llavolta(layer=2,stride=5)",
    "visionzip(keep_per_view=3)+llavolta(layer=1,3,stride=2)",
)
#: An image row, video rows, rows of both, and text alone. Numbers of images and videos rise from row to row.
ROWS = (
    [5, "image", 6],
    [5, "video", 7, 8, 9],
    ["video", 4, 5, "image", 3],
    ["image", 4, "video", 7, "video", 8],
    [4, 5, 6],
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == "qwen3_vl" else pytest.mark.further) for name in WITH_VIDEO],
)
def video_family(request):
    return WITH_VIDEO[request.param]()


over_specs = pytest.mark.parametrize(
    "spec", [pytest.param(spec, marks=() if spec in SPECS[:2] else pytest.mark.further) for spec in SPECS]
)


def alone(family, row):
    """Return the inputs of one of `ROWS`."""
    before = ROWS[:row]
    return family.batch(
        ROWS[row],
        first_image=sum(parts.count("image") for parts in before),
        first_video=sum(parts.count("video") for parts in before),
    )


@pytest.mark.parametrize("name", WITH_VIDEO)
@torch.no_grad()
def test_no_compression_is_the_plain_model(name):
    video_family = WITH_VIDEO[name]()
    inputs = video_family.batch(*ROWS)
    plain = video_family.model(**inputs).logits
    with vlmzip.attach(video_family.model, "no_compression") as same:
        logits = same(**inputs).logits
        assert [image.modality for image in same.report.images] == [
            part for row in ROWS for part in row if part in ("image", "video")
        ]
        assert [image.row for image in same.report.images] == [0, 1, 2, 2, 3, 3, 3]
    real = inputs["attention_mask"].bool()
    assert torch.equal(logits[real], plain[real])


@over_specs
@torch.no_grad()
def test_a_ragged_batch_equals_its_rows_alone(video_family, spec):
    with vlmzip.attach(video_family.model, spec) as small:
        together = small(**video_family.batch(*ROWS)).logits
        counts = [(image.modality, image.after) for image in small.report.images]
        single = []
        for row in range(len(ROWS)):
            logits = small(**alone(video_family, row)).logits[0]
            single += [(image.modality, image.after) for image in small.report.images]
            torch.testing.assert_close(together[row, -1], logits[-1], atol=1e-4, rtol=1e-4)
        assert counts == single


@over_specs
def test_cached_equals_uncached(video_family, spec):
    inputs = video_family.batch(*ROWS)
    with vlmzip.attach(video_family.model, spec) as small:
        arguments = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        cached = small.generate(**inputs, **arguments)
        assert torch.equal(cached, small.generate(**inputs, **arguments, use_cache=False))
        assert len({tuple(row[-4:].tolist()) for row in cached}) > 1


@over_specs
def test_a_second_turn_equals_the_whole_conversation(video_family, spec):
    """With a new video in it. Text after the first video is longer than its time, so that positions go on from it."""
    first, later = [5, "image", 6, "video", *range(30, 46)], [8, "video", 9, 11]
    arguments = dict(max_new_tokens=3, do_sample=False)
    with vlmzip.attach(video_family.model, spec) as small:
        cache = DynamicCache(config=video_family.model.config.get_text_config())
        answer = small.generate(**video_family.batch(first), **arguments, past_key_values=cache)[0].tolist()
        (new,) = video_family.ids(later, first_video=1)
        whole = video_family.batch(first, later)
        ids = torch.tensor([answer + new])
        whole |= dict(input_ids=ids, attention_mask=torch.ones_like(ids)) | video_family.token_types(ids, 0)
        second = small.generate(**whole, **arguments, past_key_values=cache)
        assert [image.modality for image in small.report.images] == ["video"]
        if any(stage.text_aware for stage in small.compressor.stages()):
            return  # the question ends at the end of the prompt, which is another one in each turn
        assert torch.equal(second, small.generate(**whole, **arguments))


@wrong_copies
@torch.no_grad()
def test_beams_equal_a_row_alone(video_family):
    arguments = dict(max_new_tokens=3, num_beams=2, do_sample=False)
    with vlmzip.attach(video_family.model, "visionzip(keep_per_view=3)") as small:
        together = small.generate(**video_family.batch(*ROWS), **arguments)
        for row in range(len(ROWS)):
            inputs = alone(video_family, row)
            length = inputs["input_ids"].shape[1]
            new = small.generate(**inputs, **arguments)[0, length:].tolist()
            assert together[row, -3:].tolist()[: len(new)] == new


@torch.no_grad()
def test_save_and_load(video_family, tmp_path):
    inputs = video_family.batch([5, "video", 6])
    with vlmzip.attach(video_family.model, "evs(keep=50%)") as small:
        small.save_pretrained(tmp_path)
        before = small(**inputs).logits
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with vlmzip.attach(loaded, tmp_path) as again:
        torch.testing.assert_close(again(**inputs).logits, before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gradients_reach_the_llm_and_labels_line_up(video_family):
    inputs = video_family.batch([5, "video", 6, 7], ["image", 8, 9])
    labels = inputs["input_ids"].clone()
    labels[(labels >= 96) | (inputs["attention_mask"] == 0)] = -100
    with torch.enable_grad(), vlmzip.attach(video_family.model, "no_compression") as same:
        loss = same(**inputs, labels=labels).loss
        torch.testing.assert_close(loss, video_family.model(**inputs, labels=labels).loss)
        loss.backward()
    assert video_family.model.get_input_embeddings().weight.grad.abs().sum() > 0
    video_family.model.zero_grad()


def test_frames_share_keep_and_each_has_keep_per_view(video_family):
    frames, rows, cols = video_family.clip(0)
    inputs = video_family.batch([5, "video", 6])
    for spec, expected in (
        (f"random_tokens(keep={2 * frames + 1})", 2 * frames + 1),
        ("random_tokens(keep_per_view=2)", 2 * frames),
    ):
        (image,) = vlmzip.compress_inputs(video_family.model, inputs, spec).report.images
        assert image.layout.views == (Grid(1, rows, cols),) * frames
        assert image.after == expected
        assert min((view.token_map.group >= 0).sum() for view in image.views) == 2


def test_evs_sees_the_clip(video_family):
    frames, rows, cols = video_family.clip(0)
    inputs = video_family.batch([5, "video", 6])
    (image,) = vlmzip.compress_inputs(video_family.model, inputs, "evs(keep=50%)").report.images
    assert image.layout.views == (Grid(frames, rows, cols),)
    kept = image.token_map.group[0, frames * video_family.clip_prefix :] >= 0
    assert kept[: rows * cols].all()
    assert image.after == kept.sum() == max(rows * cols, frames * rows * cols // 2)


def test_vidcom2_sees_the_clip_and_leaves_images_alone(video_family):
    frames, rows, cols = video_family.clip(0)
    inputs = video_family.batch([5, "video", 6, "image"])
    video, image = vlmzip.compress_inputs(video_family.model, inputs, "vidcom2(keep=50%)").report.images
    assert video.layout.views == (Grid(frames, rows, cols),)
    assert video.after == frames * rows * cols // 2
    assert image.after == image.before


@pytest.mark.parametrize("layer", ["-1", "1"])
@torch.no_grad()
def test_llavolta_pools_each_frame_in_raster_order(video_family, layer):
    """CLS of a frame, which the LLM of Video-LLaVA sees, is dropped; the rest of each frame, too."""
    frames, rows, cols = video_family.clip(0)
    with vlmzip.attach(video_family.model, f"llavolta(layer={layer},stride=5)") as small:
        small(**video_family.batch([5, "video", 6]))
        (report,) = small.report.images
    runs, expected = max(rows * cols // 5, 1), []
    for first in range(0, frames * runs, runs):
        groups = [first + place // 5 if place // 5 < runs else -1 for place in range(rows * cols)]
        expected += [-1] * report.layout.prefix + groups
    assert report.token_map.group[0, : len(expected)].tolist() == expected
    assert report.by_layer[-1] == frames * runs


@pytest.mark.parametrize(
    ("spec", "counts"),
    [  # tokens of each frame, by layer
        ("llavolta(layer=1,3,stride=5,3)", [12, 2, 2, 1]),
        ("visionzip(keep_per_view=5)+llavolta(layer=1,3,stride=2)", [5, 2, 2, 1]),
        ("fastv(layer=1,keep_per_view=5)+llavolta(layer=2,stride=2)", [12, 5, 2, 2]),
        ("evs(keep=100%)+llavolta(layer=1,stride=5)", [12, 2, 2, 2]),
    ],
)
@torch.no_grad()
def test_llavolta_pools_what_is_left_of_each_frame(spec, counts):
    """In all of these the layouts of frames are gone, and what is left of a frame is not a multiple of the stride."""
    family = WITH_VIDEO["qwen3_vl"]()
    family.clips = ((3, 4, 3),)
    with vlmzip.attach(family.model, spec) as small:
        small(**family.batch(["image", 5, "video", 6, "video", 7], ["video", 8]))
        videos = [report for report in small.report.images if report.modality == "video"]
    assert [list(video.by_layer) for video in videos] == [[3 * count for count in counts]] * 3
    for video in videos:
        of_frames = [set(frame.token_map.group[0].tolist()) - {-1} for frame in video.frames]
        assert [len(groups) for groups in of_frames] == [counts[-1]] * 3
        assert len(set.union(*of_frames)) == 3 * counts[-1]


@pytest.mark.parametrize("cls", [DFMR, AdaptiveVisionZip])
@torch.no_grad()
def test_together_all_frames_of_a_video_share_one_factor(cls):
    """The first frame is no base image: the mean deviation of all frames decides."""
    family = WITH_VIDEO["qwen3_vl"]()
    family.clips = ((3, 4, 4), (2, 4, 4))
    inputs = family.batch([5, "video", 6], ["video", 7])
    encoded = family_of(family.model).modalities[1].encode(inputs, Site.PRE_PROJECTOR, cls.needs)
    (group,) = encoded.groups
    deviations = cls(max_factor=2).deviations(group.tokens)[:, 0]
    means = [deviations[:3].mean().item(), deviations[3:].mean().item()]
    for tau in (0.0, *deviations.tolist(), 10.0):
        with vlmzip.attach(family.model, cls(tau=tau, max_factor=2, tiles="together")) as small:
            small(**inputs)
            reports = small.report.images
            frames = [
                [len(set(view.token_map.group[0].tolist()) - {-1}) for view in report.views] for report in reports
            ]
        factors = [2 if mean < tau else 1 for mean in means]
        assert frames == [[16 // factors[0] ** 2] * 3, [16 // factors[1] ** 2] * 2]


def test_original_positions_are_those_of_the_whole_video(video_family):
    if not video_family.position_axes:
        pytest.skip("positions have one axis")
    inputs = video_family.batch(ROWS[3], [4, "video", 5])
    core = video_family.model.model
    names = inspect.signature(core.get_rope_index).parameters
    expected, _ = core.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
    compressed = vlmzip.compress_inputs(video_family.model, inputs, "visionzip(keep_per_view=2)")
    source = compressed.report.source
    for row in range(2):
        real = source[row] >= 0
        assert torch.equal(compressed["position_ids"][:, row, real], expected[:, row, source[row, real]])
        assert source[row, real].diff().min() > 0


def test_contiguous_tokens_stay_between_the_markers_of_their_frame():
    family = WITH_VIDEO["qwen3_vl"]()
    inputs = family.batch([5, "video", 6])
    compressed = vlmzip.compress_inputs(family.model, inputs, "visionzip(keep_per_view=3,positions=contiguous)")
    frames = [part for n in range(3) for part in (20 + n, 21, 97, *[VIDEO_TOKEN] * 3, 96)]
    assert compressed["input_ids"][0].tolist() == [5, *frames, 6]
    assert "position_ids" not in compressed


@pytest.mark.skipif("video_llava" not in WITH_VIDEO, reason="it is tested from transformers 5.23 on")
def test_video_llava_keeps_17_tokens_of_each_frame():
    family = WITH_VIDEO["video_llava"]()
    inputs = family.batch([5, "video", 6])
    (video,) = vlmzip.compress_inputs(family.model, inputs, "visionzip(keep_per_view=17)").report.images
    assert (video.before, video.after) == (3 * 37, 3 * 17)
    for view in video.views:
        group = view.token_map.group[0]
        sizes = group[group >= 0].unique(return_counts=True)[1]
        assert group[0] >= 0  # CLS is the first of 14 dominant tokens; the other 22 patches make 3 contextual ones
        assert sorted(sizes.tolist())[:14] == [1] * 14
        assert len(sizes) == 17


@pytest.mark.skipif("video_llava" not in WITH_VIDEO, reason="it is tested from transformers 5.23 on")
@torch.no_grad()
def test_tokens_of_video_llava_stand_frame_by_frame_in_the_order_of_the_reference():
    """In each frame CLS and the dominant patches in raster order, then the contextual ones."""
    family, method = WITH_VIDEO["video_llava"](), VisionZip(keep_per_view=17)
    inputs = family.batch([5, "video", 6])
    llava = family_of(family.model).modalities[1]
    (group,) = llava.encode(inputs, Site.PRE_PROJECTOR, method.needs).groups
    frames = [
        visionzip(features, torch.cat([torch.zeros(1), scores])[None], keys, 14, 3, method.merge)
        for features, scores, keys in zip(
            group.tokens.features, group.tokens.cls_attention[:, -36:], group.tokens.keys, strict=True
        )
    ]
    seen = {}
    handle = llava.llm.register_forward_pre_hook(lambda _module, _args, given: seen.update(given), with_kwargs=True)
    with vlmzip.attach(family.model, method) as small:
        small(**inputs)
    handle.remove()
    torch.testing.assert_close(seen["inputs_embeds"][0, 1:-1], llava.projector(torch.cat(frames)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dropping_inside_the_llm_equals_masking(video_family):
    """The plain model, whose layers from 2 on do not attend to the dropped tokens, gives the same next token."""
    inputs, before = video_family.batch(ROWS[3]), video_family.model.config.get_text_config()._attn_implementation
    video_family.model.set_attn_implementation("eager")
    try:
        with vlmzip.attach(video_family.model, "random_tokens(site=in_llm,layer=2,keep=50%)") as small:
            logits = small(**inputs).logits[0, -1]
            left = set(small.report.source[0].tolist())
        dropped = [column for column in range(inputs["input_ids"].shape[1]) if column not in left]
        assert len(dropped) > 10
        expected = masked_logits(video_family.model, inputs, dropped)
    finally:
        video_family.model.set_attn_implementation(before)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_placeholders_of_missing_videos_are_refused(video_family):
    inputs = video_family.batch([5, "video", 6, "image"])
    for name in family_of(video_family.model).modalities[1].image_inputs:
        inputs.pop(name, None)
    with pytest.raises(UserError, match="the prompt has video placeholders, but pixel_values_videos is missing"):
        vlmzip.compress_inputs(video_family.model, inputs, "no_compression")


def test_a_wrong_number_of_placeholders_is_refused(video_family):
    inputs = video_family.batch([5, "video", VIDEO_TOKEN, 6])
    with pytest.raises(UserError, match=r"\d+ video placeholders, but its 1 video\(s\) have"):
        vlmzip.compress_inputs(video_family.model, inputs, "no_compression")


def test_models_whose_videos_are_unknown_refuse_them():
    family = FAMILIES["llava"]()
    with pytest.raises(UserError, match="cannot compress videos of LlavaForConditionalGeneration yet: give it images"):
        vlmzip.compress_inputs(family.model, {"pixel_values_videos": torch.zeros(1)}, "no_compression")


def test_smaller_frames_go_through_the_encoder():
    for name in {"qwen2_5_vl", "video_llava"} & WITH_VIDEO.keys():
        family = WITH_VIDEO[name]()
        inputs = family.batch([5, "video", 6, "image"])
        compressed = vlmzip.compress_inputs(family.model, inputs, "downsample(keep_per_view=4)")
        video, image = compressed.report.images
        assert (video.after, image.modality) == (4 * family.clip(0)[0], "image")
        assert compressed.smaller["pixel_values_videos"].numel() < inputs["pixel_values_videos"].numel()


@pytest.mark.skipif("video_llava" not in FAMILIES, reason="its inputs have other names before transformers 5.23")
def test_video_llavas_processor_may_name_images_as_it_did():
    family = FAMILIES["video_llava"]()
    inputs = family.batch([1, "image", "video", 9])
    named = {"pixel_values_images" if name == "pixel_values" else name: value for name, value in inputs.items()}
    with vlmzip.attach(family.model, vlmzip.VisionZip(keep=8)) as small:
        assert torch.equal(small(**named).logits, small(**inputs).logits)
    assert family_of(family.model).image_inputs == ("pixel_values",)
