"""Thresholds set from images: what was promised is what the compressor then does."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from tests.clips import grey, with_videos
from tests.families import FAMILIES
from vlmzip import DFMR, AdaptiveVisionZip, BudgetError, Site, UserError, VisionZip, attach, calibrate, mini
from vlmzip.compressor import Measured
from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.scene import make_scene
from vlmzip.mini.splits import VALIDATION
from vlmzip.runtime.calibration import MeasuredImage, _Steps
from vlmzip.runtime.videos import Clip, clip_arguments


@pytest.fixture(scope="module")
def loaded():
    return mini.load()


@pytest.fixture(scope="module")
def images():
    return [Image.fromarray(draw(make_scene(seed), shipped_assets("validation"))) for seed in VALIDATION[:30]]


@pytest.mark.further
@pytest.mark.parametrize("method", [DFMR(), AdaptiveVisionZip(windows="max"), DFMR(measure="pixels", max_factor=4)])
@pytest.mark.parametrize("keep", ["75%", 0.5, 50, "25%", "15%"])
def test_the_average_is_within_5_percent_of_the_budget(loaded, images, method, keep):
    model, processor = loaded
    found = calibrate(model, images, method, keep, processor=processor)
    wanted = {"75%": 108, 0.5: 72, 50: 50, "25%": 36, "15%": 22}[keep]
    assert found.average == pytest.approx(wanted, rel=0.05)
    assert found.reached == pytest.approx(found.average / 144)
    assert type(found.compressor) is type(method)
    assert found.compressor.max_factor == method.max_factor
    assert found.compressor.tau != method.tau
    assert found.before == [144] * 30


@pytest.mark.parametrize("method", [DFMR(site=Site.POST_PROJECTOR), AdaptiveVisionZip()])
def test_the_compressor_does_to_the_images_what_was_said(loaded, images, method):
    model, processor = loaded
    found = calibrate(model, iter(images), method, "40%", processor=processor, batch=7)
    prompts = ["USER: <image>\nw ASSISTANT:"] * len(images)
    compressed = attach(model, found.compressor)
    with torch.no_grad():
        compressed(**processor(images=images, text=prompts, padding=True, return_tensors="pt"))
    assert [image.after for image in compressed.report.images] == found.after
    assert [144 // factor**2 for factor in found.factors] == found.after
    assert len(set(found.factors)) == 3


def test_paths_and_the_models_own_processor_will_do(loaded, images, tmp_path):
    model, processor = loaded
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number:02}.png")
    by_path = calibrate(model, sorted(tmp_path.iterdir()), DFMR(), "50%")
    assert by_path == calibrate(model, images, DFMR(), "50%", processor=processor)


def test_images_of_different_grids(images):
    """The images of Qwen have grids of their own; a factor counts where it divides the sides."""
    family = FAMILIES["qwen2_5_vl"]()

    def image_processor(images, return_tensors):
        from transformers import BatchFeature

        return BatchFeature(family.images(0, len(images)))

    processor = type("Processor", (), {"image_processor": staticmethod(image_processor)})
    found = calibrate(family.model, images[:4], DFMR(), 24, processor=processor)
    assert found.before == [24, 15, 24, 42]
    assert [sorted(one) for one in found.deviations] == [[2], [], [2], []]
    first, third = found.deviations[0][2], found.deviations[2][2]
    assert min(first, third) < found.compressor.tau <= max(first, third)
    assert sorted(found.after) == [6, 15, 24, 42]  # (24 + 15 + 24 + 24) / 4 were asked for


def test_the_whole_budget_pools_nothing(loaded, images):
    found = calibrate(loaded[0], images[:3], DFMR(), 999, processor=loaded[1])
    assert (found.compressor.tau, found.reached, found.factors) == (0, 1, [1, 1, 1])


def test_the_smallest_budget_pools_every_image(loaded, images):
    found = calibrate(loaded[0], images[:3], DFMR(), 16, processor=loaded[1])
    assert found.factors == [3, 3, 3]
    assert all(one[3] < found.compressor.tau for one in found.deviations)


@pytest.mark.parametrize(
    ("count", "fields", "keep", "message"),
    [
        (9, {}, "5%", r"7 visual tokens per image are out of dfmr's reach: it can average 16 to 144"),
        (9, {"max_factor": 2}, "11%", r"out of dfmr's reach: it can average 36 to 144"),
        (9, {"max_factor": 1}, "50%", r"out of dfmr's reach: it can average 144 to 144"),
        (1, {}, "60%", r"nearest average to 86 visual tokens per image is (36|144) on .* give more images"),
    ],
)
def test_budgets_that_no_step_meets_are_refused_with_the_reach(loaded, images, count, fields, keep, message):
    with pytest.raises(BudgetError, match=message):
        calibrate(loaded[0], images[:count], DFMR(**fields), keep, processor=loaded[1])


@pytest.mark.parametrize(
    ("images", "method", "keep", "message"),
    [
        ([], DFMR(), "50%", "no image to calibrate on"),
        (["missing.png"], DFMR(), "50%", "no file 'missing.png'"),
        ([], VisionZip(), "50%", "visionzip has no threshold"),
        ([], DFMR(), 0, "keeps nothing"),
    ],
)
def test_mistakes_are_said(loaded, images, method, keep, message):
    with pytest.raises(UserError, match=message):
        calibrate(loaded[0], images, method, keep, processor=loaded[1])


def test_a_model_without_processor_asks_for_one(llava, images):
    model = copy.copy(llava)
    with pytest.raises(UserError, match="give one: calibrate"):
        calibrate(model, images, DFMR(), "50%")


def test_the_nearest_step_is_the_best_of_all_thresholds():
    """Against trying every threshold there is: 40 images, three factors, deviations that need not rise with them."""
    rng = np.random.default_rng(0)
    images = [
        Measured(36, {1: 36, 2: 9, 3: 4}, dict(zip((2, 3), rng.random(2).astype(np.float32).tolist(), strict=True)))
        for _ in range(40)
    ]
    steps = _Steps([MeasuredImage((view,), (view.size,)) for view in images])

    def average(tau):
        return np.mean([one.counts[max([1, *(f for f, d in one.deviations.items() if d < tau)])] for one in images])

    every = sorted(d for one in images for d in one.deviations.values())
    possible = [average(tau) for tau in [0.0, *every, 2.0]]
    for wanted in np.linspace(3, 37, 60):
        step = steps.nearest(wanted)
        assert steps.average(step) == pytest.approx(average(steps.threshold(step)))
        assert abs(steps.average(step) - wanted) == pytest.approx(min(abs(one - wanted) for one in possible))


@pytest.mark.parametrize(
    ("method", "share"),
    [(DFMR(), 0.6), (DFMR(tiles="together"), 0.66), (DFMR(measure="pixels"), 0.6), (AdaptiveVisionZip(), 0.6)],
)
def test_a_budget_counts_the_tokens_of_all_views_of_an_image(images, method, share):
    """Each view chooses a factor, without the padding that the LLM does not see; windows of 3 fit 3 x 3 tokens."""
    family = FAMILIES["llava_next"]()
    processor = family.processor()
    images = [
        image.resize(size) for image, size in zip(images, [(90, 40), (120, 20), (96, 96), (40, 90)], strict=False)
    ]
    calibration = calibrate(family.model, images, method, share, processor=processor)
    assert calibration.before == [9 + 18, 9 + 9, 9 + 36, 9 + 18]
    views = [2] * 4 if getattr(method, "tiles", "") == "together" else [3, 4, 5, 3]
    assert len(calibration.factors) == len(calibration.deviations) == sum(views)
    prompts = ["<image> w5"] * len(images)
    compressed = attach(family.model, calibration.compressor)
    with torch.no_grad():
        compressed(**processor(images=images, text=prompts, padding=True, return_tensors="pt"))
    after = [
        image.after - image.layout.separators * (image.after == image.before) for image in compressed.report.images
    ]
    assert calibration.after == after
    assert calibration.upper == max(after)
    assert len(set(calibration.factors)) == 2
    assert calibration.average == pytest.approx(share * np.mean(calibration.before), rel=0.05)
    assert sum(calibration.after_by_view) == sum(after)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("qwen3_vl", DFMR(max_factor=2)),
        ("qwen3_vl", AdaptiveVisionZip(max_factor=2)),
        pytest.param("video_llava", DFMR(), marks=pytest.mark.further),
    ],
)
def test_the_compressor_does_to_videos_what_was_said(name, method):
    if name not in FAMILIES:
        pytest.skip("it is tested from transformers 5.23 on")
    family = FAMILIES[name]()
    processor = with_videos(family, grid=(4, 4))
    videos = [[grey(10 * n + 30 * m, (32, 32), 25 * n) for m in range(4)] for n in range(4)]
    mixed = [videos[0], grey(90, (48, 48), 40), *videos[1:]]
    calibration = calibrate(family.model, mixed, method, "50%", processor=processor)
    views = 2 if "qwen" in name else 4
    assert calibration.before[0] == views * 16 if views == 2 else views * 36
    assert len(calibration.factors) == 4 * views + 1
    assert calibration.average == pytest.approx(np.mean(calibration.before) / 2, rel=0.05)
    each = [measured for n, measured in enumerate(calibration.after) if n != 1]
    with torch.no_grad(), attach(family.model, calibration.compressor) as small:
        for video, after in zip(videos, each, strict=True):
            clip = Clip("", video, list(range(4)), 4, None)
            small(**processor(text=["<video> w5"], return_tensors="pt", **clip_arguments([clip])))
            (report,) = small.report.images
            cls = sum(int((view.token_map.group[0, : view.prefix] >= 0).sum()) for view in report.views)
            assert report.after - cls == after
    assert calibrate(family.model, mixed, method, keep_per_view="50%", processor=processor) == calibration


def test_frames_of_a_video_are_calibrated_together():
    family, method = FAMILIES["qwen3_vl"](), DFMR(max_factor=2, tiles="together")
    processor = with_videos(family, grid=(4, 4))
    videos = [[grey(10 * n + 30 * m, (32, 32), 25 * n) for m in range(6)] for n in range(4)]
    calibration = calibrate(family.model, videos, method, "62.5%", processor=processor)
    assert sorted(calibration.after) == [12, 12, 48, 48]
    assert len(calibration.factors) == 4
    with torch.no_grad(), attach(family.model, calibration.compressor) as small:
        for video, after in zip(videos, calibration.after, strict=True):
            clip = Clip("", video, list(range(6)), 6, None)
            small(**processor(text=["<video> w5"], return_tensors="pt", **clip_arguments([clip])))
            assert small.report.after == after


def test_videos_that_cannot_be_calibrated_on(loaded):
    model, processor = loaded
    with pytest.raises(UserError, match="takes no video; models that take videos are llava-hf/LLaVA-NeXT-Video"):
        calibrate(model, [[grey(1, (4, 4))]], DFMR(), 9, processor=processor)
    family = FAMILIES["qwen3_vl"]()
    with pytest.raises(UserError, match="a video has no frames; give a list of images"):
        calibrate(family.model, [[]], DFMR(), 9, processor=with_videos(family))
    for budgets in ({}, {"keep": 9, "keep_per_view": 3}):
        with pytest.raises(UserError, match="give either keep or keep_per_view"):
            calibrate(model, [], DFMR(), processor=processor, **budgets)
